"""`regard bench caches`: a step and the attention in it are two rows, of the same two caches."""

from contextlib import nullcontext

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regard import catalog
from regard.attaching.attachment import attach
from regard.bench import caches

SMALL = caches.Sizes(prompt=16, kept=8, context=64, share=0.25, layers=3, repeats=1)


def test_a_method_that_reads_a_part_has_a_row_for_a_step_and_one_for_its_attention(monkeypatch):
    monkeypatch.setattr(caches, "READING", ("quest_cache",))
    with torch.no_grad():
        step, attention, _ = caches.steps(SMALL)
    assert step["case"] == "quest_cache: a step of 3 layers at 64 tokens, 25% read"
    assert step["note"] == "2 of 3 layers are read whole"
    assert attention["case"] == "quest_cache: attention of a layer at 64 tokens, 25% read"
    assert 0 < attention["ms"] < step["ms"] and 0 < attention["baseline_ms"] < step["baseline_ms"]


@pytest.mark.parametrize("under", [None, "quest_cache"])
def test_attention_is_timed_layer_by_layer_and_left_as_it_was(under):
    model, token, sdpa = caches.model_of(3), torch.tensor([[5]]), ALL_ATTENTION_FUNCTIONS["sdpa"]
    attached = nullcontext() if under is None else attach(model, catalog.method(under, budget=0.25))
    with torch.no_grad(), attached:
        cache = caches.filled(model, 64)
        with caches.clocked(model) as times:
            model(token, past_key_values=cache)
        assert len(times) == 3 and min(times) > 0
        model(token, past_key_values=cache)
        assert len(times) == 3
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
