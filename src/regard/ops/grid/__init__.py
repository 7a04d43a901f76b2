"""Attention on grids: neighbourhoods, windows, regions. Tokens are [B, H, N, D], N places of a grid row by row."""

from regard.ops.grid.image import as_image, as_tokens
from regard.ops.grid.near import Axis, boxes, check_axes, nearest_attention
from regard.ops.grid.padded import inside, window_attention, window_scores, window_sums

__all__ = [
    "Axis",
    "as_image",
    "as_tokens",
    "boxes",
    "check_axes",
    "inside",
    "nearest_attention",
    "window_attention",
    "window_scores",
    "window_sums",
]
