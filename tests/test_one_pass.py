"""Sums of weights and the attention itself from one pass over blocks of rows: each is what it is by itself."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from regard import catalog
from regard.attaching import function, views
from regard.attaching.attachment import attach
from regard.attaching.ledger import LedgerLayer
from regard.core import Card, Edit, Method, Site
from regard.kinds.cache import CachePage
from regard.ops import View, softmax
from regard.testing.zoo import DECODERS, build

TOKENS, PADS = 40, (0, 5)  # of a prompt of two rows, and how much of each is padding on the left


@dataclass(frozen=True)
class Config:
    budget: int | float | str | None = None


def seen(observe, **functions) -> Method:
    card = Card("Mine", "none", 2026, "a policy of this test", neutral={"budget": 1.0})
    page = CachePage(config=Config, card=card, budget=lambda cfg: 1.0, observe=observe, **functions)
    return Method("mine", page, Config())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that a short prompt has several."""
    monkeypatch.setattr(softmax, "BLOCK", 700)


def prompt(pads: tuple[int, ...] = PADS) -> dict:
    ids = torch.randint(3, 60, (len(pads), TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(TOKENS) >= torch.tensor(pads)[:, None]).long()}


def logits(model, pads: tuple[int, ...] = PADS) -> torch.Tensor:
    """Of the real tokens."""
    with torch.no_grad():
        return model(**prompt(pads)).logits[prompt(pads)["attention_mask"].bool()]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("name", ["h2o", "observed_attention", "keyformer"])
def test_a_prompt_is_answered_as_by_the_model(family, name, monkeypatch):
    model, _ = build(family)
    want = logits(model)
    for elsewhere in ("native", "run"):
        monkeypatch.setattr(function, elsewhere, lambda *_: pytest.fail("the attention was computed again"))
    with attach(model, catalog.method(name, budget=0.5)):
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("pads", [PADS, (0,)])
def test_what_is_received_is_the_sum_of_the_weights(family, pads):
    model, sums = build(family)[0], []

    def observe(view: View, cfg: Config) -> None:
        asks = 1 if view.asking() is None else view.asking()[:, None, :, None]
        weights = view.weights() * asks
        sums.append((view.received(), view.by_cache_head(weights.sum(2))))
        sums.append((view.received(newest=3), view.by_cache_head(weights[:, :, -3:].sum(2))))
        assert view.cached_output is not None
        assert view.received() is view.received()
        double = view.received(through=lambda weights, rows: 2 * weights)
        torch.testing.assert_close(double, 2 * view.received())
        torch.testing.assert_close(
            view.cached_output, views.run(view.upto(view.stored)), rtol=1e-4, atol=1e-5
        )

    with attach(model, seen(observe)):
        logits(model, pads)
    assert sums
    for got, want in sums:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_page_that_reads_a_part_keeps_its_own_attention():
    """What is read is chosen after it was observed."""
    model, answering = build("llama")[0], []
    observe = lambda view, cfg: answering.append((view.answering, view.received()))  # noqa: E731
    with attach(model, seen(observe, select=lambda view, cfg: None)):
        logits(model)
    assert answering
    assert not any(answer for answer, _ in answering)


def test_gradients_go_through_the_models_attention():
    model, outputs = build("llama")[0], []
    with attach(model, seen(lambda view, cfg: outputs.append((view.received(), view.cached_output)[1]))):
        model(**prompt()).logits.sum().backward()
    assert outputs
    assert all(output is None for output in outputs)


def test_rows_that_an_edit_leaves_alone_are_those_of_the_method_without_it():
    model, h2o = build("llama")[0], catalog.method("h2o", budget=1.0)
    none = Edit(Site("weights", layers=0, heads=0, rows=(0,)), "scale", 1.0)
    with attach(model, h2o):
        want = logits(model)
    with attach(model, [h2o, none]):
        assert torch.equal(logits(model), want)


def test_a_learned_bias_of_a_sliding_layer_goes_with_the_true_index_of_each_slot():
    """The model's columns begin with the first token that its window reaches before this step."""
    # one of 11 tokens is new: the last, which sees tokens 5 to 10
    layer = SimpleNamespace(plain=False, seen=11, reach=LedgerLayer(window=6).reach)
    group = SimpleNamespace(count=None, table=lambda: torch.tensor([[[5, 7, 8, 10]]]))
    bias = torch.arange(5.0, 11.0).view(1, 1, 1, 6)  # of tokens 5 to 10
    q = torch.zeros(1, 1, 1, 4)
    call = SimpleNamespace(
        options={"position_bias": bias}, group=group, layer=layer, heads=None, fed=1, q=q, k=q
    )
    assert views.slot_bias(call).flatten().tolist() == [5, 7, 8, 10]
