"""The training loop: gradients of a step's loss, clipped, into any optimizer, at the rates of a schedule.

    set the rates -> zero the gradients -> loss_at(step) -> gradients -> clip -> optimizer.step -> after_step

`loss_at` draws the batch of a step and computes its loss, so that a run can go on from any step. A schedule is asked
once, for an optimizer that stands at its peak rates and a number of steps, and then sets the rates before each step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from regard.core import require

Schedule = Callable[[Optimizer, int], Callable[[int], None]]
Gradients = Callable[[Tensor, list[Tensor]], None]


def fit(
    optimizer: Optimizer,
    loss_at: Callable[[int], Tensor],
    steps: int,
    *,
    schedule: Schedule | None = None,
    clip: float | None = 1.0,
    start: int = 0,
    gradients: Gradients | None = None,
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """The losses of steps `start` to `steps`; the optimizer's parameters are what is trained.

    schedule    None: the optimizer's own rates, all the way
    clip        largest norm of all gradients together; None: as they are
    gradients   how they get from a loss to the parameters; None: `backward`
    after_step  called with (step, loss); what it raises ends the training
    """
    set_rates = (schedule or constant)(optimizer, steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for step in range(start, steps):
        set_rates(step)
        optimizer.zero_grad()
        loss = loss_at(step)
        (gradients or backward)(loss, parameters)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step, losses[-1])
    return losses


# from a loss to gradients


def backward(loss: Tensor, parameters: list[Tensor]) -> None:
    loss.backward()


def only_parameters(loss: Tensor, parameters: list[Tensor]) -> None:
    """Gradients of the trained parameters alone: the rest of a model that they run in gets none."""
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        p.grad = gradient


def already_there(loss: Tensor, parameters: list[Tensor]) -> None:
    """`loss_at` has written the gradients, part by part, while it computed the loss."""


# schedules


def constant(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    return lambda step: None


def by_rate(rate_at: Callable[[float, int, int], float]) -> Schedule:
    """Each group's rate from (its peak, step, steps)."""

    def begin(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
        peaks = [group["lr"] for group in optimizer.param_groups]

        def set_rates(step: int) -> None:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = rate_at(peak, step, steps)

        return set_rates

    return begin


def cosine(warm: float = 0.1) -> Schedule:
    """Up in this share of the steps, down to zero in the others by half a cosine."""

    def rate_at(peak: float, step: int, steps: int) -> float:
        rise = max(1, int(warm * steps))
        if step < rise:
            return peak * ((step + 1) / rise)
        return peak * (0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))

    return by_rate(rate_at)


def cosine_to(end: float, rise: int = 1) -> Schedule:
    """Half a cosine over all steps down to this share of the peak, times a warm-up over the first `rise` steps."""
    return by_rate(
        lambda peak, step, steps: (
            peak
            * min(1.0, (step + 1) / rise)
            * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
    )


def linear_to(end: float, rise: int = 1) -> Schedule:
    """A straight line over all steps towards this share of the peak, times a warm-up over the first `rise` steps."""
    return by_rate(
        lambda peak, step, steps: peak * min(1.0, (step + 1) / rise) * (1 - (1 - end) * step / steps)
    )


def one_cycle(warm: float = 0.1) -> Schedule:
    """torch's OneCycleLR: a cosine up and one down, and Adam's first beta the other way; from step 0 only."""

    def begin(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
        peaks = [group["lr"] for group in optimizer.param_groups]
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps, pct_start=warm)

        def set_rates(step: int) -> None:
            if step:
                require(cycle.last_epoch == step - 1, "one cycle is begun at step 0", step=step)
                cycle.step()

        return set_rates

    return begin
