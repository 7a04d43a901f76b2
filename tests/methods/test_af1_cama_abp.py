"""The edits of All-for-One: what reaches the last token goes through the window, and nowhere else."""

from dataclasses import dataclass

import pytest
import torch

from regard import attach
from regard.claims.tracing import af1_cama_abp as claim
from regard.methods.tracing import af1_cama_abp as page
from regard.testing.zoo import build

LAYERS, TOKENS = 3, 6


@dataclass
class Start:
    start: int
    held_out: float

    def accuracy(self, part):
        assert part == "test"
        return self.held_out


def logits(model, ids, cfg, means=None):
    edits = [*(page.cama(means, cfg) if means is not None else ()), *page.abp(TOKENS, LAYERS, cfg)]
    with torch.no_grad(), attach(model, edits):
        return model(input_ids=ids).logits[:, -1]


def moved(cfg, token, means=None):
    """By how much the last logits move when one token is another."""
    model, _ = build("llama")
    ids = torch.randint(3, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, token] = 101
    return float((logits(model, ids, cfg, means) - logits(model, other, cfg, means)).abs().max())


@pytest.mark.parametrize("token", [1, 2, TOKENS - 2])
def test_without_a_window_the_last_token_sees_itself_and_the_first(token):
    assert moved(page.Config(0, 0), token) == 0
    assert moved(page.Config(0, 1), token) > 1e-4
    assert moved(page.Config(0, LAYERS), token) > 1e-4
    assert moved(page.Config(0, 0), 0) > 1e-4
    assert moved(page.Config(0, 0), TOKENS - 1) > 1e-4


@pytest.mark.parametrize("wait", [1, 2, 3])
def test_what_is_replaced_forgets_the_tokens(wait):
    """With the same means, tokens of the prompt make no difference, whatever the window after them."""
    means = torch.randn(1, TOKENS, build("llama")[0].config.hidden_size)
    for token in range(1, TOKENS):
        assert moved(page.Config(wait, LAYERS - wait), token, means) == 0
    assert moved(page.Config(wait, LAYERS - wait), 1) > 1e-4


def test_others_do_not_see_each_other():
    (site,) = {edit.site.layers for edit in page.abp(TOKENS, LAYERS, page.Config(1, 2))}
    assert site == (1, 2)
    rows = {edit.site.rows: edit.site.keys for edit in page.abp(TOKENS, LAYERS, page.Config(1, 1))}
    assert rows == {(q,): tuple(range(1, q)) for q in range(2, TOKENS)}


def test_bad_input_is_refused():
    acts, ids = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, 3]])
    with pytest.raises(ValueError, match="seen at its place"):
        page.measure(acts, ids, torch.tensor([[0, 2, 2]]))
    with pytest.raises(ValueError, match="wait"):
        page.abp(TOKENS, LAYERS, page.Config(2, 2))


@pytest.mark.parametrize(("right", "wanted"), [([0.95], 1), ([0.5, 0.96], 2), ([0.5, 0.94, 0.6], 3)])
def test_a_start_that_did_not_learn_begins_anew(right, wanted, monkeypatch):
    """By held-out accuracy alone; the last start is taken as it is."""
    held = iter(right)
    monkeypatch.setattr(claim, "Trained", lambda seed, start: Start(start, next(held)))
    one, starts = claim.learned(0)
    assert (one.start, starts) == (wanted - 1, wanted)


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(claim, "STEPS", 1)
    monkeypatch.setattr(claim, "RATE", 0.0)


def test_starts_hold_out_the_same_prompts_and_differ_in_weights(untrained):
    a, b, other = claim.Trained(0), claim.Trained(0, 1), claim.Trained(1)
    held = [{*map(tuple, one.prompts[one.parts["test"]].tolist())} for one in (a, b, other)]
    assert held[0] == held[1] != held[2] and len(held[0]) == 69
    assert not held[0] & {*map(tuple, a.prompts[a.parts["train"]].tolist())}
    assert not torch.equal(a.model.lm_head.weight, b.model.lm_head.weight)
    _, x, _, y, _, z, _ = a.prompts[5].tolist()
    assert a.answers[5] == (x + y - z) % 7


def test_what_is_put_in_is_of_the_last_waiting_layer(untrained):
    """The first operand sees BOS and itself: its mean is its own activation there."""
    one = claim.Trained(0)
    prompts = one.prompts[one.parts["test"]]
    with torch.no_grad():
        hidden = one.model(input_ids=prompts, output_hidden_states=True).hidden_states
    for wait in (1, 4):  # hidden[w]: after layer w - 1
        means = one.edits(prompts, claim.page.Config(wait, 1))[0].value
        torch.testing.assert_close(means[:, 0], hidden[wait][:, 1], rtol=1e-4, atol=1e-5)


def test_the_bound_asks_for_every_part():
    row = {"test": 0.96, "kept": 0.92, "lost": 0.4}
    parts = {"test": "learned", "kept": "the best window keeps", "lost": "the worst loses"}
    assert all(claim.bounds([row, row | {"kept": 0.9}]).values())
    for name, value in (("test", 0.94), ("kept", 0.8), ("lost", 0.1)):
        found = claim.bounds([row, row | {name: value}])
        assert [part for part, holds in found.items() if not holds] == [parts[name]]
