"""S2-Attention: every head reads the local blocks and its own shard of the rest; together the heads read all.

    I sees J for head h  if  J ≤ I  and  (I - J < local  or  (J + shard_h + offset) mod stride = 0)
    shard_h = ⌊h / (heads / kv_heads)⌋,  I and J blocks

A shard is fixed by the place of the key, not by its distance, so a block that is neither local nor in the
shard is never read again and leaves the cache of that KV head: about 1 / stride of the keys stay. The heads
of one KV group share a shard, else nothing could leave. Fewer KV heads than `stride` would leave blocks that
no head reads: an error.

>>> (build(Config(heads=2, kv_heads=2, stride=2, local=1, block=2)).row(9) // 2)[0]  # 5 blocks, two heads
tensor([[0, 0, 2, 2, 4, 4],
        [1, 1, 3, 3, 4, 4]])
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.coordinates import Corner, by_block
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, causal, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    heads: int = 32  # query heads of a layer
    kv_heads: int = 8  # of a layer; the query heads of one share a shard
    stride: int = 8  # blocks
    local: int = 16  # blocks, the token's own included
    block: int = 64  # tokens of a block
    offset: int = 0  # blocks by which all shards move; 1 as in the ports to Phi-3-small and vLLM

    def __post_init__(self) -> None:
        least = min(self.kv_heads, self.stride, self.local, self.block)
        require(least >= 1, "kv_heads, stride, local, block >= 1", config=self)
        require(
            self.heads % self.kv_heads == 0,
            "kv_heads divides heads",
            heads=self.heads,
            kv_heads=self.kv_heads,
        )
        covered = self.kv_heads >= self.stride
        require(covered, "kv_heads >= stride, or some blocks are read by no head", config=self)


def sharded(
    at: Coordinates | Corner, heads: int, kv_heads: int, stride: int, local: int, block: int, offset: int
) -> Tensor:
    i, j = at.q // block, at.k // block
    mine = (j + at.h // (heads // kv_heads) + offset) % stride == 0
    return (i - j < local) | mine


@predicate(tiles=by_block(sharded, "block"))
def shard(
    at: Coordinates, heads: int, kv_heads: int, stride: int, local: int, block: int, offset: int
) -> Tensor:
    return sharded(at, heads, kv_heads, stride, local, block, offset)


def build(cfg: Config) -> Mask:
    return causal() & shard(cfg.heads, cfg.kv_heads, cfg.stride, cfg.local, cfg.block, cfg.offset)


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("causal_self",),
    test_settings=({"heads": 4, "kv_heads": 2, "stride": 2, "local": 1, "block": 3, "offset": 1},),
    card=Card(
        title="S2-Attention",
        paper="arXiv:2407.17678",
        year=2024,
        idea="the context is sharded over the heads: each reads a stride of it, all together everything",
        cost="N / stride + local · block keys per query and head",
        state="N / stride + local · block keys per KV head",
        lineage=("window",),
        neutral={"stride": 1},
        caveat=(
            "defaults of Phi-3-small, which keeps every second layer dense. The authors' kernel library "
            "gives block J to head h if (J + h · step) mod stride = 0, its ports in Phi-3-small and vLLM add "
            "1 (offset = 1). It takes the step from the query heads and counts shards by KV head, so with "
            "fewer KV heads than stride it leaves holes without a word; where every block is covered the "
            "step is 1 and stands so here"
        ),
    ),
)
