"""Masks: who may attend to whom, said once as a predicate and lowered to whatever a backend wants. True = attend.

A mask is an expression over predicates of `Coordinates` (query index, key index, head, roles). `&`, `|` and `~` compose
masks, and `repr` prints the expression. Indices are true indices, the position of a token in its text, never slots: so
the same expression is exact on a dense matrix, in one decode step, and over a cache from which most keys were evicted.
core/lowering.py makes these out of it.

>>> streaming = causal() & (window(3) | first(1))
>>> streaming
causal() & (window(3) | first(1))
>>> streaming.dense(5).int()[0, 0]
tensor([[1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 0, 1, 1, 1]], dtype=torch.int32)
>>> streaming.row(9)  # the keys that the step of token 9 reads
tensor([[[0, 7, 8, 9]]])
>>> stored = torch.tensor([0, 3, 8, -1])  # a cache that kept tokens 0, 3 and 8, and has a free slot
>>> streaming.at(torch.tensor([9]), stored).int()
tensor([[[[1, 0, 1, 0]]]], dtype=torch.int32)
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from regard.core.coordinates import Coordinates, Sides, Tiles
from regard.core.deprecation import moved
from regard.core.errors import require
from regard.core.lowering import Blocks, Lowering
from regard.core.roles import Roles

__all__ = [
    "Blocks",
    "Coordinates",
    "Mask",
    "Roles",
    "Sides",
    "Tiles",
    "causal",
    "first",
    "predicate",
    "window",
]


@dataclass(frozen=True)
class Mask(Lowering):
    """A predicate, or an expression of masks. Made by `predicate`, composed by `&`, `|` and `~`; equal by content."""

    rule: Callable[..., Tensor]
    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    needs: tuple[str, ...] = ()
    heads: int | None = None
    parts: tuple["Mask", ...] = ()

    def cover(self, at: Tiles) -> tuple[Tensor, Tensor] | None:
        """(some, all) of tiles; None: no rule of tiles says it."""
        if not self.parts:
            tiles = getattr(self.rule, "tiles", None)
            return None if tiles is None else tiles(at, **dict(self.settings))
        parts = [part.cover(at) for part in self.parts]
        known = [part for part in parts if part is not None]
        if self.name == "~":
            return (~known[0][1], ~known[0][0]) if known else None
        if not known:
            return None
        some, every = (self.rule(*sides) for sides in zip(*known, strict=True))
        # a part that nobody knows leaves open what the others do not settle
        unknown = len(known) < len(parts)
        return (some | (self.name == "|")) if unknown else some, (
            every & (self.name == "|")
        ) if unknown else every

    def __call__(self, at: Coordinates) -> Tensor:
        if self.parts:
            return self.rule(*(part(at) for part in self.parts))
        return self.rule(at, **dict(self.settings))

    def __and__(self, other: "Mask") -> "Mask":
        return _compose(_all, "&", self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return _compose(_any, "|", self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return _compose(_not, "~", self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the name of what made it: a predicate's name in its module holds the maker, not the rule."""
        if type(self) is not Mask or not (self.parts or hasattr(self.rule, "maker")):
            return super().__reduce_ex__(protocol)
        if self.parts:
            return _compose, (self.rule, self.name, *self.parts)
        return partial(self.rule.maker, **dict(self.settings)), ()  # type: ignore[attr-defined]

    def __bool__(self) -> bool:
        raise TypeError(f"a mask has no truth value; write & | ~ instead of and, or, not: {self!r}")

    def __repr__(self) -> str:
        if self.name == "~":
            return f"~{_bracketed(self.parts[0], '~')}"
        if self.parts:
            return f" {self.name} ".join(_bracketed(part, self.name) for part in self.parts)
        usual = inspect.signature(self.rule).parameters
        changed = [(name, value) for name, value in self.settings if value != usual[name].default]
        arguments = [
            repr(value) if i == 0 else f"{name}={value!r}" for i, (name, value) in enumerate(changed)
        ]
        return f"{self.name}({', '.join(arguments)})"


