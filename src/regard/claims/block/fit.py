"""The claim of FIT: groups learn of each other through their latents alone, at a cost that grows as L^(4/3).

leak    one group of a text is moved, and the outputs of the others are looked at: without global layers, with them,
        and in FITAR (causal) those before and after it
cost    scores of a head that the page asks of torch's attention, counted while it runs, at L = n³ tokens in groups
        of n with four latents each; full attention of the same tokens beside it. The exponent is a line through the
        logarithms
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regard.claims.lab import generator, seeded, slope, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.blocks import fit as page

WIDTH, HEADS, GROUP, GROUPS = 32, 4, 8, 6
SIDES = (4, 6, 8, 12, 16, 24)  # n, of n³ tokens


class Scores(TorchFunctionMode):
    """Counts the scores of a head that are asked of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k = args[:2]
            self.count += q.shape[0] * q.shape[2] * k.shape[2]
        return function(*args, **(kwargs or {}))


def drawn(cfg: page.Config, width: int = WIDTH, heads: int = HEADS) -> dict[str, Tensor]:
    """Weights ten times as large as a training begins with, so that what passes is seen."""
    with seeded(0):
        params = page.init(cfg, {"width": width, "heads": heads})
    return {name: p if "norm" in name else 10 * p for name, p in params.items()}


@torch.no_grad()
def moved(cfg: page.Config, group: int) -> list[float]:
    """How far the outputs of each group move when one of them does."""
    x = torch.randn(1, GROUPS * GROUP, WIDTH, generator=generator(1))
    other = x.clone().unflatten(1, (GROUPS, GROUP))
    other[:, group] += torch.randn(GROUP, WIDTH, generator=generator(2))
    call = Call("self", params=drawn(cfg))
    out, new = (page.fast(t, cfg, call)[0] for t in (x, other.flatten(1, 2)))
    return (new - out).abs().unflatten(1, (GROUPS, GROUP)).amax((0, 2, 3)).tolist()


@torch.no_grad()
def scores(n: int) -> int:
    cfg = page.Config(group=n)
    x = torch.randn(1, n**3, 8, generator=generator(n))
    with Scores() as counted:
        page.fast(x, cfg, Call("self", params=drawn(cfg, 8, 1)))
    return counted.count


def measure() -> Measured:
    at, last = 2, GROUPS - 1
    with threads(1):
        apart = moved(page.Config(group=GROUP, global_layers=0), at)
        joined = moved(page.Config(group=GROUP), at)
        causal = moved(page.Config(group=GROUP, causal=True), at)
        counts = [scores(n) for n in SIDES]
    others = [group for group in range(GROUPS) if group != at]
    tokens = [n**3 for n in SIDES]
    leak = max(apart[group] for group in others)
    spread = min(joined[group] for group in others)
    early, late = max(causal[:at]), min(causal[at : last + 1])
    exponent = slope(tokens, counts)
    parts = {
        "apart without global layers": leak == 0,
        "joined by them": spread > 1e-5,
        "causal: earlier groups stay": early == 0,
        "causal: later groups learn of it": late > 1e-5,
        "exponent": abs(exponent - 4 / 3) <= 0.05,
    }
    numbers = {
        "leak": leak,
        "spread": spread,
        "causal_earlier": early,
        "causal_later": late,
        "exponent": exponent,
        "tokens": tokens,
        "scores": counts,
        "full_attention_over_fit": [n**2 / count for n, count in zip(tokens, counts, strict=True)],
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="fit",
    statement=(
        "groups of tokens learn of each other through latents alone: not at all without global layers, all of them "
        "with these, in the autoregressive form those after it; scores grow as L^(4/3) in groups of L^(1/3) tokens"
    ),
    bound=(
        "other groups move by exactly 0 without global layers and by > 1e-5 with them; causal: 0 before the group that "
        "is moved, > 1e-5 after it; exponent of scores 1.33 ± 0.05"
    ),
    measure=measure,
)
