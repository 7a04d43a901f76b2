"""Masks and padding: what is hidden is as if it were not there."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.core import Method
from regard.core.mask import causal, window
from regard.core.roles import Roles
from regard.core.trees import tree_leaves
from regard.kinds.mechanism import run
from regard.testing.case import (
    GARBAGE,
    B,
    Case,
    NotApplicable,
    gradients,
    hold,
    refusals,
    same,
    same_states,
)


def check_padding_right(case: Case, n: int = 7) -> None:
    """Masked keys after the text, whatever is in them, change nothing."""
    padding(case, n, 0, 3)


def check_padding_left(case: Case, n: int = 7) -> None:
    """Masked keys before the text, whatever is in them, change nothing."""
    padding(case, n, 3, 0)


def check_padding_nan(case: Case, n: int = 7) -> None:
    """NaN under padding, before or after the text, reaches no token and no state."""
    padding(case, n, 0, 3, torch.nan)
    if "padding_left" not in case.page.exempt:
        padding(case, n, 3, 0, torch.nan)


def padding(case: Case, n: int, left: int, right: int, fill: float = GARBAGE) -> None:
    cross = "cross" in case.pattern
    inputs = case.inputs(n, n + 2)
    m = inputs.k.shape[2]

    def pad(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.nn.functional.pad(t, (0, 0, left, right), value=fill)

    wide = replace(
        inputs, k=pad(inputs.k), v=pad(inputs.v), y=pad(inputs.y), roles=case.labels(m + left + right)
    )
    if not cross:
        wide = replace(wide, q=pad(inputs.q), x=pad(inputs.x))
    hidden = torch.zeros(B, 1, 1, m + left + right, dtype=torch.bool)
    hidden[..., left : left + m] = True
    if inputs.roles is not None:
        ends = [torch.zeros(left, dtype=torch.long), torch.zeros(right, dtype=torch.long)]
        wide = replace(
            wide, roles=Roles(**{r: torch.cat([ends[0], inputs.roles[r], ends[1]]) for r in inputs.roles})
        )
    case.able(wide, hidden)
    for label, path in case.paths.items():
        wanted, end = case.run(path, inputs)
        out, state = case.run(path, wide, hidden)
        out = out if cross else out[:, :, left : left + n]
        case.same(f"{label}: padded by {fill:g} = unpadded, {left} before and {right} after", out, wanted)
        if [leaf.shape for leaf in tree_leaves(state)] == [leaf.shape for leaf in tree_leaves(end)]:
            case.same_states(
                f"{label}: padded by {fill:g} = unpadded, {left} before and {right} after", state, end
            )


def check_mask_obeyed(case: Case, n: int = 7) -> None:
    """A key that no query may see moves nothing, and a mask that shows everything is no mask."""
    inputs = case.inputs(n, n + 2)
    m = inputs.k.shape[2]
    if m == 1:
        raise NotApplicable("one key cannot be hidden from all")
    hidden = min(2, m - 1)
    mask = torch.ones(B, 1, 1, m, dtype=torch.bool)
    mask[..., hidden] = False
    case.able(inputs, mask)
    for label, path in case.paths.items():
        case.same(
            f"{label}: a mask that shows all = no mask",
            case.run(path, inputs, mask | True)[0],
            case.run(path, inputs)[0],
        )
        k, v = inputs.k.clone(), inputs.v.clone()
        k[:, :, hidden], v[:, :, hidden] = GARBAGE, -GARBAGE
        out = case.run(path, inputs, mask)[0]
        changed = case.run(path, replace(inputs, k=k, v=v), mask)[0]
        case.same(f"{label}: the hidden key {hidden} moves nothing", changed, out)


def check_mask_object(case: Case) -> None:
    """A core Mask gives what its dense tensor gives."""
    inputs = case.inputs(7, 9)
    mask = causal() & window(4) if "causal_self" in case.pattern else window(6, ahead=3)
    case.able(inputs, mask)
    dense = mask.dense(7, inputs.k.shape[2])
    for label, path in case.paths.items():
        case.same(
            f"{label}: {mask!r} = its tensor",
            case.run(path, inputs, mask)[0],
            case.run(path, inputs, dense)[0],
        )


def check_no_tokens(case: Case) -> None:
    """No tokens and no rows give no output and leave the state as it was; a query gives zeros where no keys are."""
    for label in case.paths:

        def ask(n: int, m: int, state: Any = None, batch: int = B, impl: str = label) -> tuple[Tensor, Any]:
            inputs = case.inputs(n, m, batch=batch)
            method = Method(case.page.card.title, case.page, case.at(inputs.q.shape[2]).cfg)
            x = inputs.x if inputs.y is None else (inputs.x, inputs.y)
            options = dict(
                pattern=case.pattern, initial_state=state, params=inputs.params, x=x, roles=inputs.roles
            )
            return run(method, inputs.q, inputs.k, inputs.v, impl=impl, **options)[:2]

        out, end = ask(0, 3)
        hold(out.shape[2] == 0 and end is None, f"{label}: no tokens give {list(out.shape)} and {end}")
        out, end = ask(3, 4, batch=0)
        hold(
            len(out) == 0 and out.shape[2] == case.inputs(3).q.shape[2] and end is None,
            f"{label}: no rows give {list(out.shape)} and {end}",
        )
        if "cross" in case.pattern:
            out = ask(3, 0)[0]
            hold(
                out.shape[2] == 3 and not out.any(),
                f"{label}: 3 queries and no key give {list(out.shape)}, not zeros",
            )
        elif case.pattern == "causal_self":
            with refusals():
                state = ask(4, 4)[1]
                same_states(f"{label}: no tokens leave the state", ask(0, 0, state)[1], state, tol=0)


def check_blind_rows(case: Case, n: int = 5) -> None:
    """Queries that see no key give zeros, and gradients stay finite."""
    inputs = case.inputs(n, n + 2)
    mask = torch.ones(B, 1, inputs.q.shape[2], inputs.k.shape[2], dtype=torch.bool)
    mask[:, :, min(3, n - 1)] = False
    mask[1] = False
    try:
        case.able(inputs, mask)
    except NotApplicable:
        mask = mask[:, :, :1].clone()  # of keys only: row 1 of the batch sees nothing
        case.able(inputs, mask)
    blind = ~mask.any(-1, keepdim=True)
    for label, path in case.paths.items():
        out, _, grads = gradients(case, path, inputs, mask)
        shown = out.masked_fill(~blind, 0)
        same(f"{label}: queries that see nothing are zero", shown, torch.zeros_like(out), tol=0)
        for name, g in grads.items():
            hold(
                g.isfinite().all(),
                f"{label}: queries that see nothing: gradient of {name} is not finite",
                of=name,
            )
