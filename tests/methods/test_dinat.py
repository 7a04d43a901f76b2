"""DiNA against the rule of NATTEN's first kernels, table of offsets included; sub-grids; what fits into an image.

The rule is that of NATTEN 0.17.5 (csrc/include/natten/cpu/naive/natten_cpu_commons.h), the kernels of the paper.
"""

import pytest
import torch

from regard import attend
from regard.core.call import Call
from regard.core.roles import Roles
from regard.methods.mechanisms.grid import dinat as page

PATHS = [page.METHOD.reference, page.METHOD.fast]
each_path = pytest.mark.parametrize("path", PATHS, ids=["reference", "fast"])


def window_start(index, length, kernel, dilation):
    around, residue, place = kernel // 2, index % dilation, index // dilation
    padded = -(-length // dilation)
    padded -= 1 if residue >= dilation - (padded * dilation - length) else 0
    start = max(place - around, 0)
    if place + around >= padded:
        start += padded - place - around - 1
    return start * dilation + residue


def table_start(index, length, kernel, dilation):
    around = kernel // 2
    if dilation <= 1:
        start = around
        start += around - index if index < around else 0
        return start + (length - index - 1 - around if index + around >= length else 0)
    if index - around * dilation < 0:
        return kernel - 1 - index // dilation
    if index + around * dilation >= length:
        return (length - index - 1) // dilation
    return around


def drawn(sides, kernel, heads=2, groups=1, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n = sides[0] * sides[1]
    bias = draw(heads, 2 * kernel - 1, 2 * kernel - 1)
    return draw(2, heads, n, 3), draw(2, groups, n, 3), draw(2, groups, n, 2), {"bias": bias}


def by_rule(q, k, v, bias, sides, kernel, dilation):
    """Pixel by pixel, window and table by their starts."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    for y in range(sides[0]):
        for x in range(sides[1]):
            rows, columns = (
                [window_start(i, side, kernel, dilation) + j * dilation for j in range(kernel)]
                for i, side in zip((y, x), sides, strict=True)
            )
            near = [a * sides[1] + b for a in rows for b in columns]
            down, right = (
                table_start(i, side, kernel, dilation) for i, side in zip((y, x), sides, strict=True)
            )
            i = y * sides[1] + x
            s = (k[:, :, near] @ q[:, :, i, :, None])[..., 0] * q.shape[-1] ** -0.5
            s = s + bias[:, down : down + kernel, right : right + kernel].flatten(1)
            out[:, :, i] = (s.softmax(-1)[:, :, None] @ v[:, :, near])[:, :, 0]
    return out


@each_path
@pytest.mark.parametrize(
    ("sides", "kernel", "dilation"),
    [
        ((3, 3), 3, 1),
        ((7, 9), 3, 1),
        ((6, 7), 3, 2),
        ((9, 13), 3, 3),
        ((11, 10), 5, 2),
        ((8, 9), 7, 1),
        ((14, 17), 7, 2),
    ],
)
def test_is_nattens_rule(path, sides, kernel, dilation):
    q, k, v, params = drawn(sides, kernel)
    cfg, call = page.Config(kernel=kernel, dilation=dilation), Call("self", grid=sides, params=params)
    wanted = by_rule(q, k, v, params["bias"], sides, kernel, dilation)
    torch.testing.assert_close(path(q, k, v, cfg, call)[0], wanted, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_the_table_is_that_of_the_reference():
    """Of the bias, of every head by itself; grouped keys."""
    sides = (9, 8)
    q, k, v, params = drawn(sides, 3, heads=4, groups=2)
    grads = []
    for path in PATHS:
        bias = params["bias"].clone().requires_grad_()
        out = path(
            q, k, v, page.Config(kernel=3, dilation=2), Call("self", grid=sides, params={"bias": bias})
        )[0]
        grads.append(torch.autograd.grad(out.square().sum(), bias)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)
    assert (grads[0].flatten(1).abs().amax(1) > 0.1).all()


@each_path
@pytest.mark.parametrize("sides", [(6, 8), (9, 12)])
def test_is_na_on_every_sub_grid(path, sides):
    """Which is taken out by strides, and has the same table."""
    d = 3 if sides[0] == 9 else 2
    q, k, v, params = drawn(sides, 3)
    whole = path(q, k, v, page.Config(kernel=3, dilation=d), Call("self", grid=sides, params=params))[0]
    whole = whole.unflatten(2, sides)
    for y in range(d):
        for x in range(d):
            part = [t.unflatten(2, sides)[:, :, y::d, x::d] for t in (q, k, v)]
            call = Call("self", grid=tuple(part[0].shape[2:4]), params=params)
            out = path(*(t.flatten(2, 3) for t in part), page.Config(kernel=3), call)[0]
            torch.testing.assert_close(out, whole[:, :, y::d, x::d].flatten(2, 3), rtol=1e-12, atol=1e-12)


@each_path
@pytest.mark.parametrize("kernel", [4, 6])
def test_an_undilated_kernel_of_the_image_or_longer_is_full_attention_with_true_offsets(path, kernel):
    sides = (3, 4)
    q, k, v, params = drawn(sides, kernel)
    place = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    step = place[None] - place[:, None] + kernel - 1
    s = q @ k.mT * 3**-0.5 + params["bias"][:, step[..., 0], step[..., 1]]
    out = path(q, k, v, page.Config(kernel=kernel), Call("self", grid=sides, params=params))[0]
    torch.testing.assert_close(out, s.softmax(-1) @ v, rtol=1e-10, atol=1e-10)


def asked(sides, **settings):
    q, k, v, _ = drawn(sides, 1)
    return attend(q, k, v, "dinat", "self", roles=Roles.grid(*sides), bias=False, **settings).out


def test_a_dilated_kernel_fits_into_the_image():
    for sides in ((6, 9), (9, 6)):
        assert asked(sides, kernel=3, dilation=2).isfinite().all()
        with pytest.raises(ValueError, match=r"kernel·dilation <= side.*kernel=3, dilation=3"):
            asked(sides, kernel=3, dilation=3)
    # a pixel that reads itself alone does so at any dilation
    q, _, v, _ = drawn((4, 5), 1)
    assert torch.equal(asked((4, 5), kernel=1, dilation=9), v.expand(-1, q.shape[1], -1, -1))


@pytest.mark.parametrize("name", ["kernel", "dilation"])
def test_settings_begin_at_one(name):
    with pytest.raises(ValueError, match=f"{name} >= 1"):
        page.Config(**{name: 0})


def test_an_image_has_two_axes():
    q, k, v, params = drawn((4, 4), 3)
    for sides in ((16,), (1, 4, 4)):
        with pytest.raises(ValueError, match="the axes of its grids are y, x"):
            attend(q, k, v, "dinat", "self", roles=Roles.grid(*sides), params=params, kernel=3)
