"""Constants of speed, made so small that short texts meet every block, tile and piece: they change no number.

`SMALL` has every constant of the package that stands for a size of work. tests/test_constants.py reads the source
and fails on one that says it changes the speed or the memory alone and is not here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

SMALL: dict[str, Any] = {
    "regard.attaching.masking.SHORT": 1,
    "regard.attaching.slots.SLACK": 1,
    "regard.core.tiling.PAIRS": 1,
    "regard.explaining.batches.TOKENS": 1,
    "regard.explaining.sae_training.CHUNK": 3,
    "regard.explaining.sources.TOKENS": 1,
    "regard.explaining.tracing.BATCH_TOKENS": 1,
    "regard.kinds.mechanism.SHORT": 1,
    "regard.methods.caches.loki.PIECE": 3,
    "regard.methods.mechanisms.grid.biformer_bra.GATHERED": 200,
    "regard.methods.mechanisms.linear.tensor_attention.WHOLE": 5,
    "regard.methods.mechanisms.sparse.landmark_attention.BLOCK": 1,
    "regard.methods.mechanisms.sparse.landmark_attention.FETCH": 1,
    "regard.methods.mechanisms.sparse.quest.ROWS": 5,
    "regard.methods.mechanisms.sparse.superlinear_attention.GATHERED": 1,
    "regard.methods.mechanisms.sparse.superlinear_attention.TILE": 4,
    "regard.methods.mechanisms.sparse.xattention.ROWS": 8,
    "regard.ops.blocks.attention.GATHERED": 200,
    "regard.ops.blocks.attention.SCORED": 200,
    "regard.ops.blocks.buckets.TOGETHER": 1,
    "regard.ops.blocks.masks.SHORT": 1,
    "regard.ops.blocks.pooled.SCORES": 200,
    "regard.ops.blocks.schedule.MOST_RUNS": 1,
    "regard.ops.blocks.tree.GATHERED": 200,
    "regard.ops.blocks.whole.TILE": 8,
    "regard.ops.chosen.LONG": 1,
    "regard.ops.chunk.composed.CHUNK": 3,
    "regard.ops.chunk.tiles.CHANNELS": 4,
    "regard.ops.chunk.tiles.FEW": 2,
    "regard.ops.chunk.tiles.MOST": 3,
    "regard.ops.chunk.tiles.TILE": {2: 60, 4: 60, 8: 60},
    "regard.ops.chunk.tiles.WIDENED": 60,
    "regard.ops.closed.KEPT": 0,
    "regard.ops.closed.ROWS": 5,
    "regard.ops.grid.near.PIECE": 1,
    "regard.ops.grid.near.TILE": {1: 3, 2: 2, 3: 2},
    "regard.ops.grid.padded.TILE": 2,
    "regard.ops.grid.padded.WIDE": 3,
    "regard.ops.linear.CHUNK": 5,
    "regard.ops.softmax.BLOCK": 1200,
    "regard.ops.softmax.LONG": 1,
    "regard.ops.softmax.PIECE": 200,
}


@contextmanager
def small_constants() -> Iterator[None]:
    """Every constant of speed as SMALL has it, inside."""
    rooms = {name: (import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in SMALL}
    before = {name: getattr(*room) for name, room in rooms.items()}
    try:
        for name, room in rooms.items():
            setattr(*room, SMALL[name])
        yield
    finally:
        for name, room in rooms.items():
            setattr(*room, before[name])
