"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, parted once: to train on, to choose on, to judge."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.errors import NotInstalled

SIZES = {"train": 1000, "choice": 300, "test": 497}


class Split(NamedTuple):
    """Images [n, 1, 8, 8] in [0, 1] and labels [n]."""

    images: Tensor
    labels: Tensor


@cache
def digits() -> dict[str, Split]:
    """The three parts, by name: the same in every process."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise NotInstalled("the digits are scikit-learn's: pip install 'regard[vision]'") from error
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None] / 16
    labels = torch.from_numpy(data.target)[order]
    parts = zip(images.split([*SIZES.values()]), labels.split([*SIZES.values()]), strict=True)
    return {name: Split(*part) for name, part in zip(SIZES, parts, strict=True)}


def shifted(images: Tensor, by: Tensor) -> Tensor:
    """Each image [B, 1, H, W] moved by (rows, columns) [B, 2] of one at most, zeros coming in."""
    rows, columns = images.shape[2:]
    wide = torch.nn.functional.pad(images[:, 0], (1, 1, 1, 1))
    y = torch.arange(rows)[None, :, None] + 1 - by[:, 0, None, None]
    x = torch.arange(columns)[None, None] + 1 - by[:, 1, None, None]
    return wide[torch.arange(len(images))[:, None, None], y, x][:, None]
