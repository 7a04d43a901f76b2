"""The training loop on losses whose steps are worked by hand, and its schedules."""

import copy

import pytest
import torch
from torch import nn

from regard.train.convert import warmed
from regard.train.loop import (
    already_there,
    by_rate,
    constant,
    cosine,
    cosine_to,
    fit,
    linear_to,
    one_cycle,
    only_parameters,
)


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def rates_of(schedule, steps, peak=1.0):
    optimizer, rates = torch.optim.SGD([parameter(1.0)], peak), []
    set_rates = schedule(optimizer, steps)
    for step in range(steps):
        set_rates(step)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_steps_on_a_parabola_are_those_worked_by_hand():
    x = parameter(8.0)  # loss x², gradient 2x, x <- x - 2x / 4
    losses = fit(torch.optim.SGD([x], 0.25), lambda step: x.square().sum(), 3, clip=None)
    assert losses == [64.0, 16.0, 4.0] and x.item() == 1.0


def test_gradients_are_clipped_together():
    x = parameter(3.0, 4.0)  # a gradient of length 5 becomes one of length 1
    fit(torch.optim.SGD([x], 1.0), lambda step: x.square().sum() / 2, 1, clip=1.0)
    assert x.tolist() == pytest.approx([3 - 0.6, 4 - 0.8], abs=1e-6)


def test_it_goes_on_at_any_step_as_if_it_had_not_stopped():
    def batch(step):
        return torch.randn(4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

    def run(x, optimizer, **options):
        return fit(optimizer, lambda s: (x * batch(s) - 1).square().mean(), 10, schedule=cosine(), **options)

    whole = parameter(2.0)
    losses = run(whole, torch.optim.AdamW([whole], 0.1))
    cut, kept = parameter(2.0), []
    optimizer = torch.optim.AdamW([cut], 0.1)

    def stop(step, loss):
        kept.append(loss)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cut, optimizer, after_step=stop)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    again = torch.optim.AdamW([cut], 0.1)
    again.load_state_dict({"state": state, "param_groups": again.state_dict()["param_groups"]})
    assert kept + run(cut, again, start=6) == losses
    assert torch.equal(cut, whole)


def test_only_the_parameters_get_gradients():
    trained, other, unused = parameter(2.0), parameter(3.0), parameter(5.0)
    fit(torch.optim.SGD([trained, unused], 0.5), lambda step: (trained * other).sum(), 1, clip=None,
        gradients=only_parameters)  # fmt: skip
    assert trained.item() == 0.5 and other.grad is None and unused.item() == 5.0


def test_gradients_may_be_there_already():
    x = parameter(1.0)

    def loss_at(step):
        x.square().sum().backward()
        x.sum().backward()  # parts add up
        return torch.tensor(7.0)

    assert fit(torch.optim.SGD([x], 0.1), loss_at, 2, clip=None, gradients=already_there) == [7.0, 7.0]
    assert x.item() == pytest.approx(0.7 - 0.1 * (2 * 0.7 + 1))


def test_the_cosine_rises_and_falls():
    rates = rates_of(cosine(0.1), 100)
    assert max(rates) == rates[9] == 1.0 and rates[0] == 0.1 and rates[-1] < 0.01


def test_the_other_schedules():
    assert rates_of(constant, 3, 0.3) == [0.3] * 3
    assert rates_of(by_rate(lambda peak, step, steps: peak * step), 3, 0.5) == [0.0, 0.5, 1.0]
    assert rates_of(linear_to(0.0), 4) == [1.0, 0.75, 0.5, 0.25]
    assert rates_of(linear_to(0.5, rise=2), 4) == pytest.approx([0.5, 0.875, 0.75, 0.625])
    assert rates_of(cosine_to(0.0), 4) == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert rates_of(cosine_to(0.2, rise=2), 2) == pytest.approx([0.5, 0.6])


def test_a_conversion_warms_up_over_a_twentieth_and_ends_at_a_twentieth():
    rates = rates_of(warmed(400), 400)
    assert rates[:20] == pytest.approx([(n + 1) / 20 for n in range(20)], rel=0.01)
    assert max(rates) == rates[19] and rates[-1] == pytest.approx(0.05, abs=1e-4)
    assert rates_of(warmed(8), 8)[0] == 1.0


def test_one_cycle_is_that_of_torch():
    x = parameter(1.0)
    optimizer = torch.optim.AdamW([x], 0.1)
    set_rates, seen = one_cycle(0.1)(optimizer, 50), []
    for step in range(50):
        set_rates(step)
        optimizer.step()
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
    theirs = torch.optim.AdamW([x], 0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.1, 50, pct_start=0.1)
    for rates in seen:
        assert rates == (theirs.param_groups[0]["lr"], theirs.param_groups[0]["betas"][0])
        theirs.step()
        if rates is not seen[-1]:
            cycle.step()
    with pytest.raises(ValueError, match="begun at step 0"):
        fit(torch.optim.AdamW([x], 0.1), lambda step: x.sum(), 5, start=2, schedule=one_cycle())
