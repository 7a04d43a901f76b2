"""Prompts with images for the tiny vision-language models: batches with padding on the left, two images in a text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from regard.core import Unsupported
from regard.testing.zoo import build

FAMILIES = ("llava", "qwen25vl", "qwen3vl", "gemma3mm", "smolvlm", "internvl")
PAD, IMAGE = 0, 120


@cache
def batch(family: str) -> tuple[Any, dict[str, Tensor]]:
    """A model, and a batch of two prompts with an image each: the first is shorter by two tokens. Made once."""
    model, one = build(family)
    return model, together([one, other(one)])


def alone(inputs: dict[str, Tensor], text: int) -> dict[str, Tensor]:
    """One text of a batch of two, without its padding."""
    real = inputs["attention_mask"][text].bool()
    own = {name: x[text : text + 1][:, real] for name, x in inputs.items() if name in BY_TOKEN}
    return {**own, **{name: x.chunk(2)[text] for name, x in inputs.items() if name not in BY_TOKEN}}


BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def other(one: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another prompt of the same kind, longer by two tokens, with another image."""
    g = torch.Generator().manual_seed(3)
    extra = torch.randint(4, 100, (1, 2), generator=g)
    changed = dict(one)
    changed["input_ids"] = torch.cat([one["input_ids"][:, :1], extra, one["input_ids"][:, 1:]], 1)
    for name in BY_TOKEN[1:]:
        if name in one:
            value = one[name][:, :1].expand(-1, 2) if name == "attention_mask" else torch.zeros(1, 2).long()
            changed[name] = torch.cat([one[name][:, :1], value, one[name][:, 1:]], 1)
    changed["pixel_values"] = torch.randn(one["pixel_values"].shape, generator=g)
    return changed


def together(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded on the left."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    joined: dict[str, Tensor] = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name in BY_TOKEN:
            parts = [torch.nn.functional.pad(x, (longest - x.shape[1], 0), value=PAD) for x in parts]
        joined[name] = torch.cat(parts)
    return joined


@cache
def two_images(family: str) -> tuple[Any, dict[str, Tensor]]:
    """A model, and one prompt with two images, some words between them."""
    model, one = build(family)
    second = other(one)
    joined: dict[str, Tensor] = {}
    for name in one:
        if name in BY_TOKEN:
            joined[name] = torch.cat([one[name], second[name][:, 1:]], 1)
        else:
            dim = 1 if name == "pixel_values" and one[name].dim() == 5 else 0
            joined[name] = torch.cat([one[name], second[name]], dim)
    return model, joined


def said(model: Any, inputs: dict[str, Tensor], steps: int = 4, **settings: Any) -> Tensor:
    """[B, steps, V] logits of greedy generation."""
    found = model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=PAD, eos_token_id=2, **settings,
    )  # fmt: skip
    return torch.stack(found.logits, 1)


REACHED: dict[tuple[str, str, tuple[int | None, int]], list[str]] = {}
# families that a page is asked on, at most (None: all), and which of them is tried first
ASKED: ContextVar[tuple[int | None, int]] = ContextVar("ASKED", default=(None, 0))


@contextmanager
def few_families(most: int, first: int = 0) -> Iterator[None]:
    """Pages are asked on so many families that they reach alone, inside; `first` is tried before all, round."""
    token = ASKED.set((most, first % len(FAMILIES)))
    try:
        yield
    finally:
        ASKED.reset(token)


def families_of(name: str, label: str, act: Callable[[Any, dict[str, Tensor]], Any]) -> list[str]:
    """The families on which a method acts; those that it refuses by name are left out. Asked once."""
    key = name, label, (most, first) = name, label, ASKED.get()
    if key not in REACHED:
        tried = FAMILIES[first:] + FAMILIES[:first]
        found = list(islice((family for family in tried if acts(act, *batch(family))), most))
        assert found, f"{name} acts on none of {', '.join(FAMILIES)}"
        REACHED[key] = found
    return REACHED[key]


def acts(act: Callable[[Any, dict[str, Tensor]], Any], model: Any, inputs: dict[str, Tensor]) -> bool:
    try:
        act(model, inputs)
    except Unsupported:
        return False
    return True
