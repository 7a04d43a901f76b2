"""Padding mask: nobody sees padding.

    i sees j  if  padding_j = 0

Rows of one batch have different lengths; what fills them up must change no output. Only keys are hidden: the
rows of padded queries carry numbers that nobody reads. Compose it with any mask: `causal() & padding`.

>>> from regard.core.roles import Roles
>>> build(Config()).dense(3, roles=Roles(padding=[1, 0, 0])).int()[0, 0]
tensor([[0, 1, 1],
        [0, 1, 1],
        [0, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.mask import Coordinates, Mask, Tiles, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    """Nothing to set: the role `padding` is 1 on padding."""


def padding_tiles(at: Tiles) -> tuple[Tensor, Tensor]:
    least, most = at.k_role("padding")
    return (least <= 0) & (most >= 0), (least == 0) & (most == 0)


@predicate("padding", tiles=padding_tiles)
def padding(at: Coordinates) -> Tensor:
    return at.k_role("padding") == 0


def build(cfg: Config) -> Mask:
    return padding()


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("self", "causal_self", "cross", "causal_cross"),
    card=Card(
        title="Padding mask",
        paper="The Annotated Transformer, 2018 (src_mask)",
        year=2018,
        idea="what fills a batch up to one length is seen by nobody",
        cost="none",
        state="one label per token",
        needs=("padding",),
        caveat=(
            "left padding under a causal mask leaves the padded queries without any key: `blind` lists them"
        ),
    ),
)
