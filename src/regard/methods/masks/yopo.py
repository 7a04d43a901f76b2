"""YOPO's neighbour-aware attention: a patch sees the patches around it on its grid, words see everything.

    i sees j  if  j ≤ i  and, for two patches of one image,  max(|y_i - y_j|, |x_i - x_j|) ≤ radius

Patches attend mostly to what lies near, and their scores are most of a prompt's. The share of patch pairs that stays
falls from 1 to about (2 radius + 1)² / (height · width). Words ask and are asked as before.

The role `image` numbers images, or crops of one, from 1, each with a grid (y, x) of its own. Patches of two grids have
no distance: they do not see each other, unless `across` is set. A word, then 3 x 3 patches; the last sees the word and
the four patches of its corner:

>>> from regard.core.roles import Roles
>>> y, x = [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2], [-1, 0, 1, 2, 0, 1, 2, 0, 1, 2]
>>> build(Config(radius=1)).row(9, roles=Roles(image=[0] + [1] * 9, y=y, x=x))
tensor([[[0, 5, 6, 8, 9]]])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, causal, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    radius: int = 2  # patches to each side; 2 is a window of 5 x 5
    across: bool = False  # patches see those of earlier images and crops

    def __post_init__(self) -> None:
        require(self.radius >= 0, "radius >= 0", radius=self.radius)


@predicate("image")
def word_or_other_image(at: Coordinates, across: bool) -> Tensor:
    """Pairs on which the grid has no say."""
    asks, asked = at.q_role("image"), at.k_role("image")
    word = (asks <= 0) | (asked <= 0)
    return word | (asks != asked) if across else word


@predicate("image", "y", "x")
def neighbours(at: Coordinates, radius: int) -> Tensor:
    dy, dx = (at.q_role(axis) - at.k_role(axis) for axis in ("y", "x"))
    same = at.q_role("image") == at.k_role("image")
    return same & (torch.maximum(dy.abs(), dx.abs()) <= radius)


def build(cfg: Config) -> Mask:
    return causal() & (word_or_other_image(cfg.across) | neighbours(cfg.radius))


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("causal_self",),
    test_settings=({"radius": 0}, {"radius": 1}, {"radius": 1, "across": True}),
    card=Card(
        title="Neighbour-aware visual attention (YOPO)",
        paper="Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See (2024)",
        year=2024,
        idea="a patch sees the patches within a radius on its grid; words stay as they are",
        cost="(2 radius + 1)² keys per patch, all per word",
        state="all keys: words read every patch",
        needs=("image", "y", "x"),
        lineage=("causal", "window"),
        neutral={"radius": 2**40, "across": True},
        caveat=(
            "the first of the paper's cuts: inactive heads and late layers, and in its code half of the "
            "feed-forward layer, are not here. The released code overwrites the block of patches in the additive "
            "mask, so that a patch sees its later neighbours too: there causality inside the image is lost, here it "
            "holds. It fixes one 24 x 24 grid and a square window (5 in its 13B script, the default here); several "
            "grids and `across` are ours. LLaVA is trained further with the cuts, other models are not"
        ),
    ),
)
