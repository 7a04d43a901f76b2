"""RCMHA: the causal convolution of torch, scores that a shift leaves, blocks of queries, and the released code."""

import pytest
import torch
from torch.nn import functional as F

from regard import attend
from regard.catalog import method
from regard.core import Unsupported
from regard.ops import softmax

HEADS, WIDTH = 2, 4


def learned(**settings):
    page = method("rcmha").page
    torch.manual_seed(0)
    dims = {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH, "value": WIDTH, "width": 8}
    params = page.init(page.config(**settings), dims)
    return {name: (p + 0.1 * torch.randn_like(p)).double() for name, p in params.items()}


def tokens(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, n, WIDTH, generator=g, dtype=torch.float64) for _ in range(3)]


def test_without_distances_it_is_softmax_attention_on_torchs_convolution():
    q, k, v = tokens(9)
    params = learned(relative=False)

    def convolved(t, letter):
        weight = params[f"{letter}_conv"].flip(1)[:, None]  # torch's last weight is that of the token itself
        line = F.pad(t.mT.reshape(HEADS, WIDTH, 9), (2, 0))
        return F.conv1d(line, weight, params[f"{letter}_bias"], groups=WIDTH).view(1, HEADS, WIDTH, 9).mT

    wanted = F.scaled_dot_product_attention(
        convolved(q, "q"), convolved(k, "k"), convolved(v, "v"), is_causal=True
    )
    for impl in ("reference", "fast"):
        out = attend(q, k, v, "rcmha", params=params, relative=False, impl=impl).out
        torch.testing.assert_close(out, wanted)


def test_what_stands_further_along_has_the_same_scores():
    """Values are the one-hot vectors of tokens and their convolution is left out, so that the output is the weights."""
    q, k, _ = tokens(6)
    junk = tokens(5, seed=1)
    params = learned()
    params["v_conv"], params["v_bias"] = torch.zeros(11, 3).double(), torch.zeros(11).double()
    params["v_conv"][:, 0] = 1

    def weights(before):
        a, b = (torch.cat([j[:, :, :before], t], dim=2) for j, t in zip(junk, (q, k), strict=False))
        v = torch.eye(6 + before, 11, dtype=torch.float64).expand(1, HEADS, -1, -1)
        return attend(a, b, v, "rcmha", "self", params=params).out[:, :, before:, before : before + 6]

    here, there = (weights(before)[:, :, 2:, 2:] for before in (0, 5))
    # what stands before takes weight from all alike, so ratios stay
    torch.testing.assert_close(there / there[..., :1], here / here[..., :1])


@pytest.mark.parametrize("pattern", ["self", "causal_self"])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_queries_are_the_whole(monkeypatch, pattern, masked):
    q, k, v = tokens(13)
    mask = torch.rand(1, 1, 1, 13, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    wanted = attend(q, k, v, "rcmha", pattern, mask=mask, params=learned(), impl="reference").out
    monkeypatch.setattr(softmax, "BLOCK", HEADS * 13 * 5)
    found = attend(q, k, v, "rcmha", pattern, mask=mask, params=learned(), impl="fast").out
    torch.testing.assert_close(found, wanted)


def test_masks_by_head_after_a_state_of_fewer_heads():
    """Two query heads on one KV head: once they see different keys, each has a convolution of its own."""
    q, k, v = tokens(9)
    k, v, params = k[:, :1], v[:, :1], learned()
    mask = torch.ones(1, HEADS, 1, 9, dtype=torch.bool)
    mask[:, 1, :, 6] = False
    for impl in ("reference", "fast"):
        wanted = attend(q, k, v, "rcmha", mask=mask, params=params, impl=impl).out
        state = attend(q[:, :, :5], k[:, :, :5], v[:, :, :5], "rcmha", params=params, impl=impl).final_state
        rows = []
        for cut in (slice(5, 7), slice(7, 9)):
            shown = mask[..., : cut.stop] if cut.start == 5 else mask
            part = attend(
                *(t[:, :, cut] for t in (q, k, v)), "rcmha", mask=shown, params=params, initial_state=state, impl=impl
            )  # fmt: skip
            rows.append(part.out)
            state = part.final_state
        torch.testing.assert_close(torch.cat(rows, dim=2), wanted[:, :, 5:])


def test_queries_before_are_asked_for():
    q, k, v = tokens(9)
    with pytest.raises(Unsupported, match="as many queries as new keys"):
        attend(q[:, :, 5:], k, v, "rcmha", params=learned())
