"""A mask as a list of blocks, for attention over blocks: what it hides is never read, and no N x M matrix is made."""

from functools import lru_cache
from typing import Any

import torch

from regard.core import require
from regard.core.mask import Mask
from regard.core.roles import Roles
from regard.ops.blocks.layout import Blocks

SHORT = 1024  # keys below which all are read under a dense mask; changes the speed, never the result
DENSE = 0.7  # the share of tiles from which on that is so too


def blocks_of(
    mask: Mask, n: int, m: int, *, roles: Any = None, offset: int | None = None, block: int = 128,
    most: float = DENSE, device: torch.device | str = "cpu", heads: int | None = None,
) -> Blocks | None:  # fmt: skip
    """The blocks that n queries read of m keys under a mask; None where more than the share `most` is read."""
    same = mask.heads is None or heads in (None, mask.heads)
    require(same, "the heads of the mask are the heads of the layer", mask=mask.heads, layer=heads)
    if not mask.needs:
        return _known(mask, n, m, offset, block, most, str(device))
    return _blocks(mask, n, m, roles, offset, block, most, device)


@lru_cache(maxsize=64)
def _known(
    mask: Mask, n: int, m: int, offset: int | None, block: int, most: float, device: str
) -> Blocks | None:
    return _blocks(mask, n, m, None, offset, block, most, device)


def _blocks(
    mask: Mask, n: int, m: int, roles: Roles | None, offset: int | None, block: int, most: float, device: Any
) -> Blocks | None:
    rows = min(block, n)  # a single query is a block of its own
    tiled = mask.tiled(n, m, rows, block, roles=roles, offset=offset, most=most, device=device)
    if tiled is None:
        return None
    blocks = Blocks.of_map(tiled.read, rows, block)
    if tiled.tile is None:
        return blocks
    tile = tiled.tile.gather(-1, blocks.index.clamp(min=0)).masked_fill(blocks.index < 0, -1)
    return Blocks(blocks.index, rows, block, tile, tiled.tables)
