"""Scissorhands: a full buffer drops at once the tokens that were unimportant most often of late.

    I_j = #{ t > n-w : t ≥ j, softmax(q_t K)_j < 1/m_t }       m_t stored tokens that query t sees; by cache head
    when more than B are stored: keep the last r tokens and, of the others, those with the smallest I, B - d in all

where n is the length of the text and w the window of history. Tokens that mattered in one step go on to matter (the
persistence of importance): whoever fell below the mean again and again is let go. Dropping d tokens together spares
the count in all the steps until the buffer is full again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, Kept, View, keep_best, row_blocks
from regard.ops.recent import asking_again, remember


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # B, the most that is stored; None: half of the text
    history: int = 400  # w, queries whose weights count
    recent: int = 10  # r, tokens that stay in any case
    drop: float = 0.5  # d, as a share of the budget

    def __post_init__(self) -> None:
        require(self.history >= 1, "history >= 1", history=self.history)
        require(self.recent >= 1, "recent >= 1", recent=self.recent)
        require(0 <= self.drop < 1, "0 <= drop < 1", drop=self.drop)


def observe(view: View, cfg: Config) -> None:
    remember(view, cfg.history)


def unimportant(view: View) -> Tensor:
    """[B, G, n] I: how often each stored token lay below the mean of a query that sees it."""
    again, asks = asking_again(view)
    queries = torch.arange(again.new - 1, -1, -1, device=asks.device)
    below = torch.zeros(())
    for rows in row_blocks(again.new, again.q.shape[0] * again.q.shape[1] * again.stored):
        seen = view.hold()[:, :, None] & (
            view.age()[:, :, None] >= queries[rows, None]
        )  # [1|B, 1|G, rows, n]
        mean = 1 / seen.sum(-1, keepdim=True).clamp(min=1)
        mean = mean * (seen & asks[:, None, rows, None])  # no weight lies below the mean where none counts
        weights = again.weights(rows).unflatten(1, (again.groups, -1))
        below = weights.lt_(mean[:, :, None]).sum((2, 3)) + below
    return below


def keep(view: View, cfg: Config) -> Kept | None:
    if not view.over():
        return None
    left = view.budget - (view.budget.double() * cfg.drop + 1e-9).long()  # [B]
    stays = view.age() < left.clamp(max=cfg.recent)[:, None, None]
    over = view.hold().sum(-1) > view.budget[:, None]  # [B, 1|G]
    budget = torch.where(over, left[:, None], view.budget[:, None]).expand(-1, view.groups)
    return keep_best(view, -unimportant(view).double(), stays, budget)


METHOD = CachePage(
    config=Config,
    observe=observe,
    keep=keep,
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "history": 6, "recent": 2, "drop": 0.25},),
    card=Card(
        title="Scissorhands",
        paper="Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test "
        "Time (NeurIPS 2023)",
        year=2023,
        idea="a full buffer lets go of half its tokens: those that lay below the mean most often in a recent window",
        cost="weights of w queries over what is stored, whenever the buffer is full",
        state="at most budget tokens and w queries per head",
        needs=("decoder-lm",),
        lineage=("h2o",),
        neutral={"budget": 1.0},
        caveat="no official code was seen. The paper counts with the weights of each step as it was; here the last w "
        "queries ask again, over what is stored when the buffer is full. It gives layers budgets of their own, by how "
        "persistent each was found to be; here all have one. Query heads that share a cache head count together",
    ),
)
