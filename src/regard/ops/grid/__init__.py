"""Attention on grids: neighbourhoods, windows, regions. Tokens are [B, H, N, D], N places of a grid row by row."""

from regard.ops.grid.continuous import cells, continuous_bias, steps_to
from regard.ops.grid.image import any_grid, as_image, as_tokens
from regard.ops.grid.near import Axis, boxes, check_axes, nearest_attention, some_heads
from regard.ops.grid.padded import inside, window_attention, window_of, window_scores, window_sums
from regard.ops.grid.regions import from_regions, to_regions
from regard.ops.grid.windows import from_windows, window_places, windows

__all__ = [
    "Axis",
    "any_grid",
    "as_image",
    "as_tokens",
    "boxes",
    "cells",
    "check_axes",
    "continuous_bias",
    "from_regions",
    "from_windows",
    "inside",
    "nearest_attention",
    "some_heads",
    "steps_to",
    "to_regions",
    "window_attention",
    "window_of",
    "window_places",
    "window_scores",
    "window_sums",
    "windows",
]
