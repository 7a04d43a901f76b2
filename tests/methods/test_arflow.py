"""ARFlow's own laws: causal over images and free inside one, cut and padded at the borders of images."""

from dataclasses import replace

import pytest
import torch

from regard import catalog
from regard.testing.case import GARBAGE, Case, same
from regard.testing.laws import check_decode, check_padded_state, check_segments

PAGE = catalog.get("arflow")
SIZE, N = 4, 12
CASE = Case(PAGE, PAGE.configure(tokens_per_image=SIZE), "causal_self")
PATHS = tuple(CASE.paths.values())


@pytest.mark.parametrize("path", PATHS)
def test_an_image_moves_itself_and_later_ones_only(path):
    inputs = CASE.inputs(N)
    base = CASE.run(path, inputs)[0]
    for names in ("kv", "x"):
        for j in range(N):
            edited = {name: getattr(inputs, name).clone() for name in names}
            for t in edited.values():
                t.select(-2, j).add_(1.0 + torch.arange(t.shape[-1]) % 3)
            change = (CASE.run(path, replace(inputs, **edited))[0] - base).abs().amax((0, 1, 3))
            first = j // SIZE * SIZE
            assert bool((change[:first] == 0).all())
            if names == "kv":
                assert bool((change[first:] > 0).all())


@pytest.mark.parametrize("path", PATHS)
def test_images_one_by_one_are_the_whole(path):
    inputs = CASE.inputs(N)
    whole, end = CASE.run(path, inputs)
    for sizes in ((SIZE,) * 3, (2 * SIZE, SIZE), (SIZE, SIZE + 4)):
        state, rows, start = None, [], 0
        for size in sizes:
            out, state = CASE.run(path, inputs.span(slice(start, start + size)), state=state)
            rows.append(out)
            start += size
        same("images one by one = the whole", torch.cat(rows, dim=2), whole)
        same("images one by one = the whole, state", state, end)


@pytest.mark.parametrize("path", PATHS)
def test_a_hidden_image_is_as_if_not_there(path):
    inputs = CASE.inputs(N)
    wanted, end = CASE.run(path, inputs)
    for at in (0, SIZE, N):  # before, between and after

        def pad(t, at=at):
            blank = torch.full_like(t.narrow(-2, 0, SIZE), GARBAGE)
            return torch.cat([t.narrow(-2, 0, at), blank, t.narrow(-2, at, N - at)], dim=-2)

        wide = replace(inputs, **{name: pad(getattr(inputs, name)) for name in "qkvx"})
        shown = torch.ones(1, 1, 1, N + SIZE, dtype=torch.bool)
        shown[..., at : at + SIZE] = False
        out, state = CASE.run(path, wide, shown)
        kept = torch.cat([out[:, :, :at], out[:, :, at + SIZE :]], dim=2)
        same("a hidden image is as if not there", kept, wanted)
        same("a hidden image is as if not there, state", state, end)


def test_images_of_one_token_carry_on_at_every_token():
    case = replace(CASE, cfg=PAGE.configure(tokens_per_image=1))
    for check in (check_segments, check_decode, check_padded_state):
        check(case)


@pytest.mark.parametrize("path", PATHS)
def test_the_state_does_not_grow(path):
    sizes = {CASE.run(path, CASE.inputs(n))[1].numel() for n in (1, N, 5 * N)}
    assert len(sizes) == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_hidden_token_of_a_far_higher_score_weighs_nothing(path):
    inputs = CASE.inputs(N)
    far, shown = inputs.k.clone(), torch.arange(N).view(1, 1, 1, N) != 5
    far[:, :, 5] = inputs.q[:, :, 4] * 1e6
    wanted = CASE.run(path, inputs, shown)[0]
    same("a hidden token weighs nothing", CASE.run(path, replace(inputs, k=far), shown)[0], wanted)
