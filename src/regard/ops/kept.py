"""What a KV-cache policy answers: which slots stay, and the answer that follows from a score."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.ops.softmax import at_least_float32
from regard.ops.topk import best, slots_of
from regard.ops.view import View


@dataclass(frozen=True)
class Kept:
    """The answer of `keep`: slots [1|B, 1|G, m] ascending, -1 = empty, and tokens merged from dropped ones.

    merged = (k [B, G, e, D], v [B, G, e, E], count [B, G, e]): each stands for `count` tokens and enters the
    softmax with that weight.
    rewritten = (k [B, G, m, D], v [B, G, m, E]): what stands in these slots from now on.
    """

    slots: Tensor
    merged: tuple[Tensor, Tensor, Tensor] | None = None
    rewritten: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def all_but(hole: Tensor, stored: int) -> "Kept":
        """All of so many slots but one in each row and head, [b, g]: what most steps of a full budget answer.

        >>> Kept.all_but(torch.tensor([[1, 3]]), 4).slots
        tensor([[[0, 2, 3],
                 [0, 1, 2]]])
        """
        place = torch.arange(stored - 1, device=hole.device)
        kept = Kept(place + (place >= hole[..., None]))
        vars(kept).update(full=True, holes=hole)
        return kept

    @cached_property
    def full(self) -> bool:
        """Whether no row or head keeps fewer slots than another."""
        return not bool((self.slots < 0).any())

    @cached_property
    def holes(self) -> Tensor:
        """[1|B, 1|G] the slot that goes, where all but one stay."""
        last = self.slots.shape[-1]
        shifted = self.slots != torch.arange(last, device=self.slots.device)
        return torch.where(shifted.any(-1), shifted.to(torch.uint8).argmax(-1), last)

    @cached_property
    def hole(self) -> int | None:
        """The same as a number, where all rows and heads let go of one slot."""
        return int(self.holes) if self.holes.numel() == 1 else None


def keep_best(
    view: View, score: Tensor, always: Tensor | None = None, budget: Tensor | None = None
) -> Kept | None:
    """Keep the best-scored real tokens within each row's budget; those marked in `always` go first. None: all stay.

    budget  [B, G] tokens of each head, where heads have budgets of their own
    """
    if budget is None and not view.over():
        return None
    score = at_least_float32(score)
    if always is not None:
        score = torch.where(always, torch.finfo(score.dtype).max, score)
    if budget is not None:
        return Kept(slots_of(best_by_head(view, score, always, budget)))
    if view.real is None and view.over_by_one():
        hole = lowest(view, score)
        if hole is not None:
            return Kept.all_but(hole, view.stored)
    score = torch.where(view.hold(), score, -torch.inf)
    budget = view.budget if score.shape[0] > 1 else view.budget[:1]
    return Kept(slots_of(best_by_age(view, score, budget[:, None])))


def best_by_head(view: View, score: Tensor, always: Tensor | None, budget: Tensor) -> Tensor:
    """[B, G, n] bool the best within each head's budget [B, G]; of `always`, where they are too many, the newest."""
    held = view.hold().expand_as(score)
    if always is None:
        return best_by_age(view, torch.where(held, score, -torch.inf), budget)
    first = best(torch.where(held & always, -view.age().to(score.dtype), -torch.inf), budget)
    rest = torch.where(held & ~always, score, -torch.inf)
    return first | best_by_age(view, rest, budget - first.sum(-1))


def lowest(view: View, score: Tensor) -> Tensor | None:
    """[b, g] the slot of the lowest score; of equals the one whose token came last. None: there are empty slots."""
    least = score.amin(-1, keepdim=True)
    index = torch.where(score == least, view.index, -1)
    hole = index.argmax(-1)
    usable = (least > -torch.inf).all() & (view.index >= 0).all()
    return hole if bool(usable) else None


def best_by_age(view: View, score: Tensor, count: Tensor) -> Tensor:
    """[b, g, n] bool the `count` best slots; of equals the one whose token came first, wherever it is stored."""
    index = view.index.masked_fill(view.index < 0, view.seen)
    if not bool((index.diff(dim=-1) < 0).any()):
        return best(score, count)
    order = index.argsort(dim=-1, stable=True).expand_as(score)
    chosen = best(score.gather(-1, order), count)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
