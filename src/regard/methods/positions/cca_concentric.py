"""Concentric Causal Attention: image patches take positions by ring, from the border to the centre.

    ring(y, x) = min(y, x, H - 1 - y, W - 1 - x)          R = ⌈min(H, W) / 2⌉ rings
    position   = p0 + ring for a patch, p0 + R for the first token after the image
    i sees j   if  ring_j ≤ ring_i for two patches of one image,  j ≤ i otherwise

Rotary scores decay with distance, and in raster order the top left patch lies H · W tokens away from the
question. Counted by rings no patch is farther than R (576 becomes 12 for 24 x 24), and a patch sees its whole
ring.

>>> image = image_roles(4, 4, before=1, after=2)
>>> positions(image, Config(4, 4))[1:-2].view(4, 4)
tensor([[1, 1, 1, 1],
        [1, 2, 2, 1],
        [1, 2, 2, 1],
        [1, 1, 1, 1]])
>>> positions(image, Config(4, 4))[-2:], next_position(1 + 16 + 2, Config(4, 4))
(tensor([3, 4]), 5)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, predicate
from regard.core.roles import Roles
from regard.kinds.position import PositionPage


@dataclass(frozen=True)
class Config:
    height: int = 24  # H, rows of patches of each image
    width: int = 24  # W, patches in a row

    def __post_init__(self) -> None:
        require(min(self.height, self.width) >= 1, "height, width >= 1", height=self.height, width=self.width)

    @property
    def rings(self) -> int:
        return (min(self.height, self.width) + 1) // 2


def ring(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    return torch.minimum(torch.minimum(y, x), torch.minimum(height - 1 - y, width - 1 - x))


def image_roles(height: int, width: int, before: int = 0, after: int = 0) -> Roles:
    """The roles of some text, one image in raster order, some text."""
    patch = torch.arange(height * width)
    text = [torch.full((before,), -1), torch.full((after,), -1)]
    y, x = (torch.cat([text[0], of, text[1]]) for of in (patch // width, patch % width))
    return Roles(image=(y >= 0).long(), y=y, x=x)


def positions(roles: Roles, cfg: Config) -> Tensor:
    """Positions as the roles' shape; an image counts as `rings` tokens, padding as none."""
    image = roles["image"]
    patch = image > 0
    word = ~patch & (roles["padding"] == 0) if "padding" in roles else ~patch
    starts = patch & (image != torch.nn.functional.pad(image, (1, -1)))
    begun = starts.long().cumsum(-1)
    start = word.long().cumsum(-1) - word.long() + cfg.rings * (begun - patch.long())
    return start + patch * ring(roles["y"], roles["x"], cfg.height, cfg.width)


def next_position(length: int, cfg: Config, images: int = 1) -> int:
    """The position of the next token after `length` stored ones: the rule of a decode step."""
    return length - images * (cfg.height * cfg.width - cfg.rings)


@predicate("image", "y", "x")
def concentric(at: Coordinates, height: int, width: int) -> Tensor:
    same = (at.q_role("image") == at.k_role("image")) & (at.q_role("image") > 0)
    rings = [ring(role("y"), role("x"), height, width) for role in (at.q_role, at.k_role)]
    return torch.where(same, rings[1] <= rings[0], at.k <= at.q)


def build(cfg: Config) -> Mask:
    return concentric(cfg.height, cfg.width)


METHOD = PositionPage(
    config=Config,
    positions=positions,
    build=build,
    looks_ahead=True,
    patterns=("causal_self",),
    card=Card(
        title="Concentric Causal Attention",
        paper="arXiv:2410.15926",
        year=2024,
        idea="rings instead of raster order bring every patch near the question",
        cost="as causal attention",
        needs=("image", "y", "x"),
        lineage=("causal",),
        neutral={"height": 1, "width": 1},
        caveat=(
            "the paper trains with it; on a model that was not, it shifts the inputs. Its code fixes one "
            "square 24 x 24 image; rectangles, odd sides and several images are ours. In its code a batch "
            "gets the positions of its last row and the mask on its first: read, not run. Nothing tells two "
            "patches of one ring apart but their features"
        ),
    ),
)
