"""Labels of tokens on which masks and positions are asked: padding, documents, images, parallel paths, read twice."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regard.core.roles import Roles


def example_roles(needs: Iterable[str], n: int, cfg: Any = None) -> Roles | None:
    """Two rows of labelled tokens: left padding in the first, documents of 5, images of height x width.

    Every image is a frame of a video and is asked about by the word after it; the second row is a video of frames of 5
    without words, and asks nothing.
    Candidates of 4 after a context; parallel blocks of two paths, in the second row with a block in a path; slots that
    stand token by token in the first row, each token read twice, and in the second by iteration, every third twice.
    """
    i = torch.arange(n)
    height, width = getattr(cfg, "height", 3), getattr(cfg, "width", 3)
    image, index = i // (height * width + 3), i % (height * width + 3) - 2  # two words, an image, one word
    patch = (index >= 0) & (index < height * width)
    known = {
        "padding": torch.stack([i < n // 4, i < 0]),
        "document": torch.stack([i // 5, (i + 2) // 5]),
        "image": torch.where(patch, image + 1, 0),
        "y": torch.where(patch, index // width, -1),
        "x": torch.where(patch, index % width, -1),
        "frame": torch.stack([torch.where(patch, image, -1), i // 5]),
        "question": torch.stack([torch.where(index >= 0, image + 1, -1), torch.full((n,), -1)]),
        "candidate": torch.stack([(i - n // 3).div(4, rounding_mode="floor").clamp(min=-1), i // 6 - 1]),
        **parallel_paths(i),
        **iterated_tokens(i),
    }
    labels = {name: known.get(name, torch.stack([i % 3, i % 2])) for name in needs}
    return Roles(**labels) if labels else None


def parallel_paths(i: Tensor) -> dict[str, Tensor]:
    """Blocks of ten tokens: two, a path of three, another, two. In the second row the first path holds two paths."""
    begun, step = i // 10 + 1, i % 10
    first, second = (step >= 2) & (step < 5), (step >= 5) & (step < 8)
    inner = first & (step > 2)  # of one token each
    block, path = begun * (first | second), (2 * begun - 1) * first + 2 * begun * second
    inner_path = (2 * begun - 4 + step) * inner
    return {
        "parallel": torch.stack([block, block + (begun * inner << 15)]),
        "path": torch.stack([path, path + (inner_path << 15)]),
    }


def iterated_tokens(i: Tensor) -> dict[str, Tensor]:
    """Slots of tokens that are read again: in the order of the tokens, and in that of the iterations."""
    once = (3 * len(i) + 3) // 4
    again = i >= once
    return {
        "token": torch.stack([i // 2, torch.where(again, 3 * (i - once), i)]),
        "iteration": torch.stack([i % 2, again.long()]),
    }
