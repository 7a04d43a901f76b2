"""Attention residuals as a page: the paper's sums by a plain loop, sizes of the state, values that are the keys."""

import pytest
import torch

from regard.core.call import Call
from regard.methods.mechanisms.depth import attention_residuals as page

D = 5


def outputs(n=8, batch=3, seed=0):
    return torch.randn(batch, 1, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blocks_read(v, block):
    """[v_0, finished sums of `block` outputs, the sum so far] of v [n, D]: the list that the paper's equation names."""
    later = [part.sum(0) for part in v[1:].split(block)] if len(v) > 1 else []
    return torch.stack([v[0], *later])


def mixture(w, read, eps=1e-5):
    """Σ_i softmax_i(w · RMSNorm(read_i)) read_i, number by number."""
    scores = [float((w * x).sum() / ((x * x).mean() + eps).sqrt()) for x in read]
    top = max(scores)
    weights = [torch.tensor(s - top, dtype=torch.float64).exp() for s in scores]
    return sum(a * x for a, x in zip(weights, read, strict=True)) / sum(weights)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 20])
def test_a_read_is_the_papers_sum(block, path):
    v, w = outputs(), outputs(seed=1)
    out, state = getattr(page.METHOD, path)(w, v, v, page.Config(block=block), Call())
    for b in range(3):
        for i in range(8):
            wanted = mixture(w[b, 0, i], blocks_read(v[b, 0, : i + 1], block))
            torch.testing.assert_close(out[b, 0, i], wanted)
    torch.testing.assert_close(state[0][:, 0], torch.stack([blocks_read(row[0], block) for row in v]))


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_scores_far_below_zero_weigh_only_what_is_there(path):
    """Entries that have not begun have no score: one of 0 among scores of -2000 would take all."""
    v = outputs().abs()
    w = torch.full_like(v, -1000.0)
    out, _ = getattr(page.METHOD, path)(w, v, v, page.Config(block=3), Call())
    for i in range(8):
        torch.testing.assert_close(out[0, 0, i], mixture(w[0, 0, i], blocks_read(v[0, 0, : i + 1], 3)))


@pytest.mark.parametrize("block", [1, 2, 3])
def test_zero_queries_take_the_mean_exactly(block):
    v = outputs(n=7)
    out, _ = page.METHOD.fast(torch.zeros_like(v), v, v, page.Config(block=block), Call())
    wanted = torch.stack(
        [torch.stack([blocks_read(row[0, : i + 1], block).mean(0) for i in range(7)]) for row in v]
    )
    torch.testing.assert_close(out[:, 0], wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_state_is_the_sums_that_are_read(block, path):
    for n in range(1, 10):
        v = outputs(n)
        _, (keys, values, there) = getattr(page.METHOD, path)(v, v, v, page.Config(block=block), Call())
        held = 1 + -(-(n - 1) // block)
        assert keys.shape == values.shape == (3, 1, held, D) and there.shape == (3, 1, n)
        assert page.entries(n, page.Config(block=block)) == held


@pytest.mark.parametrize("block", [1, 3])
def test_outputs_that_are_keys_and_values_are_held_once(block):
    """The same tensor twice is summed once, also over reads one by one, and gives what two tensors give."""
    cfg, w = page.Config(block=block), outputs(seed=1)
    results = []
    for copied in (False, True):
        v, state, rows = outputs().requires_grad_(), None, []
        for i in range(8):
            k = v[:, :, i : i + 1]
            source = k.clone() if copied else k
            out, state = page.METHOD.fast(w[:, :, i : i + 1], k, source, cfg, Call(initial_state=state))
            rows.append(out)
        assert (state[0] is state[1]) != copied
        out = torch.cat(rows, 2)
        results.append((out.detach(), *torch.autograd.grad(out.sin().sum(), v)))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0][0], page.METHOD.reference(w, v, v, cfg, Call())[0].detach())


def test_a_large_output_does_not_win_by_its_size():
    v, w = outputs(n=4), outputs(seed=1)[:, :, -1:]
    big = v.clone()
    big[:, :, 1] *= 1000
    ones = torch.eye(4, dtype=torch.float64).expand(3, 1, 4, 4)
    weights = [page.METHOD.fast(w, k, ones, page.Config(eps=1e-12), Call())[0] for k in (v, big)]
    torch.testing.assert_close(weights[1], weights[0])


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match=r"block >= 1 \(block=0\)"):
        page.Config(block=0)
    with pytest.raises(ValueError, match=r"eps > 0 \(eps=0.0\)"):
        page.Config(eps=0.0)
