"""What layers of one step have in common: an answer that depends on places in the text alone is found once for all.

Layers of a model mostly hold the same tokens under such a policy. Whether they do is looked up, not assumed: two small
tables are compared, which costs a tenth of what is saved.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.ops import View


@dataclass
class Places:
    """The latest answer to each question of this step, with what it depended on."""

    answers: dict[str, tuple[tuple, Any]] = field(default_factory=dict)

    def once(self, question: str, facts: tuple, answer: Callable[[], Any]) -> Any:
        """The latest answer to a question if its facts are the same, else a new one."""
        known = self.answers.get(question)
        if known is None or not alike(known[0], facts):
            known = self.answers[question] = (facts, answer())
        return known[1]

    def clear(self) -> None:
        self.answers.clear()


def places_of(view: View) -> tuple:
    """All that says where the tokens of a view stand and how many may stay."""
    return (
        view.stored, view.seen, view.fed, view.new, view.groups, view.window, view.phase, view.index, view.real,
        view.order, view.positions, view.budget,
    )  # fmt: skip


def alike(known: tuple, facts: tuple) -> bool:
    return len(known) == len(facts) and all(a is b or equal(a, b) for a, b in zip(known, facts, strict=True))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
