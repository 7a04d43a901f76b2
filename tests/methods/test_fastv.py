"""FastV: which tokens it names, at which layer, and of whom it asks the weights."""

from typing import Any

import pytest
import torch

from regard.methods.tokens.fastv import Config, after
from regard.ops.images import LayerView

WHOLE = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0)).softmax(-1).tril()
VISUAL = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 0]).bool()


def view(layer: int, layers: int = 4) -> LayerView:
    facts: dict[str, Any] = dict(states=torch.zeros(9, 4), visual=VISUAL, question=~VISUAL)
    return LayerView(
        layer, layers, alive=torch.tensor([0, 1, 2, 4, 5, 7]), image=torch.zeros(8, dtype=torch.long), **facts,
        weights=lambda rows: {"last": WHOLE[:, -1:, VISUAL]}[rows], scores=lambda rows: WHOLE, whole=lambda: WHOLE,
    )  # fmt: skip


def test_it_acts_once_after_its_layers_and_answers_in_numbers_of_the_text():
    assert after(view(0), Config(keep=2)) is None and after(view(2), Config(keep=2)) is None
    for queries, rows in (("all", WHOLE), ("last", WHOLE[:, -1:])):
        best = rows.mean((0, 1))[VISUAL].topk(2).indices.sort().values
        assert torch.equal(after(view(1), Config(keep=2, queries=queries)), view(1).alive[best])


def test_a_share_is_of_all_visual_tokens_and_a_budget_of_all_changes_nothing():
    assert len(after(view(1), Config(keep=0.5))) == 4
    assert after(view(1), Config(keep=1.0)) is None and after(view(1), Config(keep=6)) is None


def test_a_layer_after_which_none_follows_is_an_error():
    with pytest.raises(ValueError, match="layer < layers"):
        after(view(0, layers=2), Config(layer=2))
