"""What the families of the zoo have in common: sizes, random ids, and the table they are entered in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TEXT: dict[str, Any] = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SLIDING = dict(sliding_window=6)
# name -> a function that makes (model, inputs)
ZOO: dict[str, Callable[[], tuple[Any, dict]]] = {}


def ids(batch: int = 1, length: int = 12) -> Tensor:
    return torch.randint(3, 118, (batch, length))


def family(make: Callable) -> Callable:
    ZOO[make.__name__] = make
    return make


def text(**changes: Any) -> dict[str, Any]:
    """The sizes of a text model with these changes; None takes one out."""
    return {name: x for name, x in {**TEXT, **changes}.items() if x is not None}
