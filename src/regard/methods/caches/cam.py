"""CaM, cache merging: the value of an evicted token is shared out to the tokens after it, by a draw.

    p_i = A_i / mean(A_j, j in next(i))         at most 1; next(i): the m kept tokens that follow i in the text
    v_j = v_j + v_i / m        for all j in next(i), with probability p_i        keys stay as they are

where A is the attention that a token received so far, summed over the steps and the query heads that share it. A token
that goes takes its share out of the output of its head; those behind it are attended to alike, and carry it on. What
goes is the choice of the method below. Of fewer than m tokens that follow each takes its part of as many as there are.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, Unsupported, require
from regard.kinds.cache import CachePage, decide, refuse_what_does_more
from regard.ops import Kept, View, gather_rows, slots_of
from regard.ops.hashing import uniform
from regard.ops.rewriting import standing, staying


@dataclass(frozen=True)
class Config:
    following: int = 32  # m, kept tokens that share the value of one that goes
    seed: int = 0  # another one is another draw

    def __post_init__(self) -> None:
        require(self.following >= 1, "following >= 1", following=self.following)
        require(self.seed >= 0, "seed >= 0", seed=self.seed)


def observe(view: View, below: Any, page: CachePage) -> None:
    if page.observe is not None:
        page.observe(view, below)
    view.notes("cam").add_(view.received())


def keep(view: View, below: Any, page: CachePage, cfg: Config) -> Kept | None:
    kept = decide(page, [view], below)[0]
    if kept is None:
        return None
    if kept.merged is not None:
        raise Unsupported(f"cam shares out what goes, and {page.card.title} merges it already")
    stays = staying(view, kept)
    nth = counted(view, stays)
    end = (nth + cfg.following).minimum(stays.sum(-1, keepdim=True))
    gone = slots_of(drawn(view, stays, nth, end, cfg))  # [B, G, e]
    if gone.shape[-1] == 0:
        return kept
    k, v = standing(view, kept)
    gift = shared_out(view, gone, nth, end)  # [B, G, n + 1, E], by place among the kept tokens
    slots = kept.slots.expand(*stays.shape[:2], -1).clamp(min=0)
    place = (nth.gather(-1, slots) - 1).clamp(min=0)[..., None]
    real = (stays.gather(-1, slots) & (kept.slots >= 0))[..., None]
    gift = gift.gather(2, place.expand(*place.shape[:3], v.shape[-1]))
    return Kept(kept.slots, rewritten=(k, v + gift.masked_fill(~real, 0).to(v.dtype)))


def counted(view: View, stays: Tensor) -> Tensor:
    """[B, G, n] tokens that stay, of those up to each in the text, itself included; of padding all of them."""
    order = view.rank().masked_fill(~view.hold(), view.seen).expand_as(stays).argsort(-1)
    return torch.zeros_like(order).scatter(-1, order, stays.gather(-1, order).cumsum(-1))


def drawn(view: View, stays: Tensor, nth: Tensor, end: Tensor, cfg: Config) -> Tensor:
    """[B, G, n] bool: tokens that go and whose value is shared out, to the kept tokens `nth` ... `end` - 1."""
    received = view.notes("cam").double()
    line = received.new_zeros(*stays.shape[:2], view.stored + 1)
    line = line.scatter(-1, torch.where(stays, nth - 1, view.stored), received)[..., :-1]
    total = F.pad(line.cumsum(-1), (1, 0))
    mean = (total.gather(-1, end) - total.gather(-1, nth)) / (end - nth)
    head = torch.tensor(view.heads or range(view.groups), device=nth.device)
    draw = uniform(cfg.seed, view.layer, head[:, None], view.rank())
    return ~stays & (end > nth) & (draw * mean < received)


def shared_out(view: View, gone: Tensor, nth: Tensor, end: Tensor) -> Tensor:
    """[B, G, n + 1, E] float64: what each token that stays is given, in the order of the text."""
    first, last = (x.gather(-1, gone.clamp(min=0)) for x in (nth, end))
    part = gather_rows(view.v, gone).double() / (last - first).clamp(min=1)[..., None]
    part = part.masked_fill((gone < 0)[..., None], 0)
    change = part.new_zeros(*nth.shape[:2], view.stored + 1, part.shape[-1])
    # given from the first that follows on, and no more from the end on
    for at, by in ((first, part), (last, -part)):
        change = change.scatter_add(2, at[..., None].expand_as(by), by)
    return change.cumsum(2)


def wrap(page: CachePage, cfg: Config) -> CachePage:
    if page.keep is None and page.score is None:
        raise Unsupported(f"cam shares out what goes, and {page.card.title} lets nothing go")
    refuse_what_does_more(page, "cam is laid over methods that keep")
    return replace(
        page,
        keep=lambda view, below: keep(view, below, page, cfg),
        observe=lambda view, below: observe(view, below, page),
        score=None,
        always=None,
        by_place=False,
        rewrites=True,
    )


METHOD = CachePage(
    config=Config,
    wrap=wrap,
    over="h2o",
    patterns=("causal_self",),
    card=Card(
        title="CaM: Cache Merging",
        paper="CaM: Cache Merging for Memory-efficient LLMs Inference (ICML 2024)",
        year=2024,
        idea="an evicted token's value is added to those of the kept tokens after it, by a draw from its attention",
        cost="explicit weights of every step beside those of the method below, and a sum over what goes",
        state="what the method below holds, and one number for each token",
        needs=("decoder-lm",),
        lineage=("h2o",),
        caveat="every evicted token is drawn, those of a prompt too; kvpress draws of a block of evicted tokens those "
        "with the best scores, as many as tokens came, and sums attention while decoding alone. Released code evicts "
        "as StreamingLLM does, and divides one step's weight by the whole window's mean; here positions stay "
        "those of the text, so a method that moves keys cannot lie below. Values grow where much of a prompt goes at "
        "once: of 1,024 tokens a quarter kept, SmolLM2's perplexity is 100 times full attention's. A draw is a hash of "
        "layer, head and place, "
        "one sample of what the seed could give",
    ),
)
