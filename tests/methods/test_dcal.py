"""Dual cross-attention: who is whose second image, what hides it, rollouts and the places that ask again."""

import pytest
import torch
from torch.testing import assert_close

import regard
from regard import catalog
from regard.core.call import Call
from regard.methods.mechanisms.dense import dcal as page
from regard.nn import Attention, RegardConfig, RegardForMaskedLM
from regard.ops import softmax_attention
from regard.testing.case import Case

N = 5
PAIRS, ALONE = page.Config(), page.Config(partner=0)
each_path = pytest.mark.parametrize("path", [page.reference, page.fast], ids=["reference", "fast"])


def drawn(images=3, heads=4, groups=2, n=N, m=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (images, heads, n, 3), (images, groups, m, 3), (images, groups, m, 2)
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)


@each_path
@pytest.mark.parametrize("partner", [1, 2, -1, 4])
@pytest.mark.parametrize("pattern", ["self", "cross"])
def test_the_second_image_is_so_many_rows_further(path, partner, pattern):
    q, k, v = drawn(n=N if pattern == "self" else 2)
    out = path(q, k, v, page.Config(partner=partner), Call(pattern))[0]
    for b in range(3):
        second = (b + partner) % 3
        keys, values = (torch.cat([t[b], t[second]], 1)[None] for t in (k, v))
        assert_close(out[b, None], softmax_attention(q[b, None], keys, values, scale=3**-0.5))


@each_path
def test_a_second_image_that_is_hidden_leaves_self_attention(path):
    q, k, v = drawn(images=2)
    seen = torch.tensor([True, False]).view(2, 1, 1).expand(2, 1, N)
    out = path(q, k, v, PAIRS, Call("self", key_mask=seen))[0]
    own = softmax_attention(q, k, v, scale=3**-0.5)
    assert_close(out[0], own[0], rtol=0, atol=1e-12)
    assert (path(q, k, v, PAIRS, Call("self"))[0][0] - own[0]).abs().max() > 0.1
    # of the other row nothing is there, and it does not read the first one
    assert not out[1].any()


@each_path
def test_a_key_is_hidden_from_both_images_that_would_read_it(path):
    q, k, v = drawn()
    seen = torch.ones(3, 4, N, dtype=torch.bool)
    seen[1, 2, 3] = False
    call = Call("self", key_mask=seen)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    bad = v.clone()
    bad[1, 2, 3] = torch.nan
    out, free = path(q, k, bad, PAIRS, call)[0], path(q, k, v, PAIRS, Call("self"))[0]
    for b in range(3):
        second = (b + 1) % 3
        keys, values, mask = (torch.cat([t[b], t[second]], 1)[None] for t in (k, v, seen))
        assert_close(
            out[b, None], softmax_attention(q[b, None], keys, values, scale=3**-0.5, mask=mask[:, :, None])
        )
    differs = (out - free).abs().amax((2, 3)) > 1e-9
    # image 1 reads itself and 2, image 0 reads 1, image 2 reads 0
    assert differs.nonzero().tolist() == [[0, 2], [1, 2]]


@each_path
def test_without_a_second_image_rows_do_not_touch(path):
    q, k, v = drawn()
    for cfg in (ALONE, page.Config(partner=3)):
        assert_close(path(q, k, v, cfg, Call("self"))[0], softmax_attention(q, k, v, scale=3**-0.5))
    one = path(*(t[:1] for t in (q, k, v)), PAIRS, Call("self"))[0]
    assert_close(one, path(q, k, v, ALONE, Call("self"))[0][:1])


def test_texts_of_one_length_that_are_packed_are_no_pairs():
    """Asked as tensors, in a layer and in a model; in a batch they are."""
    cuts = torch.tensor([0, 3, 5, 8])
    q, k, v = drawn(images=1, n=8, m=8)
    out = regard.attend(q, k, v, "dcal", "self", cu_seqlens=cuts).out
    assert_close(out, regard.attend(q, k, v, "softmax", "self", cu_seqlens=cuts).out)
    torch.manual_seed(0)
    layer = Attention(8, 2, "dcal", "self")
    x = torch.randn(1, 8, 8)
    parts = x[:, :3], x[:, 5:]
    assert_close(layer(x, cu_seqlens=cuts)[0][:, 5:], layer(parts[1])[0])
    assert (layer(torch.cat(parts))[0][1:] - layer(parts[1])[0]).abs().max() > 1e-3
    config = RegardConfig(vocab_size=32, hidden_size=16, mechanisms="dcal", initializer_range=0.3)
    model, ids = RegardForMaskedLM(config).eval(), torch.arange(8)[None]
    at = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    assert_close(model(ids, position_ids=at).logits[:, 5:], model(ids[:, 5:]).logits)


def test_places_that_ask_again_are_rows_of_self_attention():
    q, k, v = drawn()
    weights = (q @ k.repeat_interleave(2, 1).mT * 3**-0.5).softmax(-1)
    places = page.local_places(page.rollout([weights, weights]), 0.5)
    assert places.shape == (3, 3)
    asked = q.take_along_dim(places[:, None, :, None], 2)
    out = page.fast(asked, k, v, ALONE, Call("cross"))[0]
    whole = page.fast(q, k, v, ALONE, Call("self"))[0]
    assert_close(out, whole.take_along_dim(places[:, None, :, None], 2))


def test_rollout_is_the_product_of_mean_heads_and_residuals_last_layer_first():
    g = torch.Generator().manual_seed(0)
    layers = [torch.rand(2, 3, 4, 4, generator=g, dtype=torch.float64).softmax(-1) for _ in range(3)]
    wanted = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    for a in reversed(layers):
        mean = (a[:, 0] + a[:, 1] + a[:, 2]) / 3
        wanted = wanted @ (0.5 * mean + 0.5 * torch.eye(4, dtype=torch.float64))
    sums = page.rollout(layers)
    assert_close(sums, wanted)
    assert_close(sums.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="one layer or more"):
        page.rollout([])


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.01, [0, 3]), (0.25, [0, 3]), (0.26, [0, 1, 3]), (1, [0, 1, 2, 3, 4])]
)
def test_the_class_token_and_its_share_of_places_in_order(share, wanted):
    """The class token's own share, however large, is no place; of equal ones the first."""
    sums = torch.zeros(2, 5, 5)
    sums[:, 0] = torch.tensor([9.0, 0.2, 0.1, 0.4, 0.2])
    sums[:, 1:] = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    assert page.local_places(sums, share).tolist() == [wanted] * 2
    with pytest.raises(ValueError, match="0 < share <= 1"):
        page.local_places(sums, 0)


def test_losses_under_learned_variances_weigh_least_where_the_variance_is_the_loss():
    losses = torch.tensor([0.5, 3.0], dtype=torch.float64)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(page.joined(losses, weights), weights)
    assert_close(slope, (1 - losses) / 2)
    best = losses.log().requires_grad_()
    (slope,) = torch.autograd.grad(page.joined(losses, best), best)
    assert_close(slope, torch.zeros_like(losses))
    assert page.joined(losses, best).item() == pytest.approx((2 + sum(losses.log().tolist())) / 2)


def test_questions_of_laws_are_no_rows_of_one_batch():
    """Where each row reads another one, and nowhere else."""
    apart = {
        name: Case(catalog.get(name), catalog.get(name).config(), "self").keeps_rows_apart
        for name in ("dcal", "softmax")
    }
    assert apart == {"dcal": False, "softmax": True}
