"""FasterVLM and VTC-CLS: towers without a class token, and what the two have in common."""

import pytest
import torch

from regard.core import Unsupported
from regard.methods.tokens import fastervlm, vtc_cls
from regard.ops.images import ImageView


def view(seed: int = 0, has_class: bool = True) -> ImageView:
    """A tower of five layers of which the fourth is projected; weights are known by their layer."""
    weights = torch.randn(5, 3, 20, generator=torch.Generator().manual_seed(seed)).softmax(-1)

    def of(layer: int) -> torch.Tensor:
        if not has_class:
            raise Unsupported("this tower has no class token")
        return weights[layer]

    return ImageView(
        torch.zeros(20, 4), class_attention=of, received=lambda layer: weights[layer].flip(-1), tower_layers=5,
        feature_layer=-2,
    )  # fmt: skip


@pytest.mark.parametrize("page", [fastervlm, vtc_cls])
def test_a_tower_without_a_class_token_is_refused_unless_what_patches_receive_may_stand_in(page):
    with pytest.raises(Unsupported, match="no class token"):
        page.before([view(has_class=False)], page.Config(keep=4))
    allowed = page.Config(keep=4, without_class="received")
    stand_in, with_class = (page.before([view(has_class=c)], allowed)[0].keep for c in (False, True))
    assert torch.equal(19 - stand_in.flip(0), with_class)


def test_the_projected_layer_alone_gives_both_the_same_and_more_layers_do_not():
    for seed in range(3):
        alone = fastervlm.before([view(seed)], fastervlm.Config(keep=5))[0].keep
        assert torch.equal(vtc_cls.before([view(seed)], vtc_cls.Config(keep=5, start=-2))[0].keep, alone)
        assert torch.equal(vtc_cls.before([view(seed)], vtc_cls.Config(keep=5, start=3))[0].keep, alone)
    assert any(
        not torch.equal(
            vtc_cls.before([view(seed)], vtc_cls.Config(keep=5, start=-99))[0].keep,
            fastervlm.before([view(seed)], fastervlm.Config(keep=5))[0].keep,
        )
        for seed in range(3)
    )


def test_layers_after_the_projected_one_never_count():
    assert [*vtc_cls.layers_of(view(), 0)] == [*vtc_cls.layers_of(view(), -99)] == [-5, -4, -3, -2]
    with pytest.raises(ValueError, match="not after the one that is projected"):
        vtc_cls.before([view()], vtc_cls.Config(start=-1))
