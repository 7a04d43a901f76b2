"""Fast and reference are one function: outputs, states, gradients, whatever the settings of speed."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Unsupported
from regard.testing.case import (
    EXACT,
    Broken,
    Case,
    H,
    Inputs,
    NotApplicable,
    gradients,
    hold,
    random_mask,
    refusals,
    same,
    tracked,
)
from regard.testing.constants import small_constants
from regard.testing.laws.heads import grouped

LENGTHS = (1, 7, 64, 65)
MOST = 48  # numbers of a tensor of tokens along which slopes are taken, as rows of one batch
LINES = 2  # through all numbers of any other tensor, and of larger ones: each is asked where a line is off
ODD = (1, 3, 5, 64)  # values of settings that change the speed only
WIDTHS = (60, 100, 257, 512)


def check_fast_equals_reference(case: Case) -> None:
    """Outputs, states and every gradient, also of the incoming state, with and without masks."""
    if case.page.fast is None:
        raise NotApplicable("no fast path")
    for n in LENGTHS:
        inputs = case.inputs(n, n + 3)
        equal_paths(case, inputs, f"n={n}")
    for n in (7, 65):
        equal_under_masks(case, case.inputs(n, n + 3), f"n={n}")
    equal_under_masks(case, case.inputs(7, 10, groups=1), "n=7 on one KV head")
    if case.pattern == "causal_self":
        with refusals():
            _, state = case.run(case.page.reference, case.inputs(9))
        if state is not None:
            # roles label the tokens of the state too
            after = replace(case.inputs(7, seed=1), roles=case.labels(9 + 7))
            equal_paths(case, after, "n=7 after a state of 9", state=state)


def equal_under_masks(case: Case, inputs: Inputs, label: str) -> None:
    """The same under every mask that the reference takes."""
    for what, mask in masks(inputs).items():
        try:
            wanted = gradients(case, case.page.reference, inputs, mask)
        except Unsupported:
            continue
        equal_to(case, wanted, inputs, f"{label}, {what}", mask)


def masks(inputs: Inputs) -> dict[str, Tensor]:
    """Masks of keys, the same for all heads or not, and of pairs."""
    full = random_mask(inputs.q.shape[2], inputs.k.shape[2], inputs.q.shape[1])
    return {
        "a mask of keys": full[:, :1, :1],
        "a mask of keys by head": full[:, :, :1],
        "a mask of pairs": full,
    }


def equal_paths(case: Case, inputs: Inputs, label: str, mask: Any = None, state: Any = None) -> None:
    wanted = gradients(case, case.page.reference, inputs, mask, state)
    equal_to(case, wanted, inputs, label, mask, state)


def equal_to(
    case: Case, wanted: tuple, inputs: Inputs, label: str, mask: Any = None, state: Any = None
) -> None:
    """Output, state and gradients of the fast path are these."""
    actual = gradients(case, case.page.fast, inputs, mask, state)
    case.same(f"fast = reference, out, {label}", actual[0], wanted[0])
    case.same_states(f"fast = reference, {label}", actual[1], wanted[1])
    for name, gradient in wanted[2].items():
        case.same(f"fast = reference, gradient of {name}, {label}", actual[2][name], gradient)


def check_speed_settings(case: Case) -> None:
    """Settings that the page says change the speed change nothing else, gradients included, at odd values too."""
    if case.page.fast is None or not case.page.speed_settings:
        raise NotApplicable("no setting is for speed only")
    inputs = case.inputs(65, 67)
    wanted = gradients(case, case.page.fast, inputs)
    for name in case.page.speed_settings:
        taken = list(accepted(case, name))
        hold(taken, f"{name} is for speed only, and takes none of {ODD}")
        for value in taken:
            at, law = (
                replace(case, cfg=replace(case.cfg, **{name: value})),
                f"{name}={value} changes the speed only",
            )
            actual = gradients(at, case.page.fast, inputs)
            case.same(law, actual[0], wanted[0])
            case.same_states(law, actual[1], wanted[1])
            for of, g in wanted[2].items():
                case.same(f"{law}: the gradient of {of}", actual[2][of], g)


def check_constants(case: Case) -> None:
    """Blocks, tiles and pieces of a few tokens change nothing: outputs, states, gradients, grouped heads, masks."""
    n, m = 33, 36
    inputs = grouped(case, H, n, m)
    path = case.page.fast or case.page.reference
    taken = [(label, mask) for label, mask in masks(inputs).items() if case.takes(inputs, mask)]
    for label, mask in ("no mask", None), *taken[-1:]:
        wanted = gradients(case, path, inputs, mask)
        with small_constants():
            found = gradients(case, path, inputs, mask)
            with torch.no_grad():
                out = case.run(path, inputs, mask)[0]
        law = f"small constants of speed, {label}"
        case.same(law, found[0], wanted[0])
        case.same(f"{law}, without gradients", out, wanted[0])
        case.same_states(law, found[1], wanted[1])
        for name, g in wanted[2].items():
            case.same(f"{law}: the gradient of {name}", found[2][name], g)


def check_widths(case: Case, n: int = 5) -> None:
    """Heads of 60, 100, 257 and 512 channels: fast = reference, or a refusal that both give."""
    if case.page.fast is None:
        raise NotApplicable("no fast path")
    for width in WIDTHS:
        inputs = case.inputs(n, n + 2, batch=1, groups=1, width=width, key=width)
        outs = []
        for path in (case.page.fast, case.page.reference):
            try:
                outs.append(case.run(path, inputs)[0])
            except ValueError as refusal:
                outs.append(str(refusal))
        if isinstance(outs[1], str):
            hold(outs[0] == outs[1], f"width {width}: {outs[1]!r} of the reference, not of the fast path")
        else:
            hold(not isinstance(outs[0], str), f"width {width}: the fast path refuses: {outs[0]}")
            case.same(f"fast = reference, heads of {width} channels", *outs)


def accepted(case: Case, name: str) -> Iterator[int]:
    """The odd values of a setting that the Config takes."""
    for value in ODD:
        try:
            replace(case.cfg, **{name: value})
        except ValueError:
            continue
        yield value


def check_gradients(case: Case, n: int = 3) -> None:
    """Gradients are those of finite differences: no term is cut off."""
    first = wrong_gradients(case, n, 0)
    # asked again where it was wrong: a kink may lie in the way once
    again = wrong_gradients(case, n, 1) if first else {}
    for name, (at, one, other) in first.items():
        if name in again:
            message = f"the gradient of {name} at {at} is {one:.6g}, finite differences give {other:.6g}"
            raise Broken(
                message, of=name, at=at, token=at[-2] if len(at) > 1 else None, found=one, wanted=other
            )


def check_derivatives(case: Case, n: int = 5) -> None:
    """Forward-mode derivatives, derivatives of gradients, and vmap: those of finite differences, or an error."""
    inputs = case.inputs(n, n + 1, batch=1)
    named = {name: t for name, t in inputs.tensors().items() if t.is_floating_point()}
    draw = torch.Generator().manual_seed(1)
    along = {name: torch.randn(t.shape, generator=draw, dtype=t.dtype) for name, t in named.items()}
    for label, path in case.paths.items():
        asked = Asked(case, path, inputs, along)
        for name, question in (
            ("jvp", asked.forward),
            ("double backward", asked.twice),
            ("vmap", asked.rows),
        ):
            try:
                with warnings.catch_warnings():
                    # of torch about itself: what it loads is deprecated, what it does in a loop is slow
                    warnings.simplefilter("ignore")
                    found, wanted = question()
            except (RuntimeError, NotImplementedError):
                continue
            same(f"{label}: {name}", found, wanted, tol=max(1e-5, 100 * case.tol))


@dataclass(frozen=True)
class Asked:
    """A path as a function of one number, how far all inputs are moved along a direction: its derivatives."""

    case: Case
    path: Callable
    inputs: Inputs
    along: dict[str, Tensor]

    def out(self, by: Tensor | float) -> Tensor:
        moved = {name: self.inputs.tensors()[name] + by * t for name, t in self.along.items()}
        return self.case.run(self.path, placed(self.inputs, moved))[0]

    def slope(self, by: float) -> Tensor:
        """The gradient of the sum of sines, along the direction, at a distance: by backward."""
        at = torch.tensor(by, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self.out(at).sin().sum(), at)[0]

    def forward(self) -> tuple[Tensor, Tensor]:
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return torch.func.jvp(self.out, (zero,), (one,))[1], (self.out(1e-5) - self.out(-1e-5)) / 2e-5

    def twice(self) -> tuple[Tensor, Tensor]:
        at = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(self.out(at).sin().sum(), at, create_graph=True)
        return torch.autograd.grad(slope, at)[0], (self.slope(1e-5) - self.slope(-1e-5)) / 2e-5

    def rows(self) -> tuple[Tensor, Tensor]:
        by = torch.tensor([0.0, 0.5], dtype=torch.float64)
        return torch.func.vmap(self.out)(by), torch.stack([self.out(b) for b in by])


def placed(inputs: Inputs, named: dict[str, Tensor]) -> Inputs:
    """Inputs with other tensors by these names."""
    params = {name: named.get(name, p) for name, p in inputs.params.items()}
    return replace(inputs, params=params, **{name: t for name, t in named.items() if name not in params})


def wrong_gradients(case: Case, n: int, seed: int) -> dict[str, tuple[list[int], float, float]]:
    """By the name of what it is a gradient of: the first place, what autograd says, what differences say."""
    inputs = case.inputs(n, n + 1, batch=1, seed=seed)
    out = case.run(case.page.reference, inputs)[0].detach()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)

    def total(inputs: Inputs) -> Tensor:
        return (case.run(case.page.reference, inputs)[0] * weights).sum()

    live = inputs.map(tracked)
    named = {name: t for name, t in live.tensors().items() if t.requires_grad}
    value = total(live)
    if not value.requires_grad:
        raise NotApplicable("its output has no gradient at all")
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    step = 1e-5 if case.tol <= EXACT else (case.tol / 100) ** (1 / 3)
    bar = 1e-5 if case.tol <= EXACT else 10 * step**2 + case.tol / step
    wrong = {}
    for (name, t), g in zip(named.items(), grads, strict=True):
        g = (torch.zeros_like(t) if g is None else g).reshape(-1)
        draw, far = torch.Generator().manual_seed(seed), None
        in_rows = case.keeps_rows_apart and name not in inputs.params
        slopes = partial(finite_differences, total, inputs, name, step)
        if in_rows:
            slopes = partial(differences_in_rows, case, inputs, weights, name, step)
            some = torch.randperm(t.numel(), generator=draw)[:MOST].sort().values
            far = first_apart(g, some, slopes, bar)
        if far is None and not (in_rows and t.numel() <= MOST):
            lines = F.normalize(torch.randn(LINES, len(g), generator=draw, dtype=g.dtype), dim=1)
            if any(off_along(g, d, partial(along_line, total, inputs, name), step, bar) for d in lines):
                far = first_apart(g, torch.arange(t.numel()), slopes, bar)
        if far is not None:
            number, slope = far
            at = [int(i) for i in torch.unravel_index(torch.tensor(number), t.shape)]
            wrong[name] = (at, g[number].item(), slope)
    return wrong


def off_along(gradient: Tensor, direction: Tensor, rise: Callable, step: float, bar: float) -> bool:
    """Whether the slope along a direction of length 1 is another than that of the gradient."""
    slope = rise(direction * step) / (2 * step)
    return abs(slope - (gradient @ direction).item()) > bar * max(1.0, abs(slope))


def first_apart(
    gradient: Tensor, numbers: Tensor, slopes_at: Callable[[Tensor], Tensor], bar: float
) -> tuple[int, float] | None:
    """Which of these numbers of a flat tensor is the first whose gradient is not its slope, and its slope."""
    slopes = slopes_at(numbers)
    largest = max([1.0, *slopes.abs().tolist()])
    far = ((gradient[numbers] - slopes).abs() > bar * largest).nonzero()
    return (int(numbers[far[0, 0]]), slopes[far[0, 0]].item()) if len(far) else None


def finite_differences(total: Callable, inputs: Inputs, name: str, step: float, numbers: Tensor) -> Tensor:
    """The slopes of total(given) along these numbers of one tensor, by central differences."""
    slopes, line = [], torch.zeros(inputs.tensors()[name].numel(), dtype=torch.float64)
    for number in numbers:
        line[number] = step
        slopes.append(along_line(total, inputs, name, line) / (2 * step))
        line[number] = 0.0
    return torch.tensor(slopes, dtype=torch.float64)


def differences_in_rows(
    case: Case, inputs: Inputs, weights: Tensor, name: str, step: float, numbers: Tensor
) -> Tensor:
    """The same of vectors of the tokens, of which inputs hold one row: both ends of every line are rows of a batch."""
    rows = inputs.rows([0] * (2 * len(numbers)))
    steps = torch.zeros(len(numbers), inputs.tensors()[name].numel(), dtype=torch.float64)
    steps[torch.arange(len(numbers)), numbers] = step
    ends = torch.cat([steps, -steps])
    t = rows.tensors()[name]
    with torch.no_grad():
        moving = replace(rows, **{name: t + ends.to(t.dtype).view_as(t)})
        totals = (case.run(case.page.reference, moving)[0] * weights).sum((1, 2, 3))
    up, down = totals.double().chunk(2)
    return (up - down) / (2 * step)


def along_line(total: Callable, inputs: Inputs, name: str, line: Tensor) -> float:
    """total(given) at one end of a line [numbers of one tensor] through what is given, less that at the other."""
    moving = inputs.map(torch.clone)
    t = moving.tensors()[name]
    before, ends = t.clone(), []
    with torch.no_grad():
        for way in (1, -1):
            t.copy_(before + way * line.to(t.dtype).view_as(t))
            ends.append(total(moving).item())
    return ends[0] - ends[1]
