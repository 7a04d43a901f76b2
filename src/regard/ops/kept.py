"""What a KV-cache policy answers: which slots stay, and the answer that follows from a score."""

from dataclasses import dataclass

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
    """

    slots: Tensor
    merged: tuple[Tensor, Tensor, Tensor] | None = None


def keep_best(view: View, score: Tensor, always: Tensor | None = None) -> Kept | None:
    """Keep the best-scored real tokens within each row's budget; those marked in `always` go first. None: all stay."""
    if not view.over():
        return None
    score = at_least_float32(score)
    if always is not None:
        score = torch.where(always, torch.finfo(score.dtype).max, score)
    score = torch.where(view.hold(), score, -torch.inf)
    budget = view.budget if score.shape[0] > 1 else view.budget[:1]
    return Kept(slots_of(best_by_age(view, score, budget[:, None])))


def best_by_age(view: View, score: Tensor, count: Tensor) -> Tensor:
    """[b, g, n] bool the `count` best slots; of equals the one whose token came first, wherever it is stored."""
    index = view.index.masked_fill(view.index < 0, view.seen)
    if not bool((index.diff(dim=-1) < 0).any()):
        return best(score, count)
    order = index.argsort(dim=-1, stable=True).expand_as(score)
    chosen = best(score.gather(-1, order), count)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
