"""Key rerotation: after an eviction the kept keys are turned to consecutive positions, so that no gaps are left.

    i_0 < i_1 < ... < i_{m-1}            the places of the tokens that a head keeps
    k_{i_c} = R(s + c - p_{i_c}) k_{i_c}        to position s + c, s that of the first token; values stay as they are

where R turns a key on by so many positions, and p_i is where the key of token i stands before: its position in the
text, or where an earlier eviction put it. A model then reads its cache as a shorter text without holes. Queries, and
tokens that come later, stay at their positions in the text, so one gap is left: between what was kept and what follows.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, Unsupported
from regard.kinds.cache import CachePage, decide, refuse_what_does_more
from regard.ops import Kept, View
from regard.ops.rewriting import standing, staying


@dataclass(frozen=True)
class Config:
    """No settings of its own: those of the method below."""


def keep(view: View, below: Any, page: CachePage) -> Kept | None:
    kept = decide(page, [in_text(view) if page.rotates else view], below)[0]
    if kept is None:
        return None
    if kept.merged is not None:
        raise Unsupported(f"key_rerotation turns kept keys, and {page.card.title} merges some of them")
    by = further(view, staying(view, kept))
    slots = kept.slots.expand(*by.shape[:2], -1)
    turn = by.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0)
    if not bool((turn != 0).any()):
        return kept
    if view.rotate is None:
        raise Unsupported(
            f"key_rerotation over {page.card.title} turns keys, and this layer shows no position"
        )
    k, v = standing(view, kept)
    view.notes("moved").add_(by)
    return Kept(kept.slots, rewritten=(view.rotate(k, turn), v))


def further(view: View, stays: Tensor) -> Tensor:
    """[B, G, n] how far each key is turned: to its place among those that stay, where its head lets a token go."""
    order = view.rank().masked_fill(~view.hold(), view.seen).expand_as(stays).argsort(-1)
    nth = stays.gather(-1, order).cumsum(-1) - 1
    place = torch.zeros_like(nth).scatter(-1, order, nth)
    first = view.position_at(torch.zeros_like(view.length()[:, None]))[..., None]
    now = view.position() + view.notes("moved").long()
    evicts = stays.sum(-1, keepdim=True) < view.hold().sum(-1, keepdim=True)
    return torch.where(stays & evicts, first + place - now, 0)


def in_text(view: View) -> View:
    """The view for a method that turns keys itself: they stand where the text has them."""
    moved = view.notes("moved").long()
    if view.rotate is None or not bool((moved != 0).any()):
        return view
    return replace(view, k=view.rotate(view.k, -moved), cached_scores=None)


def wrap(page: CachePage, cfg: Config) -> CachePage:
    if page.keep is None and page.score is None:
        raise Unsupported(f"key_rerotation turns what is kept, and {page.card.title} lets nothing go")
    refuse_what_does_more(page, "key_rerotation is laid over methods that keep")
    return replace(
        page,
        keep=lambda view, below: keep(view, below, page),
        # nothing moves when it is read, but a model whose keys cannot be turned is refused
        shift=lambda view, slots, below: None,
        score=None,
        always=None,
        by_place=False,
        rotates=True,
        rewrites=True,
    )


METHOD = CachePage(
    config=Config,
    wrap=wrap,
    over="snapkv",
    patterns=("causal_self",),
    card=Card(
        title="Key rerotation",
        paper="KeyRerotationPress of NVIDIA/kvpress",
        year=2024,
        idea="kept keys are turned to consecutive positions after each eviction, so that the cache has no gaps",
        cost="that of the method below, and one rotation of what is kept",
        state="what the method below holds, and one number for each token",
        needs=("decoder-lm",),
        lineage=("snapkv", "finch"),
        caveat="a second prompt is moved together with what is left of the first; kvpress compresses once, after the "
        "first. Under a method that evicts at every step keys are turned at every step, and in a low precision each "
        "turn rounds them once. Sliding layers drop their oldest tokens without a turn. Models that rotate no keys, or "
        "by frequencies that change with the length, are refused",
    ),
)
