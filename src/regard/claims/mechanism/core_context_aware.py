"""CCA's claim: full attention while nothing is pooled, then few keys, and no core that tells of the future.

Keys read are counted where they are read: what the softmax of the fast path is handed and shown, the most over all
queries, at the paper's g = 16 and s = 1024.
"""

from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.claims.lab import difference, generator, random_qkv, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.sparse import core_context_aware as page
from regard.ops import closed

LENGTHS = (4_096, 8_192, 16_384)
GROUP, LOCAL = 16, 1_024


def attend(q: Tensor, k: Tensor, v: Tensor, **settings: int) -> Tensor:
    return page.METHOD.fast(q, k, v, page.Config(**settings), Call())[0]


def keys_read(n: int) -> int:
    """The most keys, cores and tokens, that a query of n reads."""
    counts, softmax = [], closed.softmax_attention

    def counted(*inputs: Tensor, mask: Tensor, **options: float) -> Tensor:
        counts.append(int(mask.sum(-1).max()))
        return softmax(*inputs, mask=mask, **options)

    with mock.patch.object(closed, "softmax_attention", counted), torch.no_grad():
        attend(*random_qkv(generator(), 1, n, 8), group=GROUP, local=LOCAL)
    return max(counts)


def gradients(n: int = 160) -> tuple[float, float]:
    """(the largest |gradient| of an output for inputs after it, the least of an output for values up to it)."""
    inputs = [t.requires_grad_() for t in random_qkv(generator(), 2, n, 16)]
    out, after, before = attend(*inputs, group=8, local=20), 0.0, float("inf")
    for i in range(n):
        grads = torch.autograd.grad(out[:, :, i].sum(), inputs, retain_graph=True)
        after = max([after, *(g[:, :, i + 1 :].abs().max().item() for g in grads if i + 1 < n)])
        before = min(before, grads[2][:, :, : i + 1].abs().amax(-1).min().item())
    return after, before


def measure() -> Measured:
    with threads(1):
        q, k, v = random_qkv(generator(), 4, 2_048, 32)
        full = scaled_dot_product_attention(q, k, v, is_causal=True)
        same = difference(attend(q, k, v, group=GROUP, local=2_048), full)
        read = {n: keys_read(n) for n in LENGTHS}
        after, before = gradients()
    longest = LENGTHS[-1]
    parts = {
        "full attention": same < 1e-5,
        "keys read": read[longest] <= longest / GROUP + LOCAL + GROUP,
        "nothing of the future": after == 0,
        "all of the past": before > 0,
    }
    numbers: dict = {f"keys_read_at_{n}": count for n, count in read.items()}
    numbers |= {"bound_on_keys": longest // GROUP + LOCAL + GROUP, "difference_from_full": same}
    return Measured.by(
        parts, numbers | {"gradient_of_the_future": after, "least_gradient_of_the_past": before}
    )


CLAIM = Claim(
    name="core_context_aware",
    statement=(
        "with a window of N or more it is full causal attention; beyond it the keys that a query reads grow as "
        "N / g + s; no core leaks later tokens"
    ),
    bound=(
        "difference from full attention < 1e-5; keys read at N = 16k <= N / 16 + s + 16; the gradient of output i for "
        "inputs after i is exactly 0"
    ),
    measure=measure,
)
