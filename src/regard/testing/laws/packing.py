"""Packed texts (cu_seqlens): each is what it is by itself, gradients too, and an empty one changes nothing."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.ops.packed import run_packed
from regard.testing.case import Case, Inputs, NotApplicable, tracked

SIZES, MEMORIES = (3, 0, 1, 5, 3), (4, 2, 2, 5, 4)


def check_packed(case: Case) -> None:
    """Texts end to end in one row, an empty one among them, are each text by itself: outputs, states, gradients."""
    if case.page.roles:
        raise NotApplicable("it reads roles, which are not packed")
    if case.page.for_tokens is not None:
        raise NotApplicable("its settings fix the number of tokens, and texts differ in length")
    memories = MEMORIES if "cross" in case.pattern else SIZES
    inputs = case.inputs(sum(SIZES), sum(memories), batch=1)
    case.able(cut(inputs, slice(0, SIZES[0]), slice(0, memories[0])))
    for label, path in case.paths.items():
        live, alone = inputs.map(tracked), inputs.map(tracked)

        def run(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Any, x: Any) -> tuple:
            if 0 in (q.shape[2], k.shape[2]):  # what `regard.attend` does for every page
                return v.new_zeros(1, q.shape[1], q.shape[2], v.shape[3]), initial_state
            sides = dict(zip("xy", x, strict=True)) if isinstance(x, tuple) else {"x": x}
            return case.run(path, replace(live, q=q, k=k, v=v, **sides), state=initial_state)  # noqa: B023

        x = live.x if live.y is None else (live.x, live.y)
        out, states = run_packed(run, live.q, live.k, live.v, list(SIZES), list(memories), x=x)
        wanted, rows = [], [pairwise(torch.tensor([0, *s]).cumsum(0).tolist()) for s in (SIZES, memories)]
        for i, (a, b) in enumerate(zip(*rows, strict=True)):
            if a[0] == a[1]:
                continue
            one, end = case.run(path, cut(alone, slice(*a), slice(*b)))
            case.same(f"{label}: text {i} of {len(SIZES)} packed = by itself", out[:, :, slice(*a)], one)
            if end is not None:
                case.same_states(f"{label}: text {i} of {len(SIZES)} packed = by itself", states[i], end)
            wanted.append(one)
        for name, (mine, right) in both_gradients(live, out, alone, torch.cat(wanted, dim=2)).items():
            case.same(f"{label}: the gradient of {name}, packed = by itself", mine, right)


def cut(inputs: Inputs, a: slice, b: slice) -> Inputs:
    """Queries a, and keys b, of one row."""
    x, y = inputs.x, inputs.y
    return replace(
        inputs, q=inputs.q[:, :, a], k=inputs.k[:, :, b], v=inputs.v[:, :, b], x=None if x is None else x[:, a],
        y=None if y is None else y[:, b],
    )  # fmt: skip


def both_gradients(
    live: Inputs, out: Tensor, alone: Inputs, wanted: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for inputs, result in ((live, out), (alone, wanted)):
        named = {name: t for name, t in inputs.tensors().items() if t.requires_grad}
        grads = torch.autograd.grad(result.sin().sum(), list(named.values()), allow_unused=True)
        for (name, t), g in zip(named.items(), grads, strict=True):
            found.setdefault(name, []).append(torch.zeros_like(t) if g is None else g)
    return {name: (one, other) for name, (one, other) in found.items()}
