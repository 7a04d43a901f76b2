"""What a tokens page is shown: the images of a text before the decoder, and a layer of the decoder after it ran."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.attaching.actors import seed_of
from regard.attaching.towers import padding_of
from regard.core import require
from regard.core.errors import present
from regard.ops import View
from regard.ops.images import ImageView, LayerView


def images_of(reduction: Any, text: int, x: Tensor) -> list[ImageView]:
    """A view for each image of a text whose embeddings are x [N, d]."""
    prompt, tower = reduction.prompt, reduction.tower
    where, start, found = prompt.where[text], 0, []
    outside = torch.ones(len(x), dtype=torch.bool, device=x.device)
    outside[where] = False
    mask = reduction.step.inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        outside &= mask[text, -len(x) :].bool()
    for number, at in enumerate(prompt.images[text]):
        found.append(
            ImageView(
                features=x[where[start : start + at.tokens]], grid=at.grid, question=x[outside], number=number,
                of=len(prompt.images[text]), seed=seed_of(reduction.method.config) + number,
                padding=padding_at(reduction, at), tower_layers=tower.layers,
                feature_layer=feature_layer(reduction.model),
                class_attention=lambda layer, at=at: tower.class_attention(layer, at),
                received=lambda layer, at=at: tower.received(layer, at),
                tower_keys=lambda layer, at=at: tower.keys(layer, at),
            )
        )  # fmt: skip
        start += at.tokens
    return found


def padding_at(reduction: Any, at: Any) -> Tensor | None:
    """[P] share of padding of an image's tokens, where the pixels of an image are a batch row of their own."""
    pixels = reduction.step.inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        return None
    return padding_of(pixels[at.row], at)


def feature_layer(model: Any) -> int:
    """The layer of the tower that is projected, negative from the end."""
    layer = getattr(model.config, "vision_feature_layer", -1)
    layer = layer[-1] if isinstance(layer, list | tuple) else layer
    return (
        layer
        if layer < 0
        else layer - present(getattr(model.config.vision_config, "num_hidden_layers", None), "") - 1
    )


def one_text(view: View, text: int) -> View:
    """The view of one text of a batch."""

    def own(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[0] == 1 else x[text : text + 1]

    def visible(rows: slice) -> Tensor | None:
        return own(view.visible(rows))

    return replace(
        view, q=own(view.q), k=own(view.k), v=own(view.v), index=own(view.index), real=own(view.real),
        bias=own(view.bias), count=own(view.count), visible=visible, cached_scores=None,
    )  # fmt: skip


def layer_view(reduction: Any, layer: int, text: int, x: Tensor) -> LayerView:
    """The view of a layer that has just run, whose output is x [B, n, d], in one text."""
    prompt = reduction.prompt
    view = one_text(present(prompt.view, "the layer before called its attention"), text)
    columns = torch.arange(prompt.new, device=x.device) if prompt.columns is None else prompt.columns[text]
    real = real_columns(reduction, text, columns)
    where, alive = prompt.where[text], prompt.alive[text]
    start = view.seen - prompt.new
    slots = slots_of(view, where[alive] + start)
    queries = torch.searchsorted(columns, where[alive])
    visual = torch.isin(columns, where[alive])
    question = (columns > where.max()) & real
    asked = {"last": real.nonzero()[-1:, 0], "question": question.nonzero()[:, 0], "visual": queries}

    def part(give: Callable[[slice], Tensor]) -> Callable[[str], Tensor]:
        def rows(name: str) -> Tensor:
            require(name in asked, f"rows are one of {tuple(asked)}", rows=name)
            at = asked[name]
            low, high = int(at.min()), int(at.max()) + 1
            return give(slice(low, high))[0][:, at - low][..., slots]

        return rows

    def whole() -> Tensor:
        kept = real.nonzero()[:, 0]
        return view.weights()[0][:, kept][..., slots_of(view, columns[kept] + start)]

    return LayerView(
        layer=layer, layers=reduction.layers, alive=alive, image=image_numbers(prompt.images[text], x.device),
        states=x[text][real], visual=visual[real], question=question[real], weights=part(view.weights),
        scores=part(view.scores), whole=whole, padding=text_padding(reduction, text), memory=prompt.memory[text],
        seed=seed_of(reduction.method.config),
    )  # fmt: skip


def real_columns(reduction: Any, text: int, columns: Tensor) -> Tensor:
    """[n] bool: which columns hold a token that is neither padding nor dropped and carried along."""
    mask, prompt = reduction.step.inputs.get("attention_mask"), reduction.prompt
    real = torch.ones(prompt.new, dtype=torch.bool, device=columns.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask[text, -prompt.new :].bool()
    if prompt.dropped is not None:
        real = real & ~prompt.dropped[text]
    return real[columns]


def slots_of(view: View, index: Tensor) -> Tensor:
    """The stored slots of tokens by true index."""
    return torch.searchsorted(view.index[0, 0].contiguous(), index)


def image_numbers(images: list, device: torch.device) -> Tensor:
    numbers = [torch.full((at.tokens,), i, device=device) for i, at in enumerate(images)]
    return torch.cat(numbers)


def text_padding(reduction: Any, text: int) -> Tensor | None:
    """[P] share of padding of all visual tokens of a text; None: no picture is padded."""
    images = reduction.prompt.images[text]
    shares = [padding_at(reduction, at) for at in images]
    if all(share is None for share in shares):
        return None
    device = reduction.prompt.where[text].device
    return torch.cat(
        [
            torch.zeros(at.tokens, device=device) if s is None else s
            for s, at in zip(shares, images, strict=True)
        ]
    )
