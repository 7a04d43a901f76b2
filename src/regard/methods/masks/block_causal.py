"""Block-causal mask: both directions within a block, causal between blocks.

    i sees j  if  ⌊j / block⌋ ≤ ⌊i / block⌋

Tokens that are produced together (a diffused block of text, a frame of a video, a scale of an image) see each
other; all of a block sees all blocks before it, so a cache of finished blocks never changes.

>>> build(Config(block=2)).dense(4).int()[0, 0]
tensor([[1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, Tiles, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    block: int = 16  # tokens of a block; 1: the causal mask

    def __post_init__(self) -> None:
        require(self.block >= 1, "block >= 1", block=self.block)


def earlier_tiles(at: Tiles, block: int) -> tuple[Tensor, Tensor]:
    return at.k0 // block <= at.q1 // block, at.k1 // block <= at.q0 // block


@predicate(tiles=earlier_tiles)
def earlier_block(at: Coordinates, block: int) -> Tensor:
    return at.k // block <= at.q // block


def build(cfg: Config) -> Mask:
    return earlier_block(cfg.block)


METHOD = MaskPage(
    config=Config,
    build=build,
    looks_ahead=True,
    patterns=("causal_self",),
    card=Card(
        title="Block-causal mask",
        paper=(
            "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models, "
            "arXiv:2503.09573"
        ),
        year=2025,
        idea="both directions within a block, causal between blocks",
        cost="N / 2 + block / 2 keys per query on average",
        state="all keys",
        lineage=("causal",),
        neutral={"block": 1},
        caveat="blocks start at token 0 of the text, also under left padding. Older than the paper named: "
        "video and non-autoregressive models used it before",
    ),
)
