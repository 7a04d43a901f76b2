"""Roles: named integer labels per token (padding, document, image, grid y and x, ...), addressed by true
index.

A mask that speaks of documents or of an image grid reads the labels here. They grow while a model generates,
follow tokens that are gathered or pruned, and are indexed by the token's place in the text, so an evicted
cache reads the same labels as a full one. By convention -1 means "none of these", `padding` is 1 on padding
and 0 on tokens, and `image` is 0 on text and 1, 2, ... on the patches of the first, second, ... image.

>>> roles = Roles(document=[[0, 0, 1], [0, 1, 1]], padding=[0, 0, 0])
>>> roles
Roles(document[2, 3], padding[3])
>>> roles.grow(2)["document"]
tensor([[0, 0, 1, 1, 1],
        [0, 1, 1, 1, 1]])
>>> roles.gather([0, 2])["document"]
tensor([[0, 1],
        [0, 1]])
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import near, require

Labels = Tensor | Sequence[Any] | int
AXES = ("frame", "y", "x")  # of a grid, the last one counted first
FILLED = "tokens of a grid stand in the order of their places, each place once"
ONE_GRID = "the images of a batch fill one grid"


class Roles:
    """Labels of N tokens, [N] (one for all rows) or [B, N] each. Immutable: every change is a new object."""

    __slots__ = ("_labels", "_sides")
    _labels: Mapping[str, Tensor]
    _sides: tuple[int, ...] | None

    def __init__(self, **labels: Labels) -> None:
        tensors = {name: torch.as_tensor(label).long() for name, label in labels.items()}
        for name, label in tensors.items():
            require(label.dim() in (1, 2), "labels are [N] or [B, N]", role=name, labels=label)
        require(
            len({x.shape[-1] for x in tensors.values()}) <= 1, "all roles label the same tokens", **tensors
        )
        rows = {x.shape[0] for x in tensors.values() if x.dim() == 2}
        require(len(rows - {1}) <= 1, "all roles have the same rows", **tensors)
        object.__setattr__(self, "_labels", MappingProxyType(tensors))
        object.__setattr__(self, "_sides", None)

    @classmethod
    def grid(cls, *sides: int, **labels: Labels) -> "Roles":
        """Tokens that fill a grid of these sides, row by row: x; or y and x; or frame, y and x. Other labels beside.

        >>> Roles.grid(2, 3)["y"].tolist(), Roles.grid(2, 3)["x"].tolist()
        ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
        """
        require(1 <= len(sides) <= 3 and all(side >= 0 for side in sides), "one to three sides", sides=sides)
        places = torch.meshgrid(*(torch.arange(side) for side in sides), indexing="ij")
        named = {name: at.flatten() for name, at in zip(AXES[-len(sides) :], places, strict=True)}
        roles = cls(**named, **labels)
        object.__setattr__(roles, "_sides", tuple(sides))
        return roles

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Roles are immutable; use with_, grow, gather or reorder")

    def __reduce__(self) -> tuple:
        """A view of a dict cannot be pickled; the dict can."""
        return _roles, (dict(self._labels),)

    @property
    def labels(self) -> Mapping[str, Tensor]:
        return self._labels

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._labels)

    @property
    def length(self) -> int:
        return next((x.shape[-1] for x in self._labels.values()), 0)

    @property
    def sides(self) -> tuple[int, ...] | None:
        """The sides of the grid that the tokens fill, by their labels x, y and frame; None where they have none.

        ValueError where they have some and fill no grid, or the rows of a batch fill different ones.
        """
        if self._sides is None and "x" in self:
            object.__setattr__(self, "_sides", self._filled())
        return self._sides

    def _filled(self) -> tuple[int, ...]:
        names = [name for name in AXES if name in self]
        names = names if names == list(AXES[-len(names) :]) else ["x"]
        rows = {name: self[name] if self[name].dim() == 2 else self[name][None] for name in names}
        for name, at in rows.items():
            require(bool((at == at[:1]).all()), ONE_GRID, role=name)
        sides = tuple(int(at.max()) + 1 if at.numel() else 0 for at in rows.values())
        wanted = Roles.grid(*sides)
        filled = wanted.length == self.length and all(
            torch.equal(at[0], wanted[name].to(at.device)) for name, at in rows.items()
        )
        require(filled, FILLED, grid=sides, tokens=self.length)
        return sides

    @property
    def batch(self) -> int:
        return max([1, *(x.shape[0] for x in self._labels.values() if x.dim() == 2)])

    def __contains__(self, name: object) -> bool:
        return name in self._labels

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._labels:
            known = near(name, self.names) if self.names else "known: none"
            raise KeyError(f"the role {name!r} is missing; {known}")
        return self._labels[name]

    def label(self, name: str, row: Tensor, index: Tensor) -> Tensor:
        """The label of token `index` in batch row `row`, tensors that broadcast against each other."""
        labels = self[name]
        if labels.dim() == 1:
            return labels[index]
        return labels[0][index] if labels.shape[0] == 1 else labels[row, index]

    def with_(self, **labels: Labels) -> "Roles":
        return Roles(**{**self._labels, **labels})

    def grow(self, n: int = 1, **labels: Labels) -> "Roles":
        """Labels for n more tokens: those named (a number, [n] or [B, n]); else as the last token's, not
        padding.

        >>> Roles(padding=[1, 0], document=[3, 4]).grow(1, document=5)["document"]
        tensor([3, 4, 5])
        """
        for name in labels:
            self[name]
        return Roles(**{name: self._grown(name, n, labels.get(name)) for name in self})

    def _grown(self, name: str, n: int, new: Labels | None) -> Tensor:
        old = self[name]
        if new is None and name != "padding":
            require(self.length > 0, "a label to carry on, or one given", role=name)
            new = old[..., -1:]
        new = torch.as_tensor(0 if new is None else new, device=old.device).long()
        if new.dim() == 2 and old.dim() == 1:
            old = old.expand(new.shape[0], -1)
        rows = max(old.shape[0], new.shape[0]) if new.dim() == 2 else old.shape[0]
        old = old.expand(rows, -1) if old.dim() == 2 else old
        return torch.cat([old, new.expand(*old.shape[:-1], n)], dim=-1)

    def gather(self, index: Labels) -> "Roles":
        """The labels of the tokens `index` ([n], or [B, n] where rows differ); -1 gives -1."""
        index = torch.as_tensor(index).long()
        return Roles(**{name: self._gathered(name, index.to(self[name].device)) for name in self})

    def _gathered(self, name: str, index: Tensor) -> Tensor:
        labels = self[name]
        require(index.numel() == 0 or int(index.max()) < self.length, "index < length", length=self.length)
        if index.dim() == 1:
            return labels[..., index.clamp(min=0)].masked_fill(index < 0, -1)
        rows = labels.expand(index.shape[0], -1)
        return rows.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)

    def reorder(self, rows: Labels) -> "Roles":
        """The labels of these batch rows, in this order: for beams and repeated prompts."""
        rows = torch.as_tensor(rows).long()
        return Roles(
            **{name: x if x.dim() == 1 else x[rows.to(x.device)] for name, x in self._labels.items()}
        )

    def to(self, device: Any) -> "Roles":
        roles = Roles(**{name: x.to(device) for name, x in self._labels.items()})
        object.__setattr__(roles, "_sides", self._sides)
        return roles

    def __repr__(self) -> str:
        return f"Roles({', '.join(f'{name}{list(x.shape)}' for name, x in self._labels.items())})"


def _roles(labels: dict[str, Tensor]) -> Roles:
    return Roles(**labels)
