"""Rotating keys and queries further, by the model's own rotary tables.

Rotations compose, so a vector rotated at position p is carried to p + d by the rotation of d alone. The tables
for d come from replaying the model's own rotary module (linear, llama3 and YaRN scaling), its own apply function does
the rest; the attention factor that YaRN puts into cos and sin is taken out. In float32.

That a layer is handed cos and sin proves nothing: it may leave them unused, rotate a part of its width, or normalise
after the rotation. So each layer is asked, once, for its keys of a few inputs at two sets of positions (turning.py).
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard.attaching.turning import Question, Tables, Turning, prove
from regard.core import Unsupported, require
from regard.core.errors import present

# rope types whose frequencies change with the length
CHANGING = ("dynamic", "longrope")


@dataclass
class RotaryCall:
    """A call of a rotary module. It holds on to its tables, so that no other tensor can take their place in memory."""

    module: nn.Module
    args: list
    kwargs: dict
    kinds: list[str]
    tables: Tables

    def positions(self) -> Tensor:
        """[1|B, N], or [components, 1|B, N] where a token has several."""
        return self.kwargs["position_ids"] if "position_ids" in self.kwargs else self.args[1]

    def at(self, positions: Tensor) -> Tables:
        """cos and sin in float32 at other positions [b, n], the same in every component."""
        old = self.positions()
        new = positions if old.dim() == 2 else positions.expand(old.shape[0], *positions.shape)
        args, kwargs = list(self.args), dict(self.kwargs)
        if args:
            args[0] = self.tables[0].new_empty(0, dtype=torch.float32)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = new
        else:
            args[1] = new
        return self.module.forward(*args, **kwargs)

    def changing(self) -> str | None:
        """The rope type, if its frequencies change with the length."""
        kind = getattr(self.module, "rope_type", "default")
        return next((k for k in (kind.values() if isinstance(kind, dict) else [kind]) if k in CHANGING), None)


class Rotary:
    """Watches the rotary modules of a model; `rotate` replays the one that made a layer's cos and sin."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[RotaryCall] = []
        self.tables: dict[nn.Module, Tables] = {}  # cos and sin by attention module, as it was handed them
        # cache layer -> the attention module that stores keys in it
        self.owners: WeakKeyDictionary[Any, nn.Module] = WeakKeyDictionary()
        # how each attention module is asked for its keys, and what came of it
        self.questions: dict[nn.Module, Question | None] = {}
        self.turnings: dict[nn.Module, Turning | Unsupported] = {}
        # the latest rotation: its call, how far, the shape, and the tables
        self.moved: tuple[RotaryCall, Tensor, torch.Size, Tables] | None = None
        # queries and keys, while a layer is being asked
        self.probe: list[tuple[Tensor, Tensor]] | None = None
        self.hooks = [
            m.register_forward_hook(self._record, with_kwargs=True)
            for m in model.modules()
            if "Rotary" in type(m).__name__ and "Vision" not in type(m).__name__
        ]

    def _record(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if isinstance(out, tuple) and torch.is_tensor(out[0]):
            kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, str)]
            self.calls = [c for c in self.calls if c.module is not module or c.kinds != kinds]
            self.calls.append(RotaryCall(module, list(args), dict(kwargs), kinds, out))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def note(self, attention: nn.Module, tables: Tables, args: tuple, kwargs: dict) -> None:
        """An attention module is about to run with these tables and arguments."""
        self.tables[attention] = tables
        if attention not in self.questions:
            self.questions[attention] = Question.like(args, kwargs)

    def call_of(self, attention: nn.Module) -> RotaryCall | None:
        """The call of a rotary module that made this layer's tables."""
        tables = self.tables.get(attention)
        if tables is None:
            return None
        return next((c for c in self.calls if memory_of(c.tables[0]) == memory_of(tables[0])), None)

    def positions(self, attention: nn.Module) -> tuple[Tensor, bool] | None:
        """[1|B, N] where the layer's rotation puts the tokens of this forward, and whether a token has several.

        Of several components the lowest: an image's tokens stand from there on.
        """
        call = self.call_of(attention)
        if call is None:
            return None
        at = call.positions()
        return (at, False) if at.dim() == 2 else (at.amin(0), True)

    def can_rotate(self, attention: nn.Module) -> bool:
        """Whether `rotate` is possible for this attention module, of queries too."""
        try:
            return self._turning(attention).of_queries
        except Unsupported:
            return False

    def rotate(self, attention: nn.Module, x: Tensor, by: Tensor, queries: bool = False) -> Tensor:
        """x [B, h, m, D] rotated by `by` [.., .., m] positions further, in x's dtype."""
        turning = self._turning(attention)
        if queries and not turning.of_queries:
            raise Unsupported(
                f"{type(attention).__name__} does more to a query than rotate it to its position"
            )
        if turning.fixed:
            return x
        batch, heads, m, width = x.shape
        call = self._call(attention)
        if by.dim() == 3 and by.shape[1] == 1:  # one table for all heads
            return turning(x.float(), *self._further(call, by, by[:, 0].expand(-1, m))).to(x.dtype)
        flat = by.expand(batch, heads, m).reshape(batch * heads, m)
        wide = x.float().reshape(batch * heads, 1, m, width)
        return turning(wide, *self._further(call, by, flat)).view(batch, heads, m, width).to(x.dtype)

    def _further(self, call: RotaryCall, by: Tensor, positions: Tensor) -> Tables:
        """cos and sin of `by`, in the shape of `positions`; layers that are moved by one tensor share them."""
        known = self.moved
        if known is None or known[0] is not call or known[1] is not by or known[2] != positions.shape:
            known = self.moved = (call, by, positions.shape, unscaled(call.at(positions)))
        return known[3]

    def _call(self, attention: nn.Module) -> RotaryCall:
        call, name = self.call_of(attention), type(attention).__name__
        if call is None:
            raise Unsupported(
                f"{name} shows no rotary table, so its keys cannot be moved to other positions; "
                'a method that re-positions keys needs rotary positions (or its setting positions="text")'
            )
        if "kv_b_proj" in attention._modules:
            raise Unsupported(f"{name} (latent attention) rotates a part of its keys only")
        if call.changing() is not None:
            raise Unsupported(
                f"rope type {call.changing()!r} changes its frequencies with the length: keys cannot be moved"
            )
        return call

    def _turning(self, attention: nn.Module) -> Turning:
        """How this layer's keys are turned, proven on its own keys; a layer is asked once, whatever comes of it."""
        call = self._call(attention)
        if attention not in self.turnings:
            self.turnings[attention] = self._proven(attention, call)
        turning = self.turnings[attention]
        if isinstance(turning, Unsupported):
            raise turning
        return turning

    def _proven(self, attention: nn.Module, call: RotaryCall) -> Turning | Unsupported:
        rule = f"{type(attention).__name__} takes inputs [B, N, width]"
        question = present(self.questions[attention], rule)
        ask = lambda at, x: self._ask(attention, call.at(at), at, x)  # noqa: E731
        try:
            return prove(attention, question, ask, lambda by: unscaled(call.at(by)))
        except Unsupported as refusal:
            return refusal

    def _ask(self, attention: nn.Module, tables: Tables, at: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and keys [1, H, n, D] that the layer makes of inputs x [1, n, width] at positions [1, n]."""
        args, kwargs = present(self.questions[attention], "a layer that is asked").filled(x, at, tables)
        self.probe = []
        try:
            with without_hooks(attention):
                attention.forward(*args, **kwargs)
            calls = len(self.probe)
            require(calls == 1, f"{type(attention).__name__} attends once in a forward", calls=calls)
            return self.probe[0]
        finally:
            self.probe = None

    def answer(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, H, E]: what a layer that is asked is given for attention; its queries and keys are noted."""
        present(self.probe, "a layer is being asked").append((q, k))
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])  # contiguous: some view it


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Hooks of the user's on what lies within a module see what the model is asked, not what it is probed with."""
    inner = list(module.modules())[1:]
    kept = [(m, m._forward_hooks, m._forward_pre_hooks) for m in inner]
    try:
        for m in inner:
            m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for m, after, before in kept:
            m._forward_hooks, m._forward_pre_hooks = after, before


def memory_of(table: Tensor) -> int:
    """What a table and its last rows have in common."""
    return table.untyped_storage().data_ptr()


def unscaled(tables: Tables) -> Tables:
    """cos and sin without the factor that YaRN puts into both."""
    cos, sin = tables
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, sin / length
