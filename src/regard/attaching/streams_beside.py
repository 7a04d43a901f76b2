"""Passes of a model beside its own: each with a cache that follows the main one, on the same tokens at the same places.

The caches of the streams hang on the first ledger layer of the main cache (`followers`), so that what is done to its
rows (beams, repeats, selections, crops) is done to theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from regard.attaching.ledger import LedgerLayer
from regard.core import Unsupported, require
from regard.core.errors import present
from regard.ops.steered import Stream

# inputs with an entry for each token of the prompt
OF_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass
class Recorded:
    """What one stream wrote down in its latest forward: quantity -> layer -> [B, ...] at the newest token."""

    by_layer: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def note(self, quantity: str, layer: int, x: Tensor) -> None:
        self.by_layer.setdefault(quantity, {})[layer] = x.detach()

    def stacked(self) -> dict[str, Tensor]:
        """quantity -> [layers, B, ...]."""
        return {name: torch.stack([found[i] for i in sorted(found)]) for name, found in self.by_layer.items()}


def first_layer(cache: Any) -> LedgerLayer | None:
    layers = getattr(cache, "layers", ())
    return next((layer for layer in layers if isinstance(layer, LedgerLayer)), None)


def followers_of(cache: Any) -> dict[str, Cache]:
    """The caches of the streams beside this one, by the stream's name."""
    layer = first_layer(cache)
    return {} if layer is None else layer.followers


def begun(cache: Any) -> bool:
    return cache is not None and cache.get_seq_length() > 0


def stream_inputs(
    model: PreTrainedModel, stream: Stream, kwargs: Mapping[str, Any], cache: Cache | None, seed: int
) -> dict[str, Any]:
    """What the model is called with for a stream: the main inputs, with the stream's own cache, pixels and prefix."""
    given = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "labels")}
    caches = kwargs.get("use_cache", model.config.get_text_config().use_cache) is not False
    follows = kwargs.get("past_key_values") is not None or caches
    if follows and not stream.once:
        given |= dict(
            past_key_values=DynamicCache(config=model.config) if cache is None else cache, use_cache=True
        )
    else:
        given |= dict(past_key_values=None, use_cache=False)
    if stream.pixels is not None and isinstance(given.get("pixel_values"), Tensor):
        given["pixel_values"] = other_pixels(stream, given, seed)
    main = kwargs.get("past_key_values")
    seen = 0 if main is None else main.get_seq_length()
    return prefixed(given, stream.prefix, cache, seen) if stream.prefix else given


def other_pixels(stream: Stream, given: dict[str, Any], seed: int) -> Tensor:
    """The stream's pixels; pictures that are packed in one list of patches are given one by one."""
    pixels, grids = given["pixel_values"], given.get("image_grid_thw")
    change = present(stream.pixels, "a stream with pixels of its own")
    if grids is None or pixels.dim() > 2:
        return change(pixels, torch.Generator().manual_seed(seed))
    parts = pixels.split(grids.prod(-1).tolist())
    return torch.cat([change(part, torch.Generator().manual_seed(seed)) for part in parts])


def prefixed(
    given: dict[str, Any], prefix: tuple[int, ...], cache: Cache | None, seen: int
) -> dict[str, Any]:
    """The inputs with ids after the first real token of each text; positions are counted anew.

    seen: tokens that the main cache holds; where there is no mask, all of them are tokens
    """
    mask, ids = given.get("attention_mask"), given["input_ids"]
    mask = ids.new_ones(len(ids), seen + ids.shape[1]) if mask is None else mask
    require(mask.dim() == 2, "a prefix beside a mask [B, N]", attention_mask=tuple(mask.shape))
    # of the whole text: padding before it stays the same over the steps
    at = mask.to(torch.uint8).argmax(1) + 1
    whole = inserted(mask, at, torch.ones(len(prefix), dtype=mask.dtype))
    new = given["input_ids"].shape[1]
    given = {**given, "attention_mask": whole}
    if not begun(cache):
        given["input_ids"] = inserted(ids, at, torch.tensor(prefix))
        for name in ("mm_token_type_ids", "token_type_ids"):
            if isinstance(given.get(name), Tensor):
                given[name] = inserted(given[name], at, torch.zeros(len(prefix), dtype=given[name].dtype))
        new += len(prefix)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)[:, -new:]
    given.pop("cache_position", None)
    return {**given, "position_ids": positions}


def inserted(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """x [B, N] with `values` [p] before column at [B] of each row: [B, N + p]."""
    values = values.to(x)
    return torch.stack([torch.cat([row[:i], values, row[i:]]) for row, i in zip(x, at.tolist(), strict=True)])


def newest_columns(kwargs: Mapping[str, Any], new: int, device: torch.device) -> Tensor:
    """[B] or [1] the column, among the `new` tokens of a forward, of each text's newest token that is not padding."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.tensor([new - 1], device=device)
    real = mask[:, -new:].bool()
    count = torch.arange(1, new + 1, device=real.device)
    return ((real * count).amax(1) - 1).clamp(min=0)


def at_columns(x: Tensor, columns: Tensor) -> Tensor:
    """[B, ...] of x [B, N, ...] at a column of each text."""
    at = columns.to(x.device).expand(len(x)).view(-1, *[1] * (x.dim() - 1))
    return x.take_along_dim(at, 1)[:, 0]


def newest_logits(logits: Tensor, columns: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """([B, V] of each text's newest token, its column) of logits [B, kept, V], perhaps of the last columns alone."""
    at = columns - (new - logits.shape[1])
    rule = "logits of each text's newest token (with padding behind it, logits_to_keep=0)"
    require(int(at.min()) >= 0, rule, newest=columns.tolist(), kept=logits.shape[1])
    return at_columns(logits, at), at


def hang_on(cache: Any, followers: dict[str, Cache]) -> None:
    layer = first_layer(cache)
    present(layer, "a cache whose layers are ledger layers").followers = followers


def new_tokens(given: dict) -> int:
    """How many tokens a forward is given."""
    for name in ("input_ids", "inputs_embeds"):
        if given.get(name) is not None:
            return given[name].shape[1]
    raise Unsupported("a forward without input_ids or inputs_embeds")
