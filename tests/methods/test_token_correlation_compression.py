"""Token-level Correlation-guided Compression: blank crops keep a token, crops of different tokens all of theirs."""

import pytest
import torch

from regard.methods.tokens import token_correlation_compression as page
from regard.ops.images import ImageView


def view(keys: torch.Tensor, scores: torch.Tensor, asked: list | None = None) -> ImageView:
    def noted(what: torch.Tensor, kind: str):
        def give(layer: int) -> torch.Tensor:
            if asked is not None:
                asked.append((kind, layer))
            return what

        return give

    return ImageView(
        torch.arange(len(keys)).double()[:, None], class_attention=noted(scores[None], "class"),
        tower_keys=noted(keys, "keys"), tower_layers=3, feature_layer=-2,
    )  # fmt: skip


def test_an_image_keeps_as_many_as_are_not_redundant():
    keys = torch.cat([torch.eye(6), torch.ones(5, 6)]).double()  # five alike, six that are like none
    found = page.before([view(keys, torch.rand(11))], page.Config(copies=3))
    assert len(found[0].keep) == 6
    assert len(page.before([view(keys, torch.rand(11))], page.Config(copies=4))[0].keep) == 11
    assert len(page.before([view(torch.ones(9, 2), torch.rand(9))], page.Config(copies=0))[0].keep) == 1


def test_a_total_is_kept_whatever_the_densities():
    blank, full = view(torch.ones(8, 4), torch.rand(8)), view(torch.eye(8), torch.rand(8))
    counts = [len(r.keep) for r in page.before([blank, full, blank], page.Config(keep=0.5, copies=2))]
    assert sum(counts) == 12 and counts[1] == 8
    with pytest.raises(ValueError, match="a token for each image"):
        page.before([blank, full, blank], page.Config(keep=2))


def test_keys_are_of_the_shallow_layer_and_attention_of_the_projected_one():
    asked: list = []
    page.before([view(torch.eye(4), torch.rand(4), asked)], page.Config(keep=2, shallow=0))
    assert sorted(asked) == [("class", -2), ("keys", 0)]


def test_nothing_is_lost_where_attention_is_equal():
    keys = torch.eye(3)[[0, 1, 2, 0, 1, 2]].double()
    found = page.before([view(keys, torch.full((6,), 0.25))], page.Config(keep=3))[0]
    assert found.keep.tolist() == [0, 1, 2]
    assert found.features.flatten().tolist() == [1.5, 2.5, 3.5]  # of 0 and 3, 1 and 4, 2 and 5
