"""Attention on grids: neighbourhoods, windows, regions. Tokens are [B, H, N, D], N places of a grid row by row."""

from regard.ops.grid.image import any_grid, as_image, as_tokens
from regard.ops.grid.near import Axis, boxes, check_axes, nearest_attention
from regard.ops.grid.windows import from_windows, window_places, windows

__all__ = [
    "Axis",
    "any_grid",
    "as_image",
    "as_tokens",
    "boxes",
    "check_axes",
    "from_windows",
    "nearest_attention",
    "window_places",
    "windows",
]
