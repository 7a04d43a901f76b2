"""Rotating keys and queries further, by the model's own rotary tables.

Rotations compose, so a vector rotated at position p is carried to p + d by the rotation of d alone. The tables
for d come from replaying the model's own rotary module (linear, llama3 and YaRN scaling, partial rotation), its
own apply function does the rest; the attention factor that YaRN puts into cos and sin is taken out. In float32.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from regard.core import Unsupported

# rope types whose frequencies change with the length
CHANGING = ("dynamic", "longrope")


class Rotary:
    """Watches the rotary modules of a model; `rotate` replays the one that made a layer's cos and sin."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[int, tuple[nn.Module, list, dict, list[str]]] = {}
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}  # cos and sin by attention module
        self.hooks = [
            m.register_forward_hook(self._record, with_kwargs=True)
            for m in model.modules()
            if "Rotary" in type(m).__name__ and "Vision" not in type(m).__name__
        ]

    def _record(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if isinstance(out, tuple) and torch.is_tensor(out[0]):
            kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, str)]
            self.calls = {k: c for k, c in self.calls.items() if c[0] is not module or c[3] != kinds}
            self.calls[made_of(out[0])] = (module, list(args), dict(kwargs), kinds)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def can_rotate(self, attention: nn.Module, cos_sin: tuple[Tensor, Tensor] | None) -> bool:
        """Whether `rotate` is possible for this attention module."""
        if cos_sin is None or "kv_b_proj" in attention._modules or made_of(cos_sin[0]) not in self.calls:
            return False
        kind = getattr(self.calls[made_of(cos_sin[0])][0], "rope_type", "default")
        return not any(k in CHANGING for k in (kind.values() if isinstance(kind, dict) else [kind]))

    def rotate(
        self, attention: nn.Module, cos_sin: tuple[Tensor, Tensor] | None, x: Tensor, by: Tensor
    ) -> Tensor:
        """x [B, h, m, D] rotated by `by` [.., .., m] positions further, in x's dtype."""
        if cos_sin is None or made_of(cos_sin[0]) not in self.calls:
            raise Unsupported(
                f"{type(attention).__name__} shows no rotary table, so its keys cannot be moved to other positions; "
                'a method that re-positions keys needs rotary positions (or its setting positions="text")'
            )
        if "kv_b_proj" in attention._modules:
            raise Unsupported(
                f"{type(attention).__name__} (latent attention) rotates a part of its keys only"
            )
        batch, heads, m, width = x.shape
        flat = by.expand(batch, heads, m).reshape(batch * heads, m)
        cos, sin = self._tables(cos_sin, x, flat)
        length = (cos.square() + sin.square()).sqrt()
        wide = x.float().reshape(batch * heads, 1, m, width)
        apply, table = self._apply(attention), (cos / length, sin / length)
        rotated = apply(wide, *table) if takes_one(apply) else apply(wide, wide, *table)[1]
        return rotated.view(batch, heads, m, width).to(x.dtype)

    def _tables(self, cos_sin: tuple[Tensor, Tensor], x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        module, args, kwargs, _ = self.calls[made_of(cos_sin[0])]
        kind = getattr(module, "rope_type", "default")
        if any(k in CHANGING for k in (kind.values() if isinstance(kind, dict) else [kind])):
            raise Unsupported(
                f"rope type {kind!r} changes its frequencies with the length: keys cannot be moved"
            )
        args, kwargs = list(args), dict(kwargs)
        first = [x.new_empty(0, dtype=torch.float32), *args[1:]] if args else args
        old = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        new = by if old.dim() == 2 else by.expand(old.shape[0], *by.shape)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = new
        else:
            first[1] = new
        return module.forward(*first, **kwargs)

    @staticmethod
    def _apply(attention: nn.Module) -> Any:
        file = sys.modules[type(attention).__module__]
        for name in ("apply_multimodal_rotary_pos_emb", "apply_rotary_pos_emb"):
            if hasattr(file, name):
                return getattr(file, name)
        raise Unsupported(
            f"{type(attention).__module__} has no apply_rotary_pos_emb: its keys cannot be moved"
        )


@cache
def takes_one(apply: Callable) -> bool:
    """Whether an apply function rotates a tensor by itself, and not queries and keys in one call."""
    return "cos" in list(inspect.signature(apply).parameters)[:2]


def made_of(table: Tensor) -> int:
    """What a table and its last rows have in common: their memory."""
    return table.untyped_storage().data_ptr()
