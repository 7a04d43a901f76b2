"""How a layer's keys are turned to other positions, proven on the layer itself.

A layer is asked for the keys of a few inputs at positions p and at p + d. One of these must carry the first to the
second: nothing at all (a layer without rotary positions), the model file's own apply function on the whole width, or on
a part of it with the rest left alone. If none does (a weighted norm after the rotation, a layout of its own), the layer
is refused by name. Nothing is assumed of names and settings.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core import Unsupported

POINTS = torch.tensor([[3, 4, 9, 17]]), torch.tensor([[5, 1, 12, 2]])  # positions, and how far each is moved
Tables = tuple[Tensor, Tensor]  # cos, sin [.., n, width]
# of a turned vector's length: what rounding leaves in the dtype, and far below what a wrong turn does
NEAR = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Turning:
    """A way to turn vectors [b, h, m, D] by cos and sin [1|b, m, width]."""

    apply: Callable[..., Any] | None  # None: keys do not depend on positions
    part: tuple[int, int | None] = (0, None)  # of the width
    of_queries: bool = True  # whether it holds for queries too

    @property
    def fixed(self) -> bool:
        return self.apply is None

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.apply is None:
            return x
        start, stop, _ = slice(*self.part).indices(x.shape[-1])
        inner = x[..., start:stop]
        return torch.cat([x[..., :start], self.apply(inner, cos, sin), x[..., stop:]], -1)


@dataclass(frozen=True)
class Question:
    """A call of an attention module in which its tensors are to be filled in: no mask, no cache, nothing kept alive."""

    width: int  # of the inputs
    dtype: torch.dtype
    device: torch.device
    tables: torch.dtype  # of cos and sin
    args: tuple
    kwargs: dict

    @staticmethod
    def like(args: tuple, kwargs: dict) -> "Question | None":
        """The question in the form of a call that the model itself made; None: its inputs are not [B, N, width]."""
        every = [*args, *kwargs.values()]
        x = next((v for v in every if holds(v) == "x"), None)
        if x is None:
            return None
        cos = next(v for v in every if holds(v) == "tables")[0]
        named = {name: as_hole(v) for name, v in kwargs.items()}
        return Question(x.shape[-1], x.dtype, x.device, cos.dtype, tuple(map(as_hole, args)), named)

    def filled(self, x: Tensor, at: Tensor, tables: Tables) -> tuple[list, dict]:
        cos, sin = (t.to(self.tables) for t in tables)
        values = {"x": x, "tables": (cos, sin), "place": at[0], "places": at}
        fill = lambda v: values[v.what] if isinstance(v, Hole) else {} if v == {} else v  # noqa: E731
        return [fill(v) for v in self.args], {name: fill(v) for name, v in self.kwargs.items()}


@dataclass(frozen=True)
class Hole:
    what: str


def as_hole(value: Any) -> Any:
    """An argument without its tensors: a hole for what is filled in, settings as they are, None for the rest.

    What layers hand on to each other in a mapping is an empty dict.
    """
    what = holds(value)
    if isinstance(value, MutableMapping):
        return {}
    return Hole(what) if what else value if isinstance(value, bool | int | float | str) else None


def holds(value: Any) -> str:
    """What an argument of an attention module is: its inputs, its tables, positions, or none of these."""
    if is_rotary_table(value):
        return "tables"
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return ""
    if value.is_floating_point():
        return "x" if value.dim() == 3 else ""
    return {1: "place", 2: "places"}.get(value.dim(), "")


def is_rotary_table(value: Any) -> bool:
    """Whether an argument of an attention module is its (cos, sin)."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, Tensor) for x in value)


def prove(
    attention: nn.Module,
    question: Question,
    ask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    tables: Callable[[Tensor], Tables],
) -> Turning:
    """The turning that carries this layer's keys from one position to another; Unsupported if there is none.

    ask(positions [1, n], inputs [1, n, width]) -> queries and keys [1, H, n, D] of the layer;
    tables(by [1, n]) -> cos and sin
    """
    at, by = (p.to(question.device) for p in POINTS)
    x = torch.randn(1, at.shape[1], question.width, generator=torch.Generator().manual_seed(0))
    x, name = x.to(question.device, question.dtype), type(attention).__name__
    try:
        with torch.no_grad():
            before, after = ask(at, x), ask(at + by, x)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise Unsupported(f"{name} could not be asked for its keys at other positions: {error}") from error
    for way in ways(attention, before[1].shape[-1], tables(by)[0].shape[-1]):
        if carries(way, before[1], after[1], tables(by)):
            return Turning(way.apply, way.part, carries(way, before[0], after[0], tables(by)))
    raise Unsupported(
        f"turning the keys of {name} by the model's rotary tables does not give its own keys at another position "
        '(a norm after the rotation, or a layout of its own): they cannot be moved; leave them (positions="text") '
        "or use a method that moves no keys"
    )


def ways(attention: nn.Module, width: int, rotated: int) -> Iterator[Turning]:
    """What may carry keys of this width to another position, by tables of width `rotated`."""
    yield Turning(None)
    file = sys.modules[type(attention).__module__]
    names = [
        name for name in vars(file) if name.startswith("apply_") and "rot" in name and "vision" not in name
    ]
    for name in sorted(names, key=lambda n: "multimodal" not in n):
        apply = of_one(getattr(file, name))
        yield Turning(apply)
        if rotated < width:
            yield Turning(apply, (0, rotated))
            yield Turning(apply, (width - rotated, None))


def of_one(apply: Callable) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """An apply function as (x, cos, sin) -> x rotated; most of them take queries and keys."""
    if list(inspect.signature(apply).parameters)[1:2] == ["cos"]:
        return apply
    return lambda x, cos, sin: apply(x, x, cos, sin)[1]


def carries(way: Turning, before: Tensor, after: Tensor, tables: Tables) -> bool:
    """Whether this way turns what the layer made at one position into what it makes at another."""
    heads = before.shape[1]
    cos, sin = (t.expand(*t.shape[:-3], heads, *t.shape[-2:]) for t in tables)
    try:
        turned = way(before.float().transpose(0, 1), cos, sin).transpose(0, 1)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for other arguments
        return False
    wrong = (turned - after).float().norm(dim=-1) / after.float().norm(dim=-1).clamp(min=1e-12)
    return turned.shape == after.shape and bool((wrong <= NEAR[before.dtype]).all())
