"""HyperAttention: right on average, causal in keys and values, the order of its buckets, its draws."""

import pytest
import torch
from torch.testing import assert_close

from regard.core.call import Call
from regard.methods.mechanisms.sparse import hyperattention as page
from regard.ops.blocks import buckets
from regard.ops.hashing import gray_rank


def drawn(n, heads=2, width=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, n, width, generator=g, dtype=torch.float64) for _ in range(3)]


CFG = page.Config(projections=3, block=8, sample=6, exact_below=8)


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_no_later_key_or_value_moves_an_output(path):
    """With the queries as they are, tokens after i move no output up to i."""
    q, k, v = drawn(50)
    run = getattr(page.METHOD, path)
    out = run(q, k, v, CFG, Call())[0]
    for i in (0, 7, 24, 25, 48):
        later = [t.clone() for t in (k, v)]
        for t in later:
            t[:, :, i + 1 :] += 3.0
        assert_close(run(q, *later, CFG, Call())[0][:, :, : i + 1], out[:, :, : i + 1], rtol=0, atol=1e-12)


def test_counts_are_right_on_average():
    """Over many seeds the weight of every pair is one: numerators and denominators are those of softmax attention."""
    q, k, _ = (t[0] for t in drawn(24))
    total = sum(page.rectangle(q, k, 0, page.Config(projections=2, block=6, sample=4, exact_below=1, seed=s))
                for s in range(400))  # fmt: skip
    # a pair is in one block, weight 1, or drawn 4 times of 24 with weight 6: deviation below sqrt(6 / 400)
    assert (total / 400 - 1).abs().max() < 5 * (6 / 400) ** 0.5
    assert abs(total.mean() / 400 - 1) < 0.02


def test_neighbouring_buckets_differ_in_one_bit():
    """And with three bits, places b xor b/2 as in the released code do not give that."""
    patterns = torch.arange(32)
    signs = (patterns[:, None] >> torch.arange(5)) % 2 == 1
    in_order = signs[gray_rank(signs).argsort()]
    assert (in_order[1:] != in_order[:-1]).sum(-1).tolist() == [1] * 31
    released = torch.tensor([0, 1, 3, 2, 6, 7, 5, 4])
    in_order = signs[:8][released.argsort()]
    assert (in_order[1:] != in_order[:-1]).sum(-1).max() == 2


def test_the_seed_decides():
    q, k, v = drawn(40)
    outs = [
        page.METHOD.fast(q, k, v, page.Config(block=8, sample=6, exact_below=8, seed=s), Call())[0]
        for s in (0, 0, 1)
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


@pytest.mark.parametrize("n", [8, 15])
def test_exact_below_is_exact(n):
    """Twice exact_below less one is cut in halves, each of them exact, and the rectangle has too few queries."""
    q, k, v = drawn(n)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for path in (page.METHOD.fast, page.METHOD.reference):
        assert_close(path(q, k, v, CFG, Call())[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 5, 20, 33])
def test_the_last_queries_of_a_prompt(queries):
    """After stored keys: fewer than exact_below read everything, more are hashed; padding stays out of the order."""
    q, k, v = drawn(50)
    q = q[:, :, -queries:]
    mask = torch.ones(2, 1, 50, dtype=torch.bool)
    mask[1, 0, 3:9] = False
    for call in (Call(), Call(key_mask=mask)):
        out, wanted = (path(q, k, v, CFG, call)[0] for path in (page.METHOD.fast, page.METHOD.reference))
        assert_close(out, wanted, rtol=0, atol=1e-12)
    if queries == 5:
        seen = torch.arange(50) <= torch.arange(45, 50)[:, None]
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
        assert_close(page.METHOD.fast(q, k, v, CFG, Call())[0], wanted, rtol=0, atol=1e-12)


def test_heads_one_after_the_other_are_heads_together(monkeypatch):
    """Long texts are hashed one KV head at a time, which changes nothing."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 50, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    together = page.METHOD.fast(q, k, v, CFG, Call())[0]
    monkeypatch.setattr(buckets, "TOGETHER", 1)
    assert_close(page.METHOD.fast(q, k, v, CFG, Call())[0], together, rtol=0, atol=1e-12)
    assert_close(page.METHOD.reference(q, k, v, CFG, Call())[0], together, rtol=0, atol=1e-12)
