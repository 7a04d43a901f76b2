"""Attention on grids: neighbourhoods, windows, regions. Tokens are [B, H, N, D], N places of a grid row by row."""

from regard.ops.grid.continuous import cells, continuous_bias, steps_to
from regard.ops.grid.image import as_image, as_tokens
from regard.ops.grid.near import Axis, boxes, check_axes, nearest_attention
from regard.ops.grid.padded import inside, window_attention, window_of, window_scores, window_sums

__all__ = [
    "Axis",
    "as_image",
    "as_tokens",
    "boxes",
    "cells",
    "check_axes",
    "continuous_bias",
    "inside",
    "nearest_attention",
    "steps_to",
    "window_attention",
    "window_of",
    "window_scores",
    "window_sums",
]
