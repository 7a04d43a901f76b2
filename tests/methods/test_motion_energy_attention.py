"""The graph between places by the formula of a symmetric one, and what the filters see."""

import math

import pytest
import torch
from torch.testing import assert_close

from regard.core.call import Call
from regard.methods.mechanisms.dense import motion_energy_attention as page

each_path = pytest.mark.parametrize("path", [page.reference, page.fast], ids=["reference", "fast"])


def drawn(n=7, d=4):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(2, 1, n, d, generator=g, dtype=torch.float64) for _ in range(3))


@each_path
def test_with_queries_as_keys_it_is_the_normalised_graph(path):
    q, _, v = drawn()
    s = 1 + 3 * math.pi * q[:, 0].mean((1, 2)).sigmoid()
    one = torch.nn.functional.normalize(q[:, 0], dim=-1)
    a = (s[:, None, None] * one @ one.mT).exp()
    # a factor of the graph cancels, as the largest weight does in the released code
    root = torch.diag_embed((a / a.amax()).sum(-1) ** -0.5)
    wanted = root @ (a / a.amax()) @ root @ v[:, 0]
    assert_close(path(q, q, v, page.Config(), Call("self"))[0][:, 0], wanted)


@each_path
def test_lengths_of_features_count_in_the_sharpness_alone(path):
    q, k, v = drawn()
    flat = page.Config(more=0.0)
    assert_close(path(3 * q, 0.2 * k, v, flat, Call("self")), path(q, k, v, flat, Call("self")))
    far = path(q + 1, q + 1, v, page.Config(), Call("self"))[0] - path(q + 1, q + 1, v, flat, Call("self"))[0]
    assert far.abs().max() > 1e-3


@each_path
def test_settings_of_zero_give_the_mean(path):
    q, k, v = drawn()
    out = path(q, k, v, page.Config(least=0.0, more=0.0), Call("self"))[0]
    assert_close(out, v.mean(2, keepdim=True).expand_as(v))


def grating(angle, f, phi, phase=0.0, side=15, frames=6):
    at = torch.arange(side, dtype=torch.float64) - side // 2
    u = math.cos(angle) * at + math.sin(angle) * at[:, None]
    t = torch.arange(frames, dtype=torch.float64)[:, None, None]
    return torch.cos(2 * math.pi * (f * u - phi * t) + phase)[None]


def bank():
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return angles, torch.full_like(angles, 0.2), torch.full_like(angles, 0.2)


@pytest.mark.parametrize("which", [1, 2, 5])
def test_the_unit_of_a_direction_sees_it_whatever_its_phase(which):
    units = bank()
    filters = page.space_time(*units)
    seen = torch.stack(
        [
            page.motion_energy(grating(units[0][which].item(), 0.2, 0.2, phase), *filters, stride=7)[
                0, :, 1, 1
            ]
            for phase in torch.linspace(0, math.pi, 7).tolist()
        ]
    )
    assert (seen.argmax(1) == which).all()
    assert (seen[:, which].amax() - seen[:, which].amin()) / seen[:, which].mean() < 0.01
    assert (seen[:, which] > 10 * seen[:, (which + 4) % 8]).all()


def test_energies_are_those_of_filters_over_space_and_time():
    g = torch.Generator().manual_seed(0)
    clip = torch.randn(1, 7, 9, 9, generator=g, dtype=torch.float64)
    space, time = page.space_time(*(t[:3] for t in bank()), reach=2, frames=3)
    found = page.motion_energy(clip, space, time, spontaneous=0.5)
    part = clip[0, :, 2:7, 3:8].to(torch.complex128)  # around the place (4, 5)
    ends = [sum(time[1, a] * (space[1] * part[end - a]).sum() for a in range(3)) for end in range(2, 7)]
    assert_close(found[0, 1, 4, 5].item(), sum(abs(e) ** 2 for e in ends).item() / 5 + 0.25)
    assert_close(page.motion_energy(clip, space, time, stride=4, spontaneous=0.5), found[..., ::4, ::4])


def test_light_alone_is_no_motion():
    light = torch.ones(1, 6, 31, 31, dtype=torch.float64)
    assert page.motion_energy(light, *page.space_time(*bank()), spontaneous=0.0)[..., 15, 15].max() < 1e-12
