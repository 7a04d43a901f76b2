"""ACDiT's claim, on a random diffusion transformer: one masked pass over clean and noisy blocks is blockwise denoising.

The stack is the authors': attention and MLP with residuals, norms without bias, and for noisy tokens a scale, a shift
and a gate that a condition (time and class, here random for every block) gives; clean tokens pass without. The same
weights run twice: once over [clean; noisy] under the page's mask at its positions, and block by block, x_i against the
stored keys of c_0 ... c_{i-1}, after which c_i is read and its keys are stored.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.claims.lab import difference, generator
from regard.core.claim import Claim, Measured
from regard.core.mask import Mask, predicate
from regard.core.roles import Roles
from regard.methods.positions import acdit_scam as page
from regard.ops.rotary import rotate

LAYERS, HEADS, WIDTH, TOKENS, BLOCKS = 3, 4, 64, 48, (1, 6, 48)
Past = list[tuple[Tensor, Tensor]]


@predicate()
def own_clean_block(at, block: int, blocks: int):
    """The leak: a noisy block sees what it is to become."""
    return at.q // block - blocks == at.k // block


class Stack:
    """A diffusion transformer without learning: [N, WIDTH] -> [N, WIDTH]."""

    def __init__(self, g: torch.Generator) -> None:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(LAYERS, WIDTH, *shape, generator=g, dtype=torch.float64) * WIDTH**-0.5

        self.qkv, self.out, self.up = drawn(3 * WIDTH), drawn(WIDTH), drawn(4 * WIDTH)
        self.down, self.modulation = drawn(4 * WIDTH).mT / 2, drawn(6 * WIDTH)

    def __call__(
        self, x: Tensor, condition: Tensor | None, at: Tensor, mask: Tensor | None = None, past: Past | None = None
    ) -> tuple[Tensor, Past]:  # fmt: skip
        """`condition` [N', WIDTH] is that of the last N' tokens, the noisy ones; the keys of all layers come back."""
        clean, keys = len(x) - (0 if condition is None else len(condition)), []
        for i in range(LAYERS):
            changes = [None] * 6 if condition is None else (condition @ self.modulation[i]).chunk(6, dim=-1)
            mixed, k, v = self.attention(
                i, modulated(x, clean, *changes[:2]), at, mask, past[i] if past else None
            )
            x = x + gated(mixed, clean, changes[2])
            inner = modulated(x, clean, *changes[3:5]) @ self.up[i]
            x = x + gated(F.gelu(inner) @ self.down[i], clean, changes[5])
            keys.append((k, v))
        return x, keys

    def attention(
        self, i: int, x: Tensor, at: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, v = (x @ self.qkv[i]).view(1, len(x), 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, at[None], 1e4), rotate(k, at[None], 1e4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        return (weights @ v)[0].transpose(0, 1).reshape(len(x), -1) @ self.out[i], k, v


def modulated(x: Tensor, clean: int, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    if shift is None or scale is None:
        return x
    return torch.cat([x[:clean], x[clean:] * (1 + scale) + shift])


def gated(x: Tensor, clean: int, gate: Tensor | None) -> Tensor:
    return x if gate is None else torch.cat([x[:clean], gate * x[clean:]])


def one_pass(
    stack: Stack, clean: Tensor, noisy: Tensor, condition: Tensor, cfg: page.Config, mask: Mask
) -> Tensor:
    """The noisy rows of the training pass."""
    row = torch.cat([clean, noisy])
    at = page.positions(Roles(padding=[0] * len(row)), cfg)
    return stack(row, condition, at, mask.dense(len(row)))[0][len(clean) :]


def by_block(stack: Stack, clean: Tensor, noisy: Tensor, condition: Tensor, cfg: page.Config) -> Tensor:
    """Every noisy block alone against the stored keys of the clean ones before it."""
    rows, past, places = [], None, torch.arange(len(clean)).split(cfg.block)
    for c, x, given, at in zip(*(t.split(cfg.block) for t in (clean, noisy, condition)), places, strict=True):
        rows.append(stack(x, given, at, past=past)[0])
        past = stack(c, None, at, past=past)[1]
    return torch.cat(rows)


def measure() -> Measured:
    g = generator()
    stack, (clean, noisy) = Stack(g), torch.randn(2, TOKENS, WIDTH, generator=g, dtype=torch.float64)
    passes, leaks, exact = [], [], 1.0
    for block in BLOCKS:
        cfg = page.Config(block=block, blocks=TOKENS // block)
        condition = torch.randn(cfg.blocks, WIDTH, generator=g, dtype=torch.float64).repeat_interleave(
            block, 0
        )
        given, wanted = (stack, clean, noisy, condition, cfg), by_block(stack, clean, noisy, condition, cfg)
        trained = one_pass(*given, page.build(cfg))
        passes.append(difference(trained, wanted))
        leaks.append(
            difference(one_pass(*given, page.build(cfg) | own_clean_block(block, cfg.blocks)), wanted)
        )
        if block == TOKENS:
            exact = difference(trained, stack(noisy, condition, torch.arange(TOKENS))[0])
    numbers = {
        "block_sizes": list(BLOCKS),
        "pass_against_generation": passes,
        "one_block_against_unmasked_diffusion": exact,
        "smallest_change_by_the_leak": min(leaks),
        "largest_output": trained.abs().max().item(),
    }
    parts = {
        "block by block": max(passes) < 1e-5,
        "one block is plain": exact == 0,
        "a leak shows": min(leaks) > 1e-3,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="acdit_scam",
    statement=(
        "one training pass under the skip-causal mask gives for every noisy block what generating that block alone "
        "against the cached clean ones before it gives; one block of all tokens is plain diffusion"
    ),
    bound=(
        "largest difference over blocks < 1e-5; one block of all tokens gives the unmasked diffusion rows exactly; a "
        "noisy block that sees its own clean one differs by > 1e-3"
    ),
    measure=measure,
)
