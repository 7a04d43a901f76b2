"""The penalty turns a choice, the way back bans what was taken there, and what is taken back leaves no trace."""

from dataclasses import replace

import pytest
import torch

from regard import attach
from regard.attaching.search import SearchRun
from regard.core import Method
from regard.methods.steering import opera as page
from regard.testing.pictures import alone, batch


class Scripted:
    """A model of three words and an end, 3: `logits` at each step, and which words lean on the answer's first token."""

    def __init__(self, logits, leaning, tokens):
        self.logits, self.leaning, self.tokens, self.ends = torch.tensor(logits), leaning, tokens, (3,)
        self.prompt, self.rows = torch.zeros(1, 2, dtype=torch.long), []

    fed = property(lambda self: len(self.rows))

    def begin(self, beams):
        self.beams = beams
        return self.logits[None].repeat(beams, 1)

    def row(self, tokens, size):
        """[..., size]: a half on the first token where a word leans, else a twentieth everywhere."""
        leans = torch.isin(tokens, torch.tensor(self.leaning))[..., None]
        columnar = torch.zeros(size).index_fill(0, torch.tensor(0), 0.5)
        return torch.where(leans, columnar, torch.full((size,), 0.05))

    def feed(self, tokens):
        self.rows.append(self.row(tokens, self.fed + 1))
        return self.logits[None].repeat(self.beams, 1)

    def look(self, candidates):
        return self.row(candidates, self.fed + 1)

    def reorder(self, rows):
        self.rows = [seen[rows] for seen in self.rows]

    def take_back(self, count):
        self.rows = self.rows[: len(self.rows) - count]

    @property
    def attention(self):
        return torch.stack([torch.nn.functional.pad(x, (0, self.fed - x.shape[-1])) for x in self.rows], 1)


def test_a_token_that_leans_on_a_summary_loses_to_one_that_does_not():
    found = {}
    for alpha in (0.0, 1.0):
        cfg = page.Config(beams=1, candidates=2, sigma=10.0, unit=1.0, alpha=alpha, rollbacks=0)
        found[alpha] = page.search(Scripted([2.0, 1.5, -9.0, -99.0], [0], 3), cfg)[0].tolist()
    assert found == {0.0: [0, 0, 0], 1.0: [0, 1, 1]}


def test_scores_are_those_of_a_softmax_over_the_candidates():
    run = Scripted([2.0, 1.5, -9.0, -99.0], [0], 3)
    run.begin(1)
    run.feed(torch.tensor([0]))
    cfg = page.Config(beams=1, candidates=2, sigma=10.0, unit=0.1)
    scores, column = page.distrusted(run, run.logits[None].log_softmax(-1), cfg)
    phi = torch.tensor([5.0 * 5.0, 5.0 * 0.5])  # the first column; word 1 leans on nothing
    assert torch.allclose(scores[0, :2], (torch.tensor([2.0, 1.5]) - 0.1 * phi).log_softmax(-1))
    assert scores[0, 2:].eq(-torch.inf).all() and column == 0


def test_the_way_back_bans_what_was_taken_behind_the_summary():
    cfg = page.Config(beams=1, candidates=2, sigma=10.0, unit=0.0, patience=2, rollbacks=1)
    run = Scripted([2.0, 1.5, -9.0, -99.0], [0], 6)
    assert page.search(run, cfg)[0].tolist() == [0, 1, 0, 0, 0, 0]
    without = page.Config(beams=1, candidates=2, sigma=10.0, unit=0.0, patience=2, rollbacks=0)
    assert page.search(Scripted([2.0, 1.5, -9.0, -99.0], [0], 6), without)[0].tolist() == [0] * 6
    # with one candidate the likeliest of the others is looked at
    one = page.Config(beams=1, candidates=1, sigma=10.0, unit=0.0, patience=2, rollbacks=1)
    assert page.search(Scripted([2.0, 1.5, -9.0, -99.0], [0], 6), one)[0].tolist() == [0, 1, 0, 0, 0, 0]


@torch.no_grad()
def test_what_was_taken_back_and_fed_again_gives_the_same_logits():
    model, both = batch("llava")
    seen = []

    def search(run: SearchRun, cfg: page.Config) -> torch.Tensor:
        run.begin(2)
        words = torch.tensor([[5, 6], [7, 8], [9, 10]])
        first = [run.feed(w) for w in words]
        rows = run.attention
        run.look(words[0][:, None])
        run.take_back(2)
        again = [run.feed(w) for w in words[1:]]
        seen.append((torch.stack(first[1:]), torch.stack(again), rows, run.attention))
        return run.prompt.new_zeros(1, 1)

    method = Method("opera", replace(page.METHOD, search=search), page.Config())
    with attach(model, method):
        model.generate(**alone(both, 0), max_new_tokens=1)
    first, again, rows, rows_again = seen[0]
    assert torch.equal(first, again) and torch.equal(rows, rows_again)
    assert rows.shape == (2, 3, 3) and rows.triu(1).eq(0).all()


@pytest.mark.parametrize("family", ["qwen25vl", "qwen3vl"])
@torch.no_grad()
def test_positions_of_several_components_are_those_of_beam_search(family):
    model, both = batch(family)
    how = dict(max_new_tokens=5, pad_token_id=0, eos_token_id=2)
    for text in (0, 1):
        inputs = alone(both, text)
        wanted = model.generate(**inputs, **how, num_beams=3, do_sample=False)
        with attach(model, "opera", beams=3, alpha=0.0):
            assert torch.equal(model.generate(**inputs, **how), wanted)


@torch.no_grad()
def test_behind_the_way_back_the_search_goes_on_as_the_model_does():
    """With one beam and no penalty: greedy up to the place, its second choice there, greedy again."""
    model, both = batch("llava")
    inputs = alone(both, 0)
    how, start = dict(pad_token_id=0, eos_token_id=None), inputs["input_ids"].shape[1]
    greedy = model.generate(**inputs, **how, max_new_tokens=8, do_sample=False)
    with attach(model, "opera", beams=1, unit=0.0, patience=2, rollbacks=1):
        found = model.generate(**inputs, **how, max_new_tokens=8)
    at = int((found != greedy).nonzero()[0, 1])
    assert at > start
    grown = found[:, : at + 1]
    wanted = {**inputs, "input_ids": grown, "attention_mask": torch.ones_like(grown)}
    logits = model(**{**wanted, "input_ids": grown[:, :-1], "attention_mask": None}).logits[0, -1]
    assert found[0, at] == logits.topk(2).indices[1]
    on = model.generate(**wanted, **how, max_new_tokens=start + 8 - at - 1, do_sample=False)
    assert torch.equal(on, found)
