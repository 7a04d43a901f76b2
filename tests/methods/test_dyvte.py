"""DyVTE: it refuses without routers; routers are written, read and trained."""

import pytest
import torch

from regard.methods.tokens import dyvte
from regard.ops.images import LayerView


def view(layer: int, states: torch.Tensor) -> LayerView:
    visual = torch.arange(len(states)) < 3
    return LayerView(
        layer, 2, torch.arange(3), torch.zeros(3), states, visual, ~visual, *[lambda rows: rows] * 3
    )


def test_without_routers_it_refuses_and_with_none_nothing_leaves():
    states = torch.randn(6, 4)
    with pytest.raises(ValueError, match="trained routers"):
        dyvte.after(view(0, states), dyvte.Config())
    with pytest.raises(ValueError, match="a router for each layer"):
        dyvte.after(view(0, states), dyvte.Config((None,) * 3))
    assert dyvte.after(view(0, states), dyvte.Config(())) is None
    assert [dyvte.after(view(i, states), dyvte.Config(exit=1)) is None for i in (0, 1)] == [True, False]


def test_a_trained_router_decides_by_what_it_learned_from_a_file_too(tmp_path):
    pairs = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    labels = (pairs[:, 5] > 0).long()
    router = dyvte.trained(pairs, labels, hidden=64, epochs=20, rate=1e-2)
    assert (router(pairs).argmax(1) == labels).float().mean() > 0.95
    dyvte.write((None, router), str(tmp_path / "routers.pt"))
    cfg = dyvte.Config(str(tmp_path / "routers.pt"))
    leaves = torch.zeros(6, 4).index_fill(1, torch.tensor([1]), 3.0)
    assert dyvte.after(view(0, leaves), cfg) is None
    assert len(dyvte.after(view(1, leaves), cfg)) == 0 and dyvte.after(view(1, -leaves), cfg) is None
