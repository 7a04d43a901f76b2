"""Mixers as linear systems: what is exported is what runs, and what has no system is refused with the reason."""

import pytest
import torch
from torch.testing import assert_close

from regard.core import Unsupported
from regard.ops import linear
from regard.ops.statespace import export, of_features

N, H, D = 7, 2, 3


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


q, k = drawn(0, 1, H, N, D).abs(), drawn(1, 1, H, N, D).abs()
GATES = -drawn(2, 1, H, N, D).abs()
KINDS = {"none": None, "fixed": GATES[0, :, 0, 0], "token": GATES[..., 0], "channel": GATES}


def of_token(t, i: int, rows: int):
    """What belongs to one token, for a batch of `rows`; what belongs to none of them as it is."""
    return t if t is None or t.dim() == 1 else t[:, :, i : i + 1].expand(rows, *t[:, :, :1].shape[1:])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_written_system_is_the_one_that_decoding_shows(kind, normalise):
    """Both replay the operator; with one value channel they are the same matrices, where the state is read."""
    options = {"normalise": normalise, "eps": 0.0}

    def step(i, v, state):
        query, keys, g = (of_token(t, i, len(v)) for t in (q, k, KINDS[kind]))
        return linear(query, keys, v[:, :, None], g, state=state, **options)

    exported, written = export(step, N, (H, 1)), of_features(q, k, KINDS[kind], normalise=normalise)
    assert_close(exported.keep[1:], written.keep[1:])
    assert_close(exported.write, written.write)
    assert_close(exported.read[1:], written.read[1:])
    v = drawn(3, 1, H, N, 1)
    wanted = linear(q, k, v, KINDS[kind], **options)[0][0, :, :, 0].mT
    assert_close(exported.replay(v[0, :, :, 0].mT), wanted)
    assert_close(written.replay(v[0, :, :, 0].mT), wanted)


def test_what_is_forgotten_at_once_is_written_around():
    """A decay of zero: the token's own value is read through D or C, nothing of the past."""

    def step(i, v, state):
        return v * (i + 1), v.clone()

    system = export(step, 3, (2,))
    u = drawn(4, 3, 2)
    assert_close(system.replay(u), u * torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64))
    assert not system.keep.any()


def test_a_coupled_state_is_exported_too():
    """The delta rule's Λ = I - β kᵀk is not diagonal."""

    def step(i, v, state):
        key = torch.nn.functional.normalize(k[0, 0, i], dim=0)
        state = v.new_zeros(len(v), D, 2) if state is None else state
        state = state + 0.5 * key[:, None] * (v - key @ state)[:, None]
        return q[0, 0, i] @ state, state

    system = export(step, N, (2,))
    state, u, rows = None, drawn(5, N, 2), []
    for i in range(N):
        out, state = step(i, u[i : i + 1], state)
        rows.append(out)
    assert_close(system.replay(u), torch.cat(rows))


def test_a_state_in_parts_keeps_its_clock_out_of_h():
    """Sum and count: the mean so far. The count has the same course whatever the values: only the sum is h."""

    def step(i, v, state):
        before, count = (torch.zeros_like(v), v.new_zeros(len(v), 1)) if state is None else state
        state = (before + v, count + 1)
        return state[0] / state[1], state

    system = export(step, 4, (1,))
    assert system.keep.shape == (4, 1, 1)
    assert_close(system.read[1:, 0, 0], torch.tensor([1 / 2, 1 / 3, 1 / 4], dtype=torch.float64))
    means = system.replay(torch.tensor([[4.0], [2.0], [0.0], [6.0]])).flatten()
    assert means.tolist() == pytest.approx([4, 3, 2, 3])


def squares(i, v, state):
    total = v * v if state is None else state + v * v
    return total, total


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda i, v, s: (v, v if s is None else torch.cat([s, v], dim=1)), "grows with the text"),
        (lambda i, v, s: (v + 1, v), "zero do not give zero"),
        (lambda i, v, s: (v / (1 + v.square()), v), "not linear"),
        (squares, "not linear"),
    ],
    ids=["a state that grows", "an offset", "a normed output", "a state of squares"],
)
def test_refusals(step, reason):
    with pytest.raises(Unsupported, match=reason):
        export(step, 4, (1,))
