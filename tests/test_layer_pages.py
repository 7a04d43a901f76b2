"""Mask pages and position pages in layers: the numbers of the same layer with the mask, or positions, given by hand."""

import pytest
import torch

import regard
from regard import catalog
from regard.core import Unsupported
from regard.core.mask import causal, window
from regard.core.roles import Roles
from regard.methods.positions.cca_concentric import image_roles
from regard.nn import Attention
from regard.ops.rotary import rotate
from regard.testing.zoo import build

WINDOW = catalog.method("window", window=3)


def layer(mechanism="softmax", pattern="causal_self", **options) -> Attention:
    torch.manual_seed(0)
    return Attention(16, 2, mechanism, pattern, **options).double()


def tokens(n=9, batch=2) -> torch.Tensor:
    return torch.randn(batch, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask", [WINDOW, window(3), causal() & window(3)], ids=str)
@pytest.mark.parametrize("mechanism", ["softmax", "lean_attention"])
def test_a_layer_with_a_mask_of_its_own(mechanism, mask):
    x = tokens()
    by_hand = window(3).dense(9)
    out = layer(mechanism, mask=mask)(x)[0]
    torch.testing.assert_close(out, layer(mechanism)(x, mask=by_hand)[0])
    assert not torch.allclose(out, layer(mechanism)(x)[0])


def test_by_name_beside_padding_and_token_by_token():
    x, there = tokens(), torch.ones(2, 9, dtype=torch.bool)
    there[0, :2] = False
    masked = layer(mask=WINDOW)
    out, _ = masked(x, mask=there)
    state, rows = None, []
    for t in range(9):
        row, state = masked(x[:, t : t + 1], mask=there[:, t : t + 1], initial_state=state)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 1)[:, 2:], out[:, 2:])
    torch.testing.assert_close(layer(mask="causal")(x)[0], layer()(x)[0])


def test_masks_of_roles_read_the_roles_of_a_call():
    roles = Roles(document=[0, 0, 0, 0, 1, 1, 1, 1, 1])
    whole = layer(mask="document", rope_theta=0.0)(tokens(), roles=roles)[0]
    part = layer(rope_theta=0.0)(tokens()[:, 4:])[0]
    torch.testing.assert_close(whole[:, 4:], part)


def test_what_a_mask_cannot_be_given_to():
    with pytest.raises(Unsupported, match="a mask of pairs"):
        layer("linear_attention", mask=WINDOW)(tokens())
    with pytest.raises(KeyError, match="near names: window"):
        layer(mask="windo")
    with pytest.raises(ValueError, match="a mask is a mask page"):
        layer(mask="h2o")
    with pytest.raises(ValueError, match="heads of the mask are the heads of the layer"):
        layer(mask=catalog.method("s2_attention", heads=4, kv_heads=4, stride=2, local=1, block=2))(tokens())


def test_a_position_page_sets_rotary_positions_and_its_mask():
    """A patch sees its whole ring, later patches too: the mask says what is causal, so the pattern is self."""
    roles = image_roles(2, 3, before=1, after=2)
    method = catalog.method("cca_concentric", height=2, width=3)
    x, made = tokens(), layer(pattern="self", positions=method)
    out = made(x, roles=roles)[0]
    at = method.page.positions(roles, method.config)[None].expand(2, -1)
    assert at.tolist()[0] != list(range(9))
    q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (made.q_proj, made.k_proj, made.v_proj))
    q, k = rotate(q, at, 1e4), rotate(k, at, 1e4)
    seen = method.page.build(method.config).dense(9, roles=roles)
    assert bool((seen & ~causal().dense(9)).any())
    s = (q @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(out, made.o_proj((s.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    with pytest.raises(ValueError, match="reads roles"):
        made(x)
    with pytest.raises(ValueError, match="is a position page"):
        layer(positions="window")


def masked_forward(family, mask):
    model, inputs = build(family)
    with regard.attach(model, mask):
        model(**inputs)


def test_masks_that_look_ahead_are_not_hidden_by_causality():
    """prefix AND causal is causal: a silent no-op, so it is refused, and asked for as self it is the prefix mask."""
    prefix = catalog.method("prefix", prefix=4)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind()
    for ask in (
        lambda: regard.attend(q, k, v, "softmax", mask=prefix),
        lambda: layer(mask=prefix),
        lambda: layer(positions="cca_concentric"),
        lambda: regard.attend(q, k, v, "softmax", mask=catalog.method("window", window=3, ahead=1)),
    ):
        with pytest.raises(Unsupported, match="lets tokens see later ones"):
            ask()
    assert regard.attend(
        q, k, v, "softmax", "self", mask=catalog.method("window", window=3, ahead=1)
    ).out.shape