def predicate(
    *needs: str, tiles: Callable[..., tuple[Tensor, Tensor]] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Mask]]:
    """Turn `rule(at: Coordinates, **settings) -> Tensor` into a maker of masks; `needs` names the roles that it reads.

    The rule uses elementwise tensor operations only, so that one text serves matrices, single steps and FlexAttention.
    A rule with a setting called `heads` gives each query head its own mask, and holds for that number of heads. `tiles`
    says for whole tiles what it can (core/tiling.py), so that a long mask is cut into blocks without asking all pairs.

    >>> @predicate("document")
    ... def same_document(at):
    ...     return at.q_role("document") == at.k_role("document")
    >>> same_document().dense(3, roles=Roles(document=[0, 0, 1])).int()[0, 0]
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """

    def make(rule: Callable[..., Tensor]) -> Callable[..., Mask]:
        signature = inspect.signature(rule)

        def mask(*args: Any, **settings: Any) -> Mask:
            bound = signature.bind(None, *args, **settings)
            bound.apply_defaults()
            named = tuple(bound.arguments.items())[1:]
            return Mask(rule, rule.__name__, named, needs, heads=dict(named).get("heads"))

        mask.__name__, mask.__qualname__, mask.__doc__ = rule.__name__, rule.__qualname__, rule.__doc__
        mask.__module__ = rule.__module__
        rule.maker = mask  # type: ignore[attr-defined]
        rule.tiles = tiles  # type: ignore[attr-defined]
        return mask

    return make


def _causal_tiles(at: Tiles) -> tuple[Tensor, Tensor]:
    return at.k0 <= at.q1, at.k1 <= at.q0


@predicate(tiles=_causal_tiles)
def causal(at: Coordinates) -> Tensor:
    """Itself and everything before."""
    return at.k <= at.q


def _window_tiles(at: Tiles, window: int, ahead: int) -> tuple[Tensor, Tensor]:
    least, most = at.q0 - at.k1, at.q1 - at.k0
    return (most >= -ahead) & (least < window - ahead), (least >= -ahead) & (most < window - ahead)


@predicate(tiles=_window_tiles)
def window(at: Coordinates, window: int, ahead: int = 0) -> Tensor:
    """`window` keys, the token itself included, `ahead` of them after it."""
    age = at.q - at.k
    return (-ahead <= age) & (age < window - ahead)


def _first_tiles(at: Tiles, n: int) -> tuple[Tensor, Tensor]:
    return at.k0 < n, at.k1 < n


@predicate(tiles=_first_tiles)
def first(at: Coordinates, n: int) -> Tensor:
    """The first n keys of the text."""
    return at.k < n


_STRENGTH = {"|": 0, "&": 1, "~": 2}


def _bracketed(part: Mask, around: str) -> str:
    weaker = part.parts and _STRENGTH[part.name] < _STRENGTH[around]
    return f"({part!r})" if weaker else repr(part)


def _compose(rule: Callable[..., Tensor], name: str, *masks: Mask) -> Mask:
    parts = [p for mask in masks for p in (mask.parts if mask.name == name and name != "~" else (mask,))]
    counts = {part.heads for part in parts} - {None}
    require(len(counts) <= 1, "masks that are composed have the same heads", heads=counts)
    needs = tuple(dict.fromkeys(role for part in parts for role in part.needs))
    return Mask(rule, name, (), needs, next(iter(counts), None), tuple(parts))


def _not(seen: Tensor) -> Tensor:
    return torch.logical_not(seen)


def _all(*seen: Tensor) -> Tensor:
    return reduce(torch.logical_and, seen)


def _any(*seen: Tensor) -> Tensor:
    return reduce(torch.logical_or, seen)


__getattr__ = moved(__name__, {"Place": "regard.core.mask:Coordinates"})
