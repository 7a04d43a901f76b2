"""What claims share, and the ledger: where claims lie, what was measured last."""

import json
from itertools import count

import pytest
import torch
from torch import nn

from regard import catalog
from regard.claims import lab, ledger


class Clock:
    """Each side takes the seconds that the next number of its list says."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def side(self, *seconds):
        left = iter(seconds)

        def run():
            self.now += next(left)

        return run


def test_the_exponent_of_a_power_is_found():
    for power in (0.5, 1.0, 2.0):
        sizes = (100, 400, 1600, 6400)
        assert lab.slope(sizes, [3e-4 * n**power for n in sizes]) == pytest.approx(power, abs=1e-4)
    assert lab.slope((1024, 8192), [1.0, 64.0]) == pytest.approx(2, abs=1e-4)
    with pytest.raises(ValueError, match="two sizes or more"):
        lab.slope((1024,), [1.0])


def test_sides_take_turns_and_warm_rounds_do_not_count():
    clock, order = Clock(), []
    sides = {"a": clock.side(9, 1, 2, 3), "b": clock.side(9, 4, 6, 8)}
    seconds = lab.alternate(sides, rounds=3, clock=clock, arguments=lambda name: order.append(name) or ())
    assert seconds == {"a": [1, 2, 3], "b": [4, 6, 8]} and order == ["a", "b"] * 4
    assert lab.median_times({"a": clock.side(5, 1, 9)}, rounds=3, warm=0, clock=clock) == {"a": 5}
    assert lab.median_time(clock.side(7, 2), rounds=1, clock=clock) == 2


def test_what_is_given_is_made_before_the_clock_starts():
    clock = Clock()
    seen = []

    def arguments(name):
        clock.now += 100
        return (name, clock.now)

    assert lab.alternate({"a": lambda *got: seen.append(got)}, 2, arguments=arguments, clock=clock) == {
        "a": [0, 0]
    }
    assert seen == [("a", 100), ("a", 200), ("a", 300)]


def test_ratios_of_pairs():
    clock = Clock()
    pairs = lab.paired_ratios(clock.side(9, 1, 2, 10, 4), clock.side(9, 2, 6, 10, 16), rounds=4, clock=clock)
    assert pairs.by_round == [2, 3, 1, 4]
    assert pairs.median == 2.5 and pairs.spread == (1.75, 3.25)
    assert pairs.medians == (3, 8) and pairs.of_medians == 8 / 3


def test_seeds_give_the_same_numbers_and_leave_the_others_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    with lab.seeded(0):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), wanted)
    with lab.seeded(0):
        assert torch.equal(torch.rand(2), first)
    g = torch.Generator().manual_seed(5)
    drawn = [torch.randn(1, 2, 7, d, generator=g) for d in (3, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(lab.random_qkv(lab.generator(5), 2, 7, 3, 4), drawn))


def test_differences():
    a, b = torch.tensor([1.0, -6.0]), torch.tensor([1.5, -4.0])
    assert lab.difference(a, b) == 2.0 and lab.relative_difference(a, b) == 0.5


def test_small_trainings_learn_and_a_sweep_keeps_the_order_of_its_rates():
    x = torch.arange(8).view(2, 4)
    y = (x + 1) % 8
    y[0, 0] = -100

    def accuracy(rate):
        with lab.seeded(0):
            model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8))
        before = lab.mean_loss(model, [(x, y)])
        lab.trained(model, [(x, y)] * 60, rate)
        assert lab.mean_loss(model, [(x, y)]) < before
        return lab.right_answers(model, x, y, batch=1)[y >= 0].float().mean().item()

    accuracies = lab.sweep((1e-1, 1e-4), accuracy)
    assert list(accuracies) == [1e-1, 1e-4] and accuracies[1e-1] == 1.0 > accuracies[1e-4]
    assert lab.count_parameters(nn.Linear(16, 8)) == 16 * 8 + 8


def test_a_training_takes_its_batches_in_turn_and_leaves_labels_out_that_do_not_count():
    x = torch.arange(8).view(2, 4)
    y = (x + 1) % 8
    y[0, 0] = -100
    model, seen = nn.Embedding(8, 8), []
    kept = y >= 0
    wanted = nn.functional.cross_entropy(model(x)[kept], y[kept])
    assert lab.token_loss(model, x, y).item() == pytest.approx(wanted.item(), abs=1e-6)
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    lab.trained(model, [(x, y), (x.flip(1), y)], 1e-3)
    assert len(seen) == 2 and torch.equal(seen[0], x) and torch.equal(seen[1], x.flip(1))


def test_every_claim_lies_with_its_kind_and_its_last_results_speak_of_it():
    recorded = ledger.recorded()
    assert sorted(recorded) == ledger.names()
    for name in ledger.names():
        path, claim, rows = ledger.path_of(name), ledger.claim(name), recorded[name]
        kind = catalog.get(name).kind if name in catalog.pages() else "findings"
        assert path.parent.name == kind and path.stem == claim.name
        models = [row.get("model") for row in rows]
        assert models == [m for m in claim.models or (None,) if m in models], name
        for row in rows:
            said = (claim.statement, claim.bound, claim.note(row.get("model")))
            assert (row["name"], row["statement"], row["bound"], row["note"]) == (name, *said)
            assert row["verdict"] in ("holds", "contradicted", "fails")
            failing = {part for part, holds in row.get("parts", {}).items() if not holds}
            assert "parts" not in row or failing == {*claim.parts_that_fail(row.get("model"))}, name


def test_a_result_is_written_beside_its_claim(tmp_path, monkeypatch):
    numbers = count()
    monkeypatch.setattr(ledger, "paths", lambda: {"one": tmp_path / "one.py"})
    assert ledger.recorded() == {}
    for _ in range(2):
        row = {"name": "one", "measured": {"x": next(numbers), "y": torch.tensor(0.5)}}
        ledger.record([row])
    assert ledger.recorded() == {"one": [{"name": "one", "measured": {"x": 1, "y": 0.5}}]}
    assert json.loads((tmp_path / "one.json").read_text())["measured"]["x"] == 1
    with pytest.raises(KeyError, match="one"):
        ledger.record([{"name": "onne"}])
