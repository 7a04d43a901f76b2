"""Forwards of a model for explanations: logits of the last token, what was used at sites, gradients at them."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.attaching.anatomy import anatomy
from regard.attaching.attachment import attach
from regard.core import Edit, Observer, Site, Unreachable
from regard.core.edit import HEADED
from regard.explaining.pairs import Batch

Values = dict[
    str, dict[int, Tensor]
]  # quantity -> layer -> [B, H, N, E], of a layer as a whole [B, 1, N, width]


def layers_of(model: PreTrainedModel) -> list[int]:
    """The numbers of the layers that have attention."""
    return [layer.number for layer in anatomy(model) if layer.attention is not None]


def forward(
    model: PreTrainedModel, batch: Batch, methods: Sequence[Any] = (), **inputs: Any
) -> tuple[Tensor, attach]:
    """(logits [B, V] of each text's last token, the attachment) of a forward without a cache."""
    given = {**batch.inputs(), **inputs, **last_only(model)}
    with attach(model, list(methods) or None) as attached:
        out = model(**given, use_cache=False)
    return out.logits[:, -1], attached


def last_only(model: PreTrainedModel) -> dict[str, int]:
    """Logits of all tokens of a long prompt may be larger than the model."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def capture(
    model: PreTrainedModel, batch: Batch, quantities: Sequence[str], layers: Sequence[int] | None = None
) -> tuple[Tensor, Values]:
    """(logits [B, V], what the model used at these quantities)."""
    logits, attached = forward(model, batch, observers(quantities, layers))
    silent = [q for q in quantities if not attached.records[q]]
    if silent:
        raise Unreachable(
            f"{type(model).__name__}: {', '.join(silent)} never came; regard.doctor(model) says what is reached"
        )
    return logits, values_of(attached.records, quantities)


def observers(
    quantities: Sequence[str], layers: Sequence[int] | None = None, live: bool = False
) -> list[Observer]:
    at = None if layers is None else tuple(layers)
    return [Observer("value", Site(q, layers=at, tower="text"), name=q, live=live) for q in quantities]


def values_of(records: dict[str, list], quantities: Sequence[str]) -> Values:
    return {q: {layer: by_head(q, x) for layer, _, x in records[q]} for q in quantities}


def by_head(quantity: str, x: Tensor) -> Tensor:
    """[B, H, N, width] of what was observed; a layer as a whole is one head."""
    return x if quantity in HEADED else x[:, None]


def heads_at(quantity: str, model: PreTrainedModel) -> int:
    """How many heads a quantity has: query heads, heads of the cache, or 1 for a layer as a whole."""
    config = model.config.get_text_config()
    if quantity not in HEADED:
        return 1
    heads = config.num_attention_heads
    return (getattr(config, "num_key_value_heads", None) or heads) if quantity in ("k", "v") else heads


def at_site(quantity: str, layer: int, head: int | None, value: Tensor, **where: Any) -> Edit:
    """The edit that puts a value [texts, rows, width] at a head, or a layer as a whole."""
    heads = head if quantity in HEADED else None
    value = value[:, None] if quantity in HEADED and value.dim() == 3 else value
    return Edit(Site(quantity, layers=layer, heads=heads, tower="text", **where), "replace", value)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter takes gradients; afterwards those do that did."""
    taking = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in taking:
            p.requires_grad_(False)
        yield
    finally:
        for p in taking:
            p.requires_grad_(True)


@contextmanager
def embedded(model: PreTrainedModel, given: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Embeddings are a leaf that takes gradients, or these; a list that holds them once the model has run."""
    leaf: list[Tensor] = []

    def hook(module: Any, args: tuple, out: Tensor) -> Tensor:
        leaf.append((out.detach() if given is None else given.detach().clone()).requires_grad_())
        return leaf[-1]

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield leaf
    finally:
        handle.remove()


@torch.no_grad()
def embeddings(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[B, N, width] what the model's table of embeddings gives for these ids."""
    return model.get_input_embeddings()(batch.ids)
