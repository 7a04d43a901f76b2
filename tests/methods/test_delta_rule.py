"""What the delta rule promises: a key holds one value, its last; and float32 that holds out with close keys."""

import pytest
import torch

from regard import catalog
from regard.core.call import Call
from regard.testing.case import Case, same

PAGE = catalog.get("delta_rule")
CASE = Case(PAGE, PAGE.configure(eps=1e-30), "causal_self")
PATHS = tuple(CASE.paths.values())
EXACT = {"w_beta": torch.full((1, 1), 60.0, dtype=torch.float64)}  # β = 1


@pytest.mark.parametrize("path", PATHS)
def test_a_new_value_replaces_the_old(path):
    k = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 1, 0]].view(1, 1, 5, 4)
    v = torch.arange(5, dtype=torch.float64).view(1, 1, 5, 1)
    x = torch.ones(1, 5, 1, dtype=torch.float64)
    out, state = path(k, k, v, CASE.cfg, Call(params=EXACT, x=x))
    same("each key brings back what it has just been given", out, v)
    same(
        "one value for each key, the last",
        state,
        torch.tensor([4.0, 3.0, 2.0, 0.0]).double().view(1, 1, 4, 1),
    )


@pytest.mark.parametrize("pattern", ["self", "cross", "causal_cross"])
@pytest.mark.parametrize("path", PATHS)
def test_other_patterns_read_what_the_text_has_left(path, pattern):
    inputs = CASE.inputs(9)
    _, state = CASE.run(path, inputs)
    x = inputs.x if pattern == "self" else (None, inputs.x)
    out, none = path(inputs.q, inputs.k, inputs.v, CASE.cfg, Call(pattern, params=inputs.params, x=x))
    same("the state read", out, inputs.q / inputs.q.norm(dim=-1, keepdim=True) @ state)
    assert none is None


def test_long_texts_of_close_keys_stay_near_the_reference():
    inputs = CASE.inputs(300)
    near = inputs.k[:, :, :1] + 0.01 * inputs.k
    call = Call(params=inputs.params, x=inputs.x)
    wanted, end = PAGE.reference(inputs.q, near, inputs.v, CASE.cfg, call)
    single = (t.float() for t in (inputs.q, near, inputs.v))
    call = Call(params={n: p.float() for n, p in inputs.params.items()}, x=inputs.x.float())
    out, state = PAGE.fast(*single, CASE.cfg, call)
    same("float32, 300 keys within 1 %", out.double(), wanted, tol=1e-4)
    same("float32, 300 keys within 1 %, state", state.double(), end, tol=1e-4)
