"""Tokens as the channels of an image, and back, for convolutions and pooling."""

from typing import Any

from torch import Tensor


def as_image(x: Tensor, sides: tuple[int, ...]) -> Tensor:
    """[B, C, *sides] of tokens [B, N, C]."""
    return x.mT.unflatten(2, sides)


def as_tokens(image: Tensor) -> Tensor:
    """[B, N, C] of an image [B, C, *sides]."""
    return image.flatten(2).mT


def any_grid(cfg: Any, sides: tuple[int, ...]) -> None:
    """`OnGrid.fits` of a page whose settings go with all grids."""
