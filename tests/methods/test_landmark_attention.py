"""What the battery leaves out: the published grouped softmax, both ways of fetching, long texts."""

from unittest import mock

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core.call import Call
from regard.methods.mechanisms.sparse import landmark_attention as module
from regard.ops import closed

PAGE = catalog.get("landmark_attention")
PATHS = (PAGE.reference, PAGE.fast)


def drawn(n: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, n, d, generator=g).double() for d in (4, 4, 5)]


def by_buckets(q, k, v, block):
    """The published form: every score belongs to a bucket, each bucket has a softmax, and they are multiplied."""
    n = q.shape[2]
    t = torch.arange(n)
    is_landmark = t % (block + 1) == block
    groups = is_landmark.long().cumsum(0)  # a block's landmark begins the next group
    section = groups - is_landmark.long()
    rows = []
    for i in range(n):
        s = (k[:, :, : i + 1] @ q[:, :, i, :, None])[..., 0] / q.shape[3] ** 0.5
        own, marks = section[: i + 1] == section[i], is_landmark[: i + 1]
        bucket = torch.where(own | marks, n, section[: i + 1])
        s = s.masked_fill(own & marks, -torch.inf)  # a query's own landmark is hidden
        e = (s - s.amax(-1, keepdim=True)).exp()
        total = torch.zeros(*s.shape[:2], n + 1).double().index_add(2, bucket, e)
        probability = e / total[:, :, bucket]
        gate = torch.zeros(*s.shape[:2], n + 1).double().index_add(2, section[: i + 1], probability * marks)
        weight = torch.where(own, probability, probability * gate[:, :, section[: i + 1]])
        rows.append(((weight * ~marks)[..., None] * v[:, :, : i + 1]).sum(2))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("block", [1, 3, 7, 50])
def test_it_is_the_published_grouped_softmax(block):
    qkv = drawn(70)
    for path in PATHS:
        out = path(*qkv, PAGE.configure(block=block), Call())[0]
        assert_close(out, by_buckets(*qkv, block), rtol=1e-9, atol=1e-9)


def test_a_landmark_has_no_value():
    q, k, v = drawn(30)
    for path in PATHS:
        out = path(q, k, v, PAGE.configure(block=4), Call())[0]
        other = v.clone()
        other[:, :, 4::5] = 99
        assert_close(path(q, k, other, PAGE.configure(block=4), Call())[0], out, rtol=0, atol=0)
        other[:, :, 3] += 1
        assert not torch.equal(path(q, k, other, PAGE.configure(block=4), Call())[0], out)


@pytest.mark.parametrize("fetch", [0, 10**6])
@pytest.mark.parametrize("top_k", [1, 3, 40])
def test_fetching_is_reading_where_keys_lie(fetch, top_k):
    """Both ways of the fast path on the same call, gradients too, a padded row among them."""
    cfg, there = PAGE.configure(block=3, top_k=top_k), torch.ones(2, 1, 50, dtype=torch.bool)
    there[1, :, :7] = there[1, :, 30:33] = False
    sides = []
    for path in PATHS:
        qkv = [t.requires_grad_() for t in drawn(50)]
        with mock.patch.object(module, "FETCH", fetch):
            out = path(*qkv, cfg, Call(key_mask=there))[0]
        sides.append((out, torch.autograd.grad(out.sin().sum(), qkv)))
    assert_close(*sides, rtol=1e-9, atol=1e-9)


def test_equal_landmarks_are_chosen_from_the_left():
    q, k, v = drawn(21)
    k[:, :, 3::4] = k[:, :, 3:4]
    for path in PATHS:
        out = path(q, k, v, PAGE.configure(block=3, top_k=2), Call())[0]
        other = v.clone()
        other[:, :, 8:20] = 50.0  # sections 2 to 4, of which the last query reads none
        assert_close(path(q, k, other, PAGE.configure(block=3, top_k=2), Call())[0][:, :, 20], out[:, :, 20])


def test_what_a_backward_pass_computes_again_is_the_same():
    for top_k in (None, 2):
        grads = []
        for kept in (closed.KEPT, 0):
            qkv = [t.requires_grad_() for t in drawn(60)]
            with mock.patch.object(closed, "KEPT", kept), mock.patch.object(module, "BLOCK", 4096):
                out = PAGE.fast(*qkv, PAGE.configure(block=3, top_k=top_k), Call())[0]
            grads.append(torch.autograd.grad(out.sin().sum(), qkv))
        assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="block >= 1"):
        PAGE.configure(block=0)
    with pytest.raises(ValueError, match="top_k >= 1"):
        PAGE.configure(top_k=0)
