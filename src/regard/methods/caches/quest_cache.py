"""Quest: a query reads the pages of the cache whose keys could have the largest scores.

    M_p = max of the keys of page p, m_p = min, channel by channel      of L tokens each
    u_p = Σ_c max(q_c M_pc, q_c m_pc)  >=  q · k_j for every token j of the page
    read the newest page and the best by u_p: ⌊budget / L⌋ pages in all, by query head

where what matters depends on the query, so nothing is dropped for good: two vectors stand for a page, 1/L of the
cache, and only pages that may matter are read. The first layers attend to nearly everything and are read whole.

>>> q, page = torch.tensor([1.0, -2.0]), torch.tensor([[3.0, 1.0], [2.0, -1.0]])      # q · k = 1 and 4
>>> float(both_signs(q) @ torch.cat([page.amax(0), page.amin(0)]))                    # 1 · 3 + (-2) · (-1)
5.0
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32, gather_rows, top_slots
from regard.ops.labels import report_reading
from regard.ops.paged import block_slots, by_block, oldest, slots_at


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # tokens that a query head reads; None: 1024
    page: int = 16  # tokens of a page
    full: int = 2  # layers that are read whole

    def __post_init__(self) -> None:
        require(self.page >= 1 and self.full >= 0, "page >= 1 and full >= 0", page=self.page, full=self.full)


def both_signs(q: Tensor) -> Tensor:
    """[..., 2 D]: what meets the largest keys, and what meets the smallest."""
    return torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)


def bounds(view: View, page: int, slots: Tensor) -> Tensor:
    """[B, K, p, 2 D] the largest and the smallest key of each page of slots [b, 1, p · page], by channel."""
    k = at_least_float32(gather_rows(view.k, slots)).unflatten(2, (-1, page))
    none = (slots < 0).unflatten(2, (-1, page))[..., None]
    return torch.cat([k.masked_fill(none, -torch.inf).amax(3), k.masked_fill(none, torch.inf).amin(3)], -1)


def select(view: View, cfg: Config) -> Tensor | None:
    if view.layer < cfg.full:
        return None
    table, first = by_block(view, cfg.page, partial(bounds, view, cfg.page))
    held = view.stored if view.real is None else view.real.sum(-1).amax(-1)  # [1|B]
    whole = view.budget >= held
    if view.phase != "decode" or bool(whole.all()):
        return None
    newest = (view.length() - 1) // cfg.page  # [1|B]
    # beside the newest page; all where the budget covers what a row holds
    count = (view.budget // cfg.page - 1).clamp(min=0).masked_fill(whole, view.seen)
    pages = top_slots(upper(view, table, first, newest, cfg.page), count[:, None])  # [B, H, m]
    pages = torch.where(pages < 0, -1, pages + first) if first else pages
    others = block_slots(view, pages, cfg.page, torch.zeros_like(newest))
    slots = torch.cat([others, newest_slots(view, newest, cfg.page).expand(*pages.shape[:2], -1)], -1)
    report_reading(view, slots, table)
    return slots


def newest_slots(view: View, newest: Tensor, page: int) -> Tensor:
    """[B, 1, m] slots of the newest page; where not even one page is within the budget, of its newest tokens."""
    place = newest[:, None] * page + torch.arange(page, device=newest.device)
    if int(view.budget.min()) < page:
        place = torch.where(place < (view.length() - view.budget)[:, None], -1, place)
    return slots_at(view, place[:, None])[..., : int(((view.length() - 1) % page).max()) + 1]


def upper(view: View, table: Tensor, first: int, newest: Tensor, page: int) -> Tensor:
    """[B, H, P] the largest product that a token of each page before the newest could have."""
    q = (
        both_signs(at_least_float32(view.q)).unflatten(1, (table.shape[1], -1)).flatten(2, 3)
    )  # [B, K, H/K, 2 D]
    u = (table @ q.mT).mT.flatten(1, 2)[..., : int(newest.max()) - first]
    if len(newest) == 1 and view.window is None:
        return u
    number = first + torch.arange(u.shape[-1], device=u.device)
    there = (number < newest[:, None]) & (number >= oldest(view)[:, None] // page)
    return u.masked_fill(~there[:, None], -torch.inf)


METHOD = CachePage(
    config=Config,
    select=select,
    budget=lambda cfg: 1024,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "page": 3, "full": 1},),
    card=Card(
        title="Quest",
        paper="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (arXiv:2406.10774)",
        year=2024,
        idea="the largest and smallest key of each page bound its scores; a step reads the pages of the best bounds",
        cost="N/L bounds of 2 D numbers, then the budget's keys and values per query head; the first layers in full",
        state="the whole cache and two vectors per page; memory does not shrink",
        needs=("decoder-lm",),
        lineage=("quest",),
        neutral={"budget": 1.0},
        caveat="prompts and questions of several tokens attend to everything. Released kernels read the newest page "
        "in any case, as here; the released evaluation reads three pages at least, and the newest by its bound alone. "
        "Of a budget below one page the newest tokens are read. The bounds leave a position bias of the model out",
    ),
)
