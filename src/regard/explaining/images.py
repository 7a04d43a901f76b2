"""Prompts with an image: what a processor makes of both, for the clean prompt and for one with another image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core import require
from regard.core.errors import NotInstalled

Images = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
OF_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def opened(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise NotInstalled("an image is read by pillow: pip install pillow") from error
    require(path.exists(), "the image is there", image=str(path))
    return Image.open(path).convert("RGB")


def processed(processor: Any, prompt: str, image: Any, other: Any = None) -> tuple[list[int], Images]:
    """(tokens with those of the image, what the processor made of both images); `other` None: the same one.

    A prompt without the mark of an image gets it in front. Images of unequal grids of tokens are refused.
    """
    mark = getattr(processor, "image_token", None)
    text = prompt if mark is None or mark in prompt else f"{mark}\n{prompt}"
    sides = [
        processor(text=text, images=[i], return_tensors="pt")
        for i in (image, image if other is None else other)
    ]
    ids = [side["input_ids"][0].tolist() for side in sides]
    require(
        ids[0] == ids[1], "both images have the same grid of tokens", clean=len(ids[0]), corrupt=len(ids[1])
    )
    made = [
        {k: v for k, v in side.items() if k not in OF_TEXT and isinstance(v, torch.Tensor)} for side in sides
    ]
    return ids[0], (made[0], made[0] if other is None else made[1])
