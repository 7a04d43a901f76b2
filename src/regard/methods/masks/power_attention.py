"""PowerAttention: sinks, a local window, and the blocks at distances 1, 2, 4, 8, ...

    i sees j  if  j ≤ i  and  (d < local  or  d & (d - 1) = 0  or  j < sinks · block)
    d = ⌊i / block⌋ - ⌊j / block⌋

Every distance below 2ᵈ is a sum of at most d different powers of two, so d layers reach 2ᵈ blocks back
without a hole, where a window of as many keys reaches d · (window - 1). d = 0 counts as a power: without
itself a token could not pass a short sum on.

At 32K, 128 blocks, the last query reads 1 sink, 5 local and 4 power blocks, 10 in all (section 4.1):

>>> (build(Config()).row(32767) // 256).unique()
tensor([  0,  63,  95, 111, 119, 123, 124, 125, 126, 127])
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.coordinates import Corner, by_block
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, Tiles, causal, first, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    local: int = 5  # blocks, the token's own included
    sinks: int = 1  # blocks
    block: int = 256  # tokens of a block

    def __post_init__(self) -> None:
        require(
            self.block >= 1 and self.local >= 1, "block >= 1, local >= 1", block=self.block, local=self.local
        )
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)


def local_tiles(at: Tiles, local: int, block: int) -> tuple[Tensor, Tensor]:
    return at.q0 // block - at.k1 // block < local, at.q1 // block - at.k0 // block < local


@predicate(tiles=local_tiles)
def local_blocks(at: Coordinates, local: int, block: int) -> Tensor:
    return at.q // block - at.k // block < local


def is_power(at: Coordinates | Corner, block: int) -> Tensor:
    d = at.q // block - at.k // block
    return (d & (d - 1)) == 0


@predicate(tiles=by_block(is_power, "block"))
def powers_of_two(at: Coordinates, block: int) -> Tensor:
    return is_power(at, block)


def build(cfg: Config) -> Mask:
    return causal() & (
        local_blocks(cfg.local, cfg.block) | powers_of_two(cfg.block) | first(cfg.sinks * cfg.block)
    )


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("causal_self",),
    card=Card(
        title="PowerAttention",
        paper="arXiv:2503.03588",
        year=2025,
        idea="blocks at power-of-two distances: the receptive field doubles with every layer",
        cost="O(N · block · log(N / block))",
        state="all keys: every block lies at a power of two from some later one",
        lineage=("sinks", "window"),
        neutral={"local": 2**40},
        caveat=(
            "`local` and `sinks` count blocks. The paper's figures at 2K local tokens come from a model "
            "trained further with the mask, and its long benchmark keeps 2 full layers of every 7: apply it "
            "to chosen layers"
        ),
    ),
)
