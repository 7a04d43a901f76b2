"""Block lists: which blocks of keys each block of queries reads, by row of the batch and by head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import require
from regard.ops.topk import slots_of


@dataclass(frozen=True, eq=False)
class Blocks:
    """Query block I reads the key blocks index[b, h, I], ascending, -1 where there are fewer.

    index    [B|1, H|1, I, R] integers; block I of queries are its rows I·block_q .. , block J of keys J·block_k ..
    tile     [B|1, H|1, I, R] which mask of `tiles` holds inside the block, -1: all of it is seen; None: all are -1
    tiles    [T, block_q, block_k] bool, True = attend
    """

    index: Tensor
    block_q: int
    block_k: int
    tile: Tensor | None = None
    tiles: Tensor | None = None

    def __post_init__(self) -> None:
        require(self.index.dim() == 4 and not self.index.is_floating_point(), "index is [B|1, H|1, I, R] integers",
                index=self.index)  # fmt: skip
        require(self.block_q >= 1 and self.block_k >= 1, "block_q, block_k >= 1", block_q=self.block_q,
                block_k=self.block_k)  # fmt: skip

    @classmethod
    def of_map(cls, chosen: Tensor, block_q: int, block_k: int) -> "Blocks":
        """The list of chosen [B|1, H|1, I, J] bool.

        >>> Blocks.of_map(torch.tensor([[[[True, False], [True, True]]]]), 64, 64).index
        tensor([[[[ 0, -1],
                  [ 0,  1]]]])
        """
        b, h, i, j = chosen.shape
        flat = chosen.reshape(b * h, i, j)
        # a list as long as the longest row is a value; what is traced has lists of all blocks
        index = every_slot(flat) if torch.compiler.is_compiling() else slots_of(flat)
        return cls(index.view(b, h, i, -1), block_q, block_k)

    def map(self, columns: int) -> Tensor:
        """[B|1, H|1, I, columns] bool: the blocks that are read."""
        # nobody goes to a column of its own
        at = self.index.masked_fill(self.index < 0, columns).long()
        chosen = torch.zeros(*self.index.shape[:3], columns + 1, dtype=torch.bool, device=at.device)
        return chosen.scatter_(-1, at, torch.ones_like(at, dtype=torch.bool))[..., :columns]

    def counts(self) -> Tensor:
        """[B|1, H|1, I] how many blocks each block of queries reads."""
        return (self.index >= 0).sum(-1)

    def same(self, other: "Blocks | None") -> bool:
        """Whether both are one list with the same masks inside."""
        if other is None or (self.block_q, self.block_k) != (other.block_q, other.block_k):
            return False
        pairs = [(self.index, other.index), (self.tile, other.tile), (self.tiles, other.tiles)]
        return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)  # type: ignore[arg-type]


def every_slot(chosen: Tensor) -> Tensor:
    """Indices of the True places of chosen [..., n], ascending, then -1: [..., n]."""
    order = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)
    return order.masked_fill(
        torch.arange(chosen.shape[-1], device=chosen.device) >= chosen.sum(-1, keepdim=True), -1
    )
