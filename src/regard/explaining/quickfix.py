"""`with edit_output_projection(model, layer, prompts, targets, ...)`: one concept reads as another, in one weight.

The page diffquickfix has the mathematics. Keys are what the output projection of a self-attention layer is given at
the last token of the concept in each prompt, values what its weight makes of the same token of the target prompts;
prompts and targets are read as far as that layer and no further. Within the context the projection has the solved
weight; on leaving it has its own parameter back, the very object, whatever happened in between.

>>> from regard.testing.zoo import build
>>> model, _ = build("llama")
>>> edited_concept, wanted = torch.tensor([[5, 9, 12]]), torch.tensor([[5, 30]])
>>> with edit_output_projection(model, 0, edited_concept, wanted, [2], [1], strength=1e-4) as fix:
...     print(fix.name, fix.error < 0.01)
model.layers.0.self_attn.o_proj True
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regard.core import Unreachable, Unsupported, require
from regard.methods.tracing.diffquickfix import Config, edited

PROJECTION = re.compile(
    r"(^|\.)(self_attn|attn|attention|self_attention|SelfAttention|attention\.output)"
    r"\.(o_proj|out_proj|c_proj|dense|out_lin|o)$"
)
# columns of last subject tokens: one a text, or several
Positions = Sequence[int] | Sequence[Sequence[int]] | Tensor
Texts = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class QuickFix:
    """What was written: module, keys [K, D], values [K, E], and ‖W'k - v‖ / ‖v‖ over all keys."""

    name: str
    keys: Tensor
    values: Tensor
    error: float


class Reached(Exception):
    """The layer that was asked for has been given its input: the rest of the forward is not needed."""


@contextmanager
def edit_output_projection(
    model: PreTrainedModel,
    layer: int,
    prompts: Texts,
    targets: Texts,
    positions: Positions,
    target_positions: Positions,
    strength: float = Config.strength,
) -> Iterator[QuickFix]:
    """Within the context the layer answers the tokens of `prompts` as it answers those of `targets`.

    layer       which self-attention layer of the model, from 0; of a model with two towers, pass the tower
    prompts     ids [B, N], or what a tokenizer gives; padding is allowed
    targets     as many texts, of any length
    positions   the column of the concept's last token in each prompt, [B] or [B, P]; in each target likewise
    strength    λ: the smaller, the closer the values are met, and the further the weight goes from its own
    """
    require(not model.training, "the model is in eval mode: dropout would be written into the weight")
    name, projection = output_projection(model, layer)
    keys = given(model, projection, prompts, positions)
    wanted = given(model, projection, targets, target_positions)
    require(len(keys) == len(wanted), "a position in the targets for each in the prompts",
            positions=len(keys), target_positions=len(wanted))  # fmt: skip
    own, flip = projection.weight, isinstance(projection, Conv1D)  # Conv1D holds [D, E]
    weight = own.detach().mT if flip else own.detach()
    values = wanted @ weight.mT
    new = edited(weight, keys, values, Config(float(strength)))
    miss = torch.linalg.vector_norm((keys @ new.mT - values).float())
    error = float(miss / torch.linalg.vector_norm(values.float()))
    projection.weight = nn.Parameter((new.mT if flip else new).contiguous(), requires_grad=own.requires_grad)
    try:
        yield QuickFix(name, keys, values, error)
    finally:
        projection.weight = own


def output_projection(model: nn.Module, layer: int) -> tuple[str, nn.Linear | Conv1D]:
    """The output projection of a self-attention layer, counted in the order of the model's modules."""
    found = [(name, module) for name, module in model.named_modules() if PROJECTION.search(name)]
    if not found:
        raise Unreachable(f"{type(model).__name__} has no output projection under a name that is known here")
    require(0 <= layer < len(found), f"0 <= layer < {len(found)}", layer=layer)
    name, module = found[layer]
    if not isinstance(module, nn.Linear | Conv1D) or not module.weight.is_floating_point():
        raise Unsupported(f"{name} is {type(module).__name__}, not a Linear with a weight of floats")
    return name, module


@torch.no_grad()
def given(model: nn.Module, projection: nn.Module, texts: Texts, positions: Positions) -> Tensor:
    """[K, D] what the projection is given at these columns; the forward ends there."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise Reached

    handle = projection.register_forward_pre_hook(stop)
    try:
        model(**({"input_ids": texts} if isinstance(texts, Tensor) else texts))
    except Reached:
        return picked(seen[0], positions)
    finally:
        handle.remove()
    raise Unreachable("the model does not call this output projection as a module: its input cannot be read")


def picked(x: Tensor, positions: Positions) -> Tensor:
    """[K, D] of x [B, N, D]: text by text its columns, [B] or [B, P]."""
    at = torch.as_tensor(positions, device=x.device)
    require(x.ndim == 3 and at.ndim in (1, 2) and len(at) == len(x), "positions [B] or [B, P] for inputs [B, N, D]",
            positions=at, inputs=x)  # fmt: skip
    require(not at.is_floating_point() and bool(((at >= 0) & (at < x.shape[1])).all()),
            f"columns 0 <= position < {x.shape[1]}", positions=at.tolist())  # fmt: skip
    at = at.view(len(x), -1)
    return x[torch.arange(len(x), device=x.device)[:, None], at].flatten(0, 1)
