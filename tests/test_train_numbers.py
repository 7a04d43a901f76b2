"""What a training run trains on, at which rates, and what its score is of: worked by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from regard.nn import RegardForCausalLM
from regard.train import Plan, run, train
from regard.train.run import evaluate
from regard.train.tasks import HELD_OUT, TASKS, Text

SMALL = dict(length=16, pairs=2, vocab=16, tested=10, batch=4, width=8, layers=1, conv=0)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_scored_is_never_trained_on(task):
    plan = Plan(task=task, **{**SMALL, "vocab": 64, "tested": 512})
    held = {tuple(row) for row in TASKS[task].test(plan)[0].flatten(1).tolist()}
    trained = [
        tuple(row) for step in range(300) for row in TASKS[task].batch(plan, step)[0].flatten(1).tolist()
    ]
    assert len(held) > 100 and len({*trained}) > 1000 and not held & {*trained}
    again = TASKS[task].batch(plan, 7)
    assert all(torch.equal(a, b) for a, b in zip(again, TASKS[task].batch(plan, 7), strict=True))


def test_the_last_tenth_of_the_text_is_held_out():
    """No window of training reaches into it, the windows of the test lie side by side from its start."""
    plan = Plan(task="text", **SMALL)
    text = Text.all(plan)
    first = int((1 - HELD_OUT) * len(text))
    inputs, labels = Text.test(plan)
    for i, (row, after) in enumerate(zip(inputs, labels, strict=True)):
        start = first + i * plan.length
        assert torch.equal(row, text[start : start + plan.length].long())
        assert torch.equal(after, text[start + 1 : start + 1 + plan.length].long())
    assert HELD_OUT == 0.1 and len(inputs) == plan.tested
    numbers = torch.arange(len(text))
    seen = Text.cut(numbers[:first], torch.tensor([0, first - plan.length - 1]), plan.length)
    assert seen[0].min() == 0 and seen[1].max() == first - 1


def test_training_windows_end_before_the_held_out_part(monkeypatch):
    places = torch.arange(4000)
    monkeypatch.setattr(Text, "all", staticmethod(lambda plan: places))
    plan = Plan(task="text", **SMALL)
    drawn = torch.cat([torch.cat(Text.batch(plan, step)) for step in range(300)])
    assert drawn.max() < 3600 <= drawn.max() + 20 and drawn.min() < 20
    assert torch.cat(Text.test(plan)).min() == 3600


def test_windows_of_the_test_end_within_the_text(monkeypatch):
    plan = Plan(task="text", **SMALL)
    for held in range(4 * plan.length - 1, 4 * plan.length + 3):
        places = torch.arange(10 * held)
        monkeypatch.setattr(Text, "all", staticmethod(lambda plan, places=places: places))
        inputs, labels = Text.test(plan)
        assert len(inputs) >= 3 and labels.max() < len(places) == inputs.min() + held


class Knowing:
    """A model that is right on the rows that it knows, and says the token after the right one of all others."""

    def __init__(self, plan: Plan, known: torch.Tensor) -> None:
        self.vocab, self.known = TASKS[plan.task].vocab(plan), {tuple(row) for row in known.tolist()}
        inputs, labels = TASKS[plan.task].test(plan)
        self.right = {tuple(row): wanted for row, wanted in zip(inputs.tolist(), labels, strict=True)}
        self.modes = []

    def __call__(self, inputs, use_cache):
        rows = [self.right.get(tuple(row), torch.zeros_like(inputs[0])) for row in inputs.tolist()]
        wanted = torch.stack(rows).clamp(min=0)
        wrong = torch.tensor([tuple(row) not in self.known for row in inputs.tolist()])[:, None]
        said = (wanted + wrong) % self.vocab
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, self.vocab).float())

    def eval(self):
        self.modes.append("eval")

    def train(self):
        self.modes.append("train")


def test_the_score_is_the_share_of_held_out_questions():
    """Ten rows in batches of 4, 4 and 2: the two of the short batch count as the others do."""
    plan = Plan(**SMALL)
    rows = TASKS["mqar"].test(plan)[0]
    assert evaluate(Knowing(plan, rows), plan) == 1
    short = Knowing(plan, rows[8:])
    assert evaluate(short, plan) == pytest.approx(2 / 10) and short.modes == ["eval", "train"]
    assert evaluate(Knowing(plan, rows[:3]), plan) == pytest.approx(3 / 10)


def test_the_score_of_text_is_in_bits():
    labels = torch.tensor([[3, 5]])
    assert Text.measure(torch.zeros(1, 2, 256), labels) == pytest.approx(
        (16.0, 2)
    )  # one of 256 is eight bits
    sure = torch.log(torch.tensor([0.5, 0.25, 0.25])).expand(1, 2, 3)
    assert Text.measure(sure, torch.tensor([[0, 1]])) == pytest.approx((1 + 2, 2))


def rates_of_steps(monkeypatch) -> list[float]:
    """The rate of every step of AdamW from now on."""
    seen, step = [], torch.optim.AdamW.step

    def noted(self, *args, **rest):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return seen


def test_the_rates_of_a_run_rise_and_fall_by_half_a_cosine(tmp_path, monkeypatch):
    """Two of twenty steps rise, the others fall; a run that was stopped goes on at the rate of its next step."""
    seen = rates_of_steps(monkeypatch)
    plan = Plan(steps=20, every=10, rates=(0.01, 0.04), **SMALL)
    shares = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * s / 18)) for s in range(18))]

    def stop(point):
        if point["step"] == 13 and point["rate"] == 0.01:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(plan, tmp_path, stop)
    assert seen == pytest.approx([0.01 * share for share in shares[:13]])
    seen.clear()
    train(plan, tmp_path)
    assert seen == pytest.approx([0.01 * s for s in shares[10:]] + [0.04 * s for s in shares])


def test_what_is_left_of_the_steps_is_a_row_too(tmp_path):
    """Of seven steps, scored every third, the last; it is what the result is of."""
    seen = []
    result = train(Plan(steps=7, every=3, rates=(1e-2,), **SMALL), tmp_path, seen.append)
    scored = {point["step"]: point["score"] for point in seen if point["score"] is not None}
    assert [*scored] == [3, 6, 7] and result["score"] == scored[7]


def test_the_best_rate_is_the_one_that_scores_best(tmp_path, monkeypatch):
    """Of three rates the second; `best` holds its weights, and what is said is its score."""
    scores = iter([0.3, 0.7, 0.5])
    monkeypatch.setattr(run, "evaluate", lambda model, plan: next(scores))
    kept, saved = [], RegardForCausalLM.save_pretrained

    def noted(self, path):
        kept.append(self.state_dict()["lm_head.weight"].clone())
        saved(self, path)

    monkeypatch.setattr(RegardForCausalLM, "save_pretrained", noted)
    result = train(Plan(steps=1, every=1, rates=(1e-3, 1e-2, 3e-2), **SMALL), tmp_path)
    assert (result["rate"], result["score"]) == (1e-2, 0.7) and len(kept) == 2
    assert result["scores"] == {
        "accuracy at rate 0.001": 0.3,
        "accuracy at rate 0.01": 0.7,
        "accuracy at rate 0.03": 0.5,
    }
    assert "accuracy 70.0% after 1 steps, at the best of 3 learning rates (0.01)" in result["sentence"]
    best = RegardForCausalLM.from_pretrained(tmp_path / "best").state_dict()["lm_head.weight"]
    assert torch.equal(best, kept[1]) and not torch.equal(kept[0], kept[1])


def test_a_trained_decoder_does_not_share_its_embedding_with_its_head():
    model = Plan(**SMALL).model()
    assert model.lm_head.weight is not model.embed.weight
    assert not torch.equal(model.lm_head.weight, model.embed.weight)


@pytest.mark.parametrize("rates", [(), (0.0,), (1e-3, -1e-3)])
def test_a_run_has_a_learning_rate_above_zero(rates):
    with pytest.raises(ValueError, match="learning rates > 0"):
        Plan(rates=rates)
