"""Lags and budgets of rehearsal, and that the parts of the digits have no image in common."""

import pytest
import torch

from regard.claims.digits import SIZES, digits
from regard.claims.findings import power_law_rehearsal as claim


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_shares_are_a_power_of_the_lag(alpha):
    share = claim.shares(6, alpha)
    assert share.sum() == pytest.approx(1)
    for task in range(6):  # the newest old task has lag 1
        assert share[task] / share[5] == pytest.approx((6 - task) ** -alpha, rel=1e-5)


def test_there_is_an_old_task_to_rehearse():
    with pytest.raises(ValueError, match="no old task"):
        claim.shares(0, 1.0)


def test_every_arm_rehearses_as_many_images_and_old_tasks_alone(monkeypatch):
    monkeypatch.setattr(claim, "LEARN", 2)
    monkeypatch.setattr(claim, "REHEARSE", 5)
    monkeypatch.setattr(claim, "TASKS", 4)
    runs = {name: claim.run(arm, 0, 0.1, "choice") for name, arm in claim.ARMS.items()}
    totals = {name: sum(run.rehearsed) for name, run in runs.items()}
    assert totals["power"] == totals["uniform"] == totals["power_2"] == 3 * 5 * claim.BATCH
    assert totals["none"] == totals["longer"] == 0
    assert all(run.rehearsed[3] == 0 for run in runs.values())
    first, *_, last = runs["power_2"].rehearsed[:3]
    assert first > last  # it has been old three times, most of its images from the phase after it


def test_tasks_are_orders_of_the_same_pixels():
    learner = claim.Learner(0, 0.1)
    assert learner.orders.sort(1).values.equal(torch.arange(64).expand(claim.TASKS, -1))
    assert len({tuple(order) for order in learner.orders.tolist()}) == claim.TASKS


def test_parts_of_the_digits_have_nothing_in_common():
    parts = digits()
    assert {name: len(part.labels) for name, part in parts.items()} == SIZES
    seen = [{tuple(row) for row in part.images.flatten(1).tolist()} for part in parts.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert all(part.labels.unique().numel() == 10 for part in parts.values())
