"""Attention over lists of blocks: against dense attention, its gradients, and faults planted in what chooses blocks."""

from dataclasses import replace

import pytest
import torch

from regard import attend, catalog
from regard.core.mask import causal, window
from regard.ops import explicit
from regard.ops.blocks import Blocks, block_attention, blocks_of, captured_mass, kept_share, top_blocks
from regard.ops.blocks import schedule as schedules
from regard.testing.mechanism import examine

# rows, heads, KV heads, queries, keys, block of queries, block of keys, causal, widths of keys and values
SHAPES = [
    (2, 4, 2, 13, 13, 4, 4, True, 8, 8),
    (2, 4, 1, 13, 20, 4, 2, True, 8, 6),
    (1, 2, 2, 7, 30, 3, 5, False, 4, 6),
    (2, 2, 2, 64, 64, 16, 8, True, 8, 8),
    (1, 1, 1, 1, 9, 4, 4, True, 8, 8),
]


def drawn(shape, wide, seed=0):
    b, h, g, n, m, bq, bk, _, d, e = shape
    torch.manual_seed(seed)
    q, k, v = (torch.randn(b, heads, t, w, dtype=torch.float64, requires_grad=True)
               for heads, t, w in ((h, n, d), (g, m, d), (g, m, e)))  # fmt: skip
    chosen = torch.rand(b if wide else 1, h if wide else 1, -(-n // bq), -(-m // bk)) < 0.5
    return (q, k, v), chosen, torch.randint(0, m + 1, (b,))


def by_hand(qkv, chosen, length, shape):
    """(out, lse, which rows see anything) through a dense mask."""
    b, h, g, n, m, bq, bk, is_causal = shape[:8]
    q, k, v = qkv
    seen = chosen.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :n, :m]
    seen = seen & (torch.arange(m) < length[:, None])[:, None, None]
    if is_causal:
        seen = seen & (torch.arange(m) <= torch.arange(n)[:, None] + m - n)
    s = (q @ k.repeat_interleave(h // g, 1).mT * 0.4).masked_fill(~seen, -torch.inf)
    some = seen.any(-1).expand(b, h, n)
    lse = torch.where(some, s.masked_fill(~some[..., None], 0).logsumexp(-1), 0)
    weights = torch.where(seen, (s.masked_fill(~some[..., None], 0) - lse[..., None]).exp(), 0)
    return weights @ v.repeat_interleave(h // g, 1), lse, some


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_dense_attention_with_the_mask_of_the_list(shape, wide):
    qkv, chosen, length = drawn(shape, wide)
    blocks = Blocks.of_map(chosen, shape[5], shape[6])
    assert torch.equal(blocks.map(chosen.shape[-1]), chosen)
    start = shape[4] - shape[3] if shape[7] else 0
    out, lse = block_attention(*qkv, blocks, scale=0.4, causal=shape[7], start=start, length=length)
    wanted, sums, some = by_hand(qkv, chosen, length, shape)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, torch.where(some, sums, -torch.inf), atol=1e-12, rtol=0)
    by, to = torch.randn_like(out), torch.randn_like(lse)
    ours = torch.autograd.grad((out * by).sum() + (lse.masked_fill(~some, 0) * to).sum(), qkv)
    theirs = torch.autograd.grad((wanted * by).sum() + (sums * to).sum(), qkv)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_blocks_are_sdpa(dtype):
    q, k, v = torch.randn(3, 1, 4, 257, 32).to(dtype).unbind()
    blocks = Blocks.of_map(torch.ones(1, 1, 5, 5, dtype=torch.bool), 64, 64)
    out, _ = block_attention(q, k, v, blocks, scale=32**-0.5, causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    assert (out - wanted).abs().max() <= bound


@pytest.mark.parametrize("n", [4_095, 4_096, 4_097])
def test_long_windows_are_dense(n):
    """Blocks against explicit weights on the last queries, at lengths around a border of blocks."""
    q, k, v = torch.randn(3, 1, 2, n, 16, dtype=torch.float64).unbind()
    out = attend(q, k, v, "softmax", mask=catalog.method("sinks", sinks=3, window=200)).out
    mask = catalog.as_mask(catalog.method("sinks", sinks=3, window=200)).dense(70, n)
    wanted = explicit(q[:, :, -70:], k, v, scale=0.25, mask=mask)
    torch.testing.assert_close(out[:, :, -70:], wanted, atol=1e-12, rtol=0)


def test_a_long_mask_is_cut_without_asking_every_pair(monkeypatch):
    asked = []
    rule = window(256).rule
    mask = causal() & window(256)
    counted = replace(mask.parts[1], rule=lambda at, **s: asked.append(at.k.numel()) or rule(at, **s))
    counted.rule.tiles, counted.rule.maker = rule.tiles, rule.maker
    blocks = blocks_of(replace(mask, parts=(mask.parts[0], counted)), 8_192, 8_192)
    assert blocks.counts().max() == 3 and len(blocks.tiles) == 2
    assert sum(asked) < 8_192 * 64


def test_what_hides_little_is_dense():
    assert blocks_of(~(causal() & window(3)), 1_024, 1_024) is None


def test_kept_and_captured():
    q, k = torch.randn(2, 1, 2, 64, 8, dtype=torch.float64).unbind()
    blocks = Blocks.of_map(torch.eye(8, dtype=torch.bool)[None, None], 8, 8)
    _, lse = block_attention(q, k, k, blocks, scale=8**-0.5, causal=True)
    assert kept_share(blocks, 64, 64).item() == pytest.approx(8 * 8 / sum(range(8, 65, 8)))
    s = (q @ k.mT * 8**-0.5).masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    own = torch.eye(8, dtype=torch.bool).repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(captured_mass(q, k, lse), (s * own).sum(-1).mean(-1))


def test_block_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"block_k divides block_q.*block_q=64, block_k=48"):
        catalog.method("block_topk", block_k=48)
    with pytest.raises(ValueError, match="dense_last >= 0"):
        catalog.method("block_topk", dense_last=-1)


# faults, planted one at a time in a page that chooses blocks: the law that finds each

PAGE = catalog.get("block_topk")
SMALL = {"top_k": 1, "block_q": 4, "block_k": 4}


def looks_ahead(at, cfg, call):
    """Blocks are judged by the keys of the next one."""
    k = torch.roll(at.k, -cfg.block_k, dims=2)
    return PAGE.choose(replace(at, k=k), cfg, call)


def drops_the_ragged_block(at, cfg, call):
    chosen = PAGE.choose(at, cfg, call)
    if at.k.shape[2] % cfg.block_k:
        chosen[..., -1] = False
    return chosen


def list_of_another_head(at, cfg, call):
    return PAGE.choose(at, cfg, call).roll(1, 1)


def forgets_padding(at, cfg, call):
    return PAGE.choose(replace(at, q_there=None, k_there=None), cfg, call)


def one_block_too_few(at, cfg, call):
    own = torch.eye(at.columns(cfg.block_k), dtype=torch.bool)[: at.rows(cfg.block_q)]
    return top_blocks(
        PAGE.choose(at, cfg, call).float() + own, at.allowed(cfg.block_q, cfg.block_k), cfg.top_k
    )


FAULTS = {
    looks_ahead: {"fast_equals_reference", "blocks_causal"},
    drops_the_ragged_block: {"fast_equals_reference", "neutral", "blocks_all"},
    list_of_another_head: {"fast_equals_reference", "blocks_heads"},
    forgets_padding: {"fast_equals_reference"},
    one_block_too_few: {"fast_equals_reference"},
}


def broken(page):
    report = examine(page, settings=[SMALL])
    return {law.partition(",")[0] for law, found in report.items() if found.startswith("broken")}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_choice_is_found(fault):
    page = replace(PAGE, choose=fault, fast=None, exempt={"compiles": "not asked here"})
    assert FAULTS[fault] <= broken(page)


@pytest.mark.parametrize("fault", [looks_ahead, list_of_another_head], ids=lambda fault: fault.__name__)
def test_a_fault_that_both_paths_share_is_found(fault):
    page = replace(PAGE, choose=fault, fast=None, exempt={"compiles": "not asked here"})
    same = replace(page, reference=lambda *args: page.fast(*args)[:2])
    assert (FAULTS[fault] - {"fast_equals_reference"}) & broken(same)


def test_a_fault_in_the_schedule_is_found(monkeypatch):
    """The mask on the diagonal, one key too far."""
    honest = schedules.mask_of

    def shifted(code, blocks):
        mask = honest(code, blocks)
        return None if mask is None else mask | mask.roll(1, -1)

    monkeypatch.setattr(schedules, "mask_of", shifted)
    assert {"fast_equals_reference", "influence", "blocks_all"} <= broken(
        replace(PAGE, exempt={"compiles": "-"})
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lists", ["window", "every_other", "backwards", "downwards", "of_heads", "blind"])
def test_keys_that_lie_beside_each_other_are_read_where_they_lie(lists, dtype, monkeypatch):
    """Runs of rows whose blocks move on evenly, against the same lists gathered: outputs, sums, gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 41, 8, dtype=torch.float64).to(dtype).requires_grad_() for h in (4, 2, 2))
    index = torch.arange(11)[:, None] + torch.tensor([-2, -1, 0])
    index = {
        "window": index, "every_other": 2 * index, "backwards": index.flip(-1), "downwards": index.flip(0),
        "of_heads": torch.stack([index - h for h in range(4)]), "blind": index[:, 2:],
    }[lists]  # fmt: skip
    index = index.masked_fill((index < 0) | (index > 10), -1)
    index = index[(None,) * (4 - index.dim())]
    tiles = torch.ones(1, 4, 4, dtype=torch.bool).index_fill(1, torch.tensor([1]), False)
    masks = (torch.zeros_like(index), tiles) if lists == "blind" else (None, None)
    blocks = Blocks(index, 4, 4, *masks)

    causal = lists not in ("every_other", "downwards")

    def answers():
        out, lse = block_attention(q, k, v, blocks, scale=0.4, causal=causal)
        total = out.double().square().sum() + lse.double().nan_to_num(neginf=0.0).sum()
        return out.detach(), lse.detach(), *torch.autograd.grad(total, (q, k, v))

    in_place = answers()
    if lists == "blind":
        assert not in_place[0][:, :, 1::4].any() and (in_place[1][:, :, 1::4] == -torch.inf).all()
    monkeypatch.setattr(schedules, "MOST_RUNS", 0)
    for one, other in zip(in_place, answers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-2)
    with monkeypatch.context() as m:
        m.setattr(schedules, "MOST_RUNS", 256)
        found = schedules.schedule(blocks, plan_of(q, k, causal))
    assert lists == "downwards" or any(work.step is not None and len(work.rows) > 1 for work in found)


@pytest.mark.parametrize("n", [8, 16])
def test_slices_of_longer_texts(n):
    """Keys of two heads that do not lie behind each other in memory."""
    q, k, v = (torch.randn(2, 2, n + 3, 8, dtype=torch.float64)[:, :, :n] for _ in range(3))
    blocks = Blocks.of_map(torch.ones(1, 1, n // 8, n // 8, dtype=torch.bool).tril(), 8, 8)
    found = block_attention(q, k, v, blocks, scale=0.4, causal=True)
    whole = block_attention(*(x.contiguous() for x in (q, k, v)), blocks, scale=0.4, causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(found[0], wanted)


def plan_of(q, k, causal):
    start, length = torch.zeros(2, dtype=torch.long), torch.full((2,), k.shape[2])
    return schedules.Plan(2, q.shape[1], k.shape[1], -(-k.shape[2] // 4), start, length, causal)
