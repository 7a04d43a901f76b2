"""Packed texts (cu_seqlens) against each text by itself."""

from itertools import pairwise

import pytest
import torch

import regard
from regard import catalog
from regard.core import Unsupported
from regard.core.trees import tree_leaves, tree_map
from regard.kinds.mechanism import Mechanism
from regard.testing.case import Case

NAMES = [name for name, page in catalog.every() if isinstance(page, Mechanism)]
SIZES, MEMORIES = (3, 1, 0, 5, 3, 0), (4, 2, 4, 4, 0, 0)


def texts(name, pattern, total, memory, seed=0):
    page = catalog.get(name)
    case = Case(page, page.config(), pattern)
    inputs = case.inputs(total, memory, seed=seed, batch=1)
    x = None if inputs.x is None else inputs.x if inputs.y is None else (inputs.x, inputs.y)
    return inputs, {"params": inputs.params, "x": x}


def part(x, a, b):
    if isinstance(x, tuple):
        return x[0][:, a[0] : a[1]], x[1][:, b[0] : b[1]]
    return None if x is None else x[:, a[0] : a[1]]


def spans(sizes):
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return list(pairwise(ends)), torch.tensor(ends)


@pytest.mark.parametrize("pattern", ["self", "causal_self", "cross", "causal_cross"])
@pytest.mark.parametrize("name", NAMES)
def test_each_text_is_by_itself(name, pattern):
    page = catalog.get(name)
    if pattern not in page.patterns:
        with pytest.raises(Unsupported, match=pattern):
            regard.attend(*torch.randn(3, 1, 2, 4, 4), name, pattern)
        return
    if page.roles:
        pytest.skip("the mechanism reads roles")
    if page.for_tokens is not None:
        inputs, options = texts(name, pattern, sum(SIZES), sum(SIZES))
        with pytest.raises(ValueError, match=r"as many tokens as the settings say \(tokens=3, "):
            regard.attend(inputs.q, inputs.k, inputs.v, name, pattern, cu_seqlens=spans(SIZES)[1], **options)
        return
    cross = "cross" in pattern
    (texts_q, cuts), (keys, cuts_k) = spans(SIZES), spans(MEMORIES if cross else SIZES)
    inputs, options = texts(name, pattern, sum(SIZES), sum(MEMORIES))
    more = {"cu_seqlens_k": cuts_k} if cross else {}
    out, state, _ = regard.attend(
        inputs.q, inputs.k, inputs.v, name, pattern, cu_seqlens=cuts, **more, **options
    )
    for i, (a, b) in enumerate(zip(texts_q, keys, strict=True)):
        alone = {**options, "x": part(options["x"], a, b)}
        q, k, v = inputs.q[:, :, a[0] : a[1]], inputs.k[:, :, b[0] : b[1]], inputs.v[:, :, b[0] : b[1]]
        wanted, end, _ = regard.attend(q, k, v, name, pattern, **alone)
        torch.testing.assert_close(out[:, :, a[0] : a[1]], wanted)
        if b[0] == b[1]:
            assert not wanted.any() and end is None and (state is None or state[i] is None)
        if end is not None:
            mine = state[i] if isinstance(state, list) else tree_map(lambda t, i=i: t[i : i + 1], state)
            for actual, right in zip(tree_leaves(mine), tree_leaves(end), strict=True):
                torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("name", ["softmax", "linear_attention"])
def test_an_empty_text_changes_nothing(name):
    """It has no rows and leaves the state that it was given; that of the others is as without it."""
    inputs = texts(name, "causal_self", 7, None)[0]
    with_none, without = [0, 3, 3, 7, 7], [0, 3, 7]
    out, states, _ = regard.attend(inputs.q, inputs.k, inputs.v, name, cu_seqlens=with_none)
    wanted, ends, _ = regard.attend(inputs.q, inputs.k, inputs.v, name, cu_seqlens=without)
    torch.testing.assert_close(out, wanted)
    assert states[1] is states[3] is None
    again, kept, _ = regard.attend(
        inputs.q, inputs.k, inputs.v, name, cu_seqlens=[0, 3, 3, 7, 7], initial_state=states
    )
    assert kept[1] is kept[3] is None
    following = regard.attend(inputs.q, inputs.k, inputs.v, name, cu_seqlens=without, initial_state=ends)
    torch.testing.assert_close(again, following.out)


@pytest.mark.parametrize("name", ["softmax", "linear_attention"])
def test_states_carry_on(name):
    _, cuts = spans(SIZES)
    first, second = (texts(name, "causal_self", sum(SIZES), None, seed)[0] for seed in (0, 1))
    _, state, _ = regard.attend(first.q, first.k, first.v, name, cu_seqlens=cuts)
    out, _, _ = regard.attend(second.q, second.k, second.v, name, cu_seqlens=cuts, initial_state=state)
    for a, b in spans(SIZES)[0]:
        whole = [torch.cat([getattr(t, n)[:, :, a:b] for t in (first, second)], 2) for n in "qkv"]
        torch.testing.assert_close(out[:, :, a:b], regard.attend(*whole, name)[0][:, :, b - a :])


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([0, 4], "ends at the number"),
        ([0, 4, 3, 6], "never falls"),
        ([0.0, 6.0], "borders of S texts"),
    ],
)
def test_wrong_borders_are_errors(cuts, message):
    with pytest.raises(ValueError, match=message):
        regard.attend(*torch.randn(3, 1, 2, 6, 4), "linear_attention", cu_seqlens=torch.tensor(cuts))


def test_masks_beside_borders_are_refused():
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    with pytest.raises(Unsupported, match="cu_seqlens"):
        regard.attend(
            *torch.randn(3, 1, 2, 6, 4), "linear_attention", mask=mask, cu_seqlens=torch.tensor([0, 6])
        )
