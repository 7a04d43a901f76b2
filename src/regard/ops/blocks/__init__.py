"""Attention over lists of blocks: one primitive for every mask and every mechanism that reads a few keys of many."""

from regard.ops.blocks.attention import block_attention
from regard.ops.blocks.choose import both_ends, causal_softmax, diagonal, top_blocks, top_mass
from regard.ops.blocks.latest import latest_keys
from regard.ops.blocks.layout import Blocks
from regard.ops.blocks.lines import last_mean, last_weights, root_divergence, slashes, verticals
from regard.ops.blocks.masks import SHORT, blocks_of
from regard.ops.blocks.measure import captured_mass, full_lse, kept_share, read_by_head
from regard.ops.blocks.placed import Placed, placed
from regard.ops.blocks.pool import block_max, block_mean, block_min, block_sizes, block_sum, hidden, in_blocks
from regard.ops.blocks.pooled import largest_weights
from regard.ops.blocks.run import run_blocks
from regard.ops.blocks.settings import WHOLE, BlockSettings
from regard.ops.blocks.slow import by_text, slow_attention

__all__ = [
    "SHORT",
    "WHOLE",
    "BlockSettings",
    "Blocks",
    "Placed",
    "block_attention",
    "block_max",
    "block_mean",
    "block_min",
    "block_sizes",
    "block_sum",
    "both_ends",
    "blocks_of",
    "by_text",
    "captured_mass",
    "causal_softmax",
    "diagonal",
    "full_lse",
    "hidden",
    "in_blocks",
    "kept_share",
    "largest_weights",
    "last_mean",
    "last_weights",
    "latest_keys",
    "placed",
    "read_by_head",
    "root_divergence",
    "run_blocks",
    "slashes",
    "slow_attention",
    "top_blocks",
    "top_mass",
    "verticals",
]
