"""Attention over all keys with its sums, and parts merged by them: outputs and gradients of both against softmax."""

import pytest
import torch
from torch.testing import assert_close

from regard.ops.blocks import Blocks, block_attention
from regard.ops.blocks.merged import merged
from regard.ops.blocks.whole import whole_attention

SCALE = 0.4


def drawn(n, m, groups=1, values=6):
    g = torch.Generator().manual_seed(0)
    sizes = ((2, 2, n, 6), (2, groups, m, 6), (2, groups, m, values))
    return [torch.randn(*size, generator=g, dtype=torch.float64).requires_grad_() for size in sizes]


def softmax(q, k, v, causal=False):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    n, m = q.shape[2], k.shape[2]
    hidden = torch.arange(m) > torch.arange(n)[:, None] + m - n
    s = (q @ k.mT * SCALE).masked_fill(hidden & causal, -torch.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def with_gradients(parts, tensors):
    out, lse = parts
    (out.cos().sum() + lse.sin().sum()).backward()
    return [out.detach(), lse.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("values", [4, 6, 9])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("n", "m", "causal"), [(14, 14, True), (300, 300, True), (5, 14, True), (1, 9, True),
                                                (5, 14, False), (14, 5, False)])  # fmt: skip
def test_whole_is_softmax(n, m, causal, groups, values):
    sides = [drawn(n, m, groups, values) for _ in range(2)]
    found = with_gradients(whole_attention(*sides[0], scale=SCALE, causal=causal), sides[0])
    wanted = with_gradients(softmax(*sides[1], causal), sides[1])
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


def test_two_parts_merged_are_the_whole():
    """Some queries read nothing in the second part: there the first is the whole, with finite gradients."""
    sides = [drawn(14, 14) for _ in range(2)]
    first = torch.tensor([True, True, False, False]).expand(4, 4).clone()
    rest = ~first
    rest[0] = False
    parts = [
        block_attention(*sides[0], Blocks.of_map(c[None, None], 4, 4), scale=SCALE) for c in (first, rest)
    ]
    seen = (first | rest).repeat_interleave(4, 0).repeat_interleave(4, 1)[:14, :14]
    s = (sides[1][0] @ sides[1][1].mT * SCALE).masked_fill(~seen, -torch.inf)
    wanted = with_gradients((s.softmax(-1) @ sides[1][2], s.logsumexp(-1)), sides[1])
    for one, other in zip(with_gradients(merged(*parts), sides[0]), wanted, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)
