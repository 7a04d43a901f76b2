"""HiP: the search against the released code's, what is always read, what is left dense."""

import pytest
import torch

from regard.core.call import Call
from regard.methods.mechanisms.sparse import hip_attention as page


def drawn(n, heads=2, width=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, n, width, generator=g, dtype=torch.float64) for _ in range(3)]


def test_keys_read_are_counted():
    """One query block far from the start reads sinks, top_k keys and its window, each once."""
    q, k, v = drawn(400)
    cfg = page.Config(block_q=8, block_k=2, top_k=32, sinks=4, local=16)
    _, _, aux = page.METHOD.fast(q, k, v, cfg, Call())
    blocks = aux["blocks"]
    read = blocks.map(200)
    assert torch.equal(read.sum(-1), blocks.counts())  # none twice
    last = read[:, :, -1]
    assert bool(last[..., :2].all())
    assert bool(last[..., (392 - 15) // 2 :].all())
    assert bool((last[..., 2 : (392 - 15) // 2].sum(-1) == 16).all())


@pytest.mark.parametrize("dense", [1, 9, 40])
@pytest.mark.parametrize("before", [0, 24])
def test_the_last_queries_are_dense(dense, before):
    q, k, v = drawn(93)
    cfg = page.Config(block_q=8, block_k=2, top_k=8, sinks=2, local=4, dense_last=dense)
    mask = torch.ones(2, 1, 93, dtype=torch.bool)
    mask[1, 0, :5] = False
    for call in (Call(), Call(key_mask=mask)):
        out, wanted = (
            path(q[:, :, before:], k, v, cfg, call)[0] for path in (page.METHOD.fast, page.METHOD.reference)
        )
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


def test_a_segment_ends_where_the_next_begins():
    """Whatever the count, and the blocks to search, the search finds as many blocks as asked, in the range."""
    g = torch.Generator().manual_seed(0)
    for width in (5, 6, 7, 13, 31, 50):
        for top_k in (1, 2, 3, 5):
            q, k = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (3, width + 4))
            cfg = page.Config(block_q=1, block_k=1, top_k=top_k, stride=1)
            found = page.searched(q, k, 2, 2 + width, cfg)
            assert len(set(found)) == len(found) == min(top_k, width)
            assert min(found) >= 2 and max(found) < 2 + width


@pytest.mark.parametrize(
    ("seed", "keys", "block_k", "top_k", "wanted"),
    [
        (0, 64, 2, 16, [0, 13, 18, 19, 23, 26, 27, 28]),
        (1, 64, 1, 4, [20, 22, 24, 32]),
        (2, 128, 2, 16, [0, 1, 2, 16, 20, 23, 30, 31]),
    ],
)
def test_the_released_search_finds_the_same(seed, keys, block_k, top_k, wanted):
    """Blocks that the released v1.1 search gave on these draws, each query twice since it asks every second one."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(4, 8, generator=g), torch.randn(keys, 8, generator=g)
    cfg = page.Config(block_q=4, block_k=block_k, top_k=top_k)
    assert page.searched(q, k, 0, keys // block_k, cfg) == wanted


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_absent_queries_ask_nothing(stride):
    """A block with one query is searched by that query alone, whatever lies beside it."""
    q, k, v = drawn(65)
    cfg = page.Config(block_q=8, block_k=1, top_k=3, sinks=0, local=1, stride=stride)
    alone = page.METHOD.fast(q[:, :, -1:], k, v, cfg, Call())[0]
    torch.testing.assert_close(
        alone, page.METHOD.fast(q, k, v, cfg, Call())[0][:, :, -1:], rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        alone, page.METHOD.reference(q, k, v, cfg, Call())[0][:, :, -1:], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("hidden", range(1, 9))
def test_padding_asks_nothing(hidden):
    """However many queries the last block has, they alone ask."""
    q, k, v = drawn(65)
    cfg = page.Config(block_q=8, block_k=1, top_k=3, sinks=0, local=1)
    mask = torch.ones(2, 1, 65, dtype=torch.bool)
    mask[0, 0, 65 - hidden :], mask[1, 0, :hidden] = False, False
    out, wanted = (
        path(q, k, v, cfg, Call(key_mask=mask))[0] for path in (page.METHOD.fast, page.METHOD.reference)
    )
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
