"""Fast and reference are one function: outputs, states, gradients, whatever the settings of speed."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from regard.testing.case import (
    EXACT,
    Broken,
    Case,
    Inputs,
    NotApplicable,
    gradients,
    random_mask,
    refusals,
    tracked,
)

LENGTHS = (1, 7, 64, 65)


def check_fast_equals_reference(case: Case) -> None:
    """Outputs, states and every gradient, also of the incoming state, with and without masks."""
    if case.page.fast is None:
        raise NotApplicable("no fast path")
    for n in LENGTHS:
        given = case.inputs(n, n + 3)
        equal_paths(case, given, f"n={n}")
    for n in (7, 65):
        given = case.inputs(n, n + 3)
        for said, mask in masks_of(case, given):
            equal_paths(case, given, f"n={n}, {said}", mask)
    shared = case.inputs(7, 10, groups=1)
    for said, mask in masks_of(case, shared):
        equal_paths(case, shared, f"n=7 on one KV head, {said}", mask)
    if case.pattern == "causal_self":
        with refusals():
            _, state = case.run(case.page.reference, case.inputs(9))
        if state is not None:
            equal_paths(case, case.inputs(7, seed=1), "n=7 after a state of 9", state=state)


def masks_of(case: Case, given: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The masks that the page takes: of keys, the same for all heads or not, and of pairs."""
    full = random_mask(given.q.shape[2], given.k.shape[2], given.q.shape[1])
    masks = {
        "a mask of keys": full[:, :1, :1],
        "a mask of keys by head": full[:, :, :1],
        "a mask of pairs": full,
    }
    for said, mask in masks.items():
        try:
            case.able(given, mask)
        except NotApplicable:
            continue
        yield said, mask


def equal_paths(case: Case, given: Inputs, said: str, mask: Any = None, state: Any = None) -> None:
    found, wanted = (
        gradients(case, path, given, mask, state) for path in (case.page.fast, case.page.reference)
    )
    case.same(f"fast = reference, out, {said}", found[0], wanted[0])
    case.same_states(f"fast = reference, {said}", found[1], wanted[1])
    for name, gradient in wanted[2].items():
        case.same(f"fast = reference, gradient of {name}, {said}", found[2][name], gradient)


def check_speed_settings(case: Case) -> None:
    """Settings that the page says change the speed change nothing else, at odd values too."""
    if case.page.fast is None or not case.page.speed_settings:
        raise NotApplicable("no setting is for speed only")
    given = case.inputs(65, 67)
    wanted, end = case.run(case.page.fast, given)
    for name in case.page.speed_settings:
        for value in (1, 3, 5, 64):
            try:
                out, state = case.run(case.page.fast, given, **{name: value})
            except ValueError:
                continue
            case.same(f"{name}={value} changes the speed only", out, wanted)
            case.same_states(f"{name}={value} changes the speed only", state, end)


def check_gradients(case: Case, n: int = 3) -> None:
    """Gradients are those of finite differences: no term is cut off."""
    found = [
        set(wrong_gradients(case, n, seed)) for seed in range(2)
    ]  # twice: a kink may lie in the way once
    if not found[0] & found[1]:
        return
    for name, (at, one, other) in wrong_gradients(case, n, 0).items():
        if name in found[1]:
            told = f"the gradient of {name} at {at} is {one:.6g}, finite differences give {other:.6g}"
            raise Broken(told, of=name, at=at, token=at[-2] if len(at) > 1 else None, found=one, wanted=other)


def wrong_gradients(case: Case, n: int, seed: int) -> dict[str, tuple[list[int], float, float]]:
    """By the name of what it is a gradient of: the first place, what autograd says, what differences say."""
    given = case.inputs(n, n + 1, batch=1, seed=seed)
    out = case.run(case.page.reference, given)[0].detach()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)

    def total(given: Inputs) -> Tensor:
        return (case.run(case.page.reference, given)[0] * weights).sum()

    live = given.map(tracked)
    named = {name: t for name, t in live.tensors().items() if t.requires_grad}
    value = total(live)
    if not value.requires_grad:
        raise NotApplicable("its output has no gradient at all")
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    step = 1e-5 if case.tol <= EXACT else (case.tol / 100) ** (1 / 3)
    bar = 1e-5 if case.tol <= EXACT else 10 * step**2 + case.tol / step
    wrong = {}
    for (name, t), g in zip(named.items(), grads, strict=True):
        g = torch.zeros_like(t) if g is None else g
        slopes = finite_differences(total, given, name, step)
        far = ((g - slopes).abs() > bar * max(1.0, slopes.abs().max().item())).nonzero()
        if len(far):
            at = tuple(far[0].tolist())
            wrong[name] = (list(at), g[at].item(), slopes[at].item())
    return wrong


def finite_differences(total: Callable, given: Inputs, name: str, step: float) -> Tensor:
    """The slope of total(given) along every number of one tensor, by central differences."""
    moving = given.map(torch.clone)
    t = moving.tensors()[name]
    flat, slopes = t.reshape(-1), torch.zeros_like(t).reshape(-1)
    with torch.no_grad():
        for i in range(len(flat)):
            at = flat[i].item()
            ends = []
            for by in (step, -step):
                t.view(-1)[i] = at + by
                ends.append(total(moving).item())
            t.view(-1)[i] = at
            slopes[i] = (ends[0] - ends[1]) / (2 * step)
    return slopes.view_as(t)
