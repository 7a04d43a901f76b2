"""Caches: which stored keys a step reads, and which stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, Kind, Page, Unsupported
from regard.core.deprecation import renamed_fields
from regard.core.errors import present
from regard.ops import Kept, View, keep_best
from regard.ops.codec import Codec
from regard.ops.softmax import at_least_float32


@renamed_fields(place="shift", attend="attention", turns="rotates")
@dataclass(frozen=True, eq=False)
class CachePage(Page):
    """A KV-cache policy. Of these four a page gives what its paper changes (see ops/view.py for View):

    score(view, cfg) -> [B, G, n]   importance of every stored token; the runner keeps the best within the budget
    always(view, cfg) -> bool       beside `score`: [1|B, 1|G, n] tokens that stay before all others (None: the newest)
    keep(view, cfg) -> Kept | None  which stored tokens stay, after the step's attention (None: all)
    select(view, cfg) -> slots [B, G or H, m] | None   which stored tokens this step reads (None: all)
    observe(view, cfg) -> None      record something of a step (for example its attention weights) without changing it

    budget     cfg -> the page's own budget, where no budget is set
    shift      (view, slots, cfg) -> how far stored keys are moved on before they are read; None: as in the text
    attention  (view, cfg) -> [B, H, N, E] or None: the page's own attention, as a last resort; the padding of each
               row stands before its tokens and queries
    reference  (view, cfg) -> [1, H, n, E], beside `attention`: the same written out, for the view of one row's whole
               text without padding, all n tokens its queries; or "module:function". The battery holds `attention` to it
    rotates    whether the page uses view.rotate where the model has rotary positions, and None elsewhere
    calibrate  what is measured on the model when the page is attached without it: "induction", "importance", or ""
    phase      when `score` or `keep` evicts: after the prompt ("prefill"), or after each step ("both")
    by_place   whether `keep`, `select` and `shift` follow from places in the text alone (index, padding, positions,
               budget, window), whatever keys and layer: then layers that hold the same tokens share their answers
    allocate(view, score, cfg) -> [B, G]  beside `score`: tokens of each head where they share a budget unequally, of
               the scores [B, G, n] of all (-inf: no token, the highest: stays in any case); `view` is that of some,
               its `heads` are all of them in the order of the scores
    across     whether `allocate` is asked once for the heads of all layers, after the last of them: `view.head_layers`
               says whose they are, and `view.budget` is [B, heads]
    reread     cfg -> Rereading: the prompt is read a second time after it, on what is stored and beside it, and nothing
               goes before; `score` finds in view.notes(WORTH) what `worth` said
    worth      (view, chunk, cfg) -> [B, G, n]  of such a reading: what the stored tokens of `chunk` [B, 1|G, n] bool
               are worth to its queries; the largest of all readings counts
    due        (view, cfg) -> [B] bool: rows of which tokens may go in this step (None: all). Between, a cache grows
    codec      cfg -> Codec: how older keys and values are stored, in less memory than their numbers take
    wrap       (the page below, cfg) -> the page that acts in its place, of a page that is laid over others:
               "snapkv+adakv"; what it cannot be laid over is Unsupported
    over       the page that it is laid over where none is named
    joins      of a page whose `wrap` takes the method after it too, and its settings: what it is where none is named
    rewrites   whether what stays is changed: `keep` answers with other keys or values (Kept.rewritten)
    reads_output  whether the page reads view.output, the model's output projection by head
    reads_generated  whether a step reads, beyond its budget, what was generated since the page's last full step
    """

    budget: Callable = None  # type: ignore[assignment]
    score: Callable | None = None
    always: Callable | None = None
    keep: Callable | None = None
    select: Callable | None = None
    observe: Callable | None = None
    shift: Callable | None = None
    attention: Callable | None = None
    reference: Callable | str | None = None
    rotates: bool = False
    calibrate: str = ""
    phase: str = "both"
    by_place: bool = False
    allocate: Callable | None = None
    across: bool = False
    reread: Callable | None = None
    worth: Callable | None = None
    due: Callable | None = None
    codec: Callable | None = None
    wrap: Callable | None = None
    over: str = ""
    joins: str = ""
    reads_output: bool = False
    rewrites: bool = False
    reads_generated: bool = False
    kind = "cache"


def decide(page: CachePage, views: Sequence[View], cfg: Any) -> list[Kept | None]:
    """What a page lets stay of each view, one for heads that hold equally many tokens: what its `keep` says, or the
    best by its score within the budget, which `allocate` may share unequally. None: all.
    """
    due = [view for view in (on_time(page, view, cfg) for view in views) if view is not None]
    if not due:  # rows are due in all views or in none
        return [None] * len(views)
    if page.keep is not None:
        return [page.keep(view, cfg) for view in due]
    if page.score is None or (page.allocate is None and not any(view.over() for view in due)):
        return [None] * len(views)
    return share(page, rank(page, due, cfg), cfg)


def on_time(page: CachePage, view: View, cfg: Any) -> View | None:
    """The view, of which rows that are not due may keep all; None: no row is due."""
    if page.due is None:
        return view
    now = page.due(view, cfg)
    return replace(view, budget=torch.where(now, view.budget, view.seen)) if bool(now.any()) else None


@dataclass(frozen=True)
class Ranked:
    """What a page says of one view before anything goes: the scores, and what stays before all others."""

    view: View
    score: Tensor  # [1|B, 1|G, n]
    always: Tensor  # [1|B, 1|G, n] bool

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of each cache head."""
        return [(self.view.layer, head) for head in self.view.heads or range(self.view.groups)]

    def marked(self) -> Tensor:
        """[B, G, n] scores: the highest for what stays anyhow, -inf where no token is."""
        view, score = self.view, at_least_float32(self.score)
        score = score.expand(len(view.budget), view.groups, -1)
        score = torch.where(self.always, torch.finfo(score.dtype).max, score)
        return score.masked_fill(~view.hold(), -torch.inf)


def rank(page: CachePage, views: Sequence[View], cfg: Any) -> list[Ranked]:
    """What a page says of the heads of a layer. One that compares or adds up heads finds all in `View.beside`."""
    score = present(page.score, "a page that ranks tokens has a score")
    for view in views:
        view.beside = tuple(views)
    ranked = [Ranked(view, score(view, cfg), stays(page, view, cfg)) for view in views]
    for view in views:  # what hold each other hold their keys
        view.beside = ()
    return ranked


def share(page: CachePage, ranked: Sequence[Ranked], cfg: Any) -> list[Kept | None]:
    """What stays of each view, by scores within the budget, which `allocate` may share unequally among all heads."""
    if page.allocate is None:
        return [keep_best(r.view, r.score, r.always) for r in ranked]
    heads = [head for r in ranked for head in r.heads]
    # in the order of the model: of equal scores the first head wins, whatever groups the rows of a batch have made
    order = sorted(range(len(heads)), key=lambda i: heads[i])
    every = replace(ranked[0].view, heads=tuple(heads[i][1] for i in order))
    if page.across:
        every.head_layers = tuple(heads[i][0] for i in order)
        every.budget = torch.stack([r.view.budget for r in ranked for _ in r.heads], 1)[:, order]
    most = max(r.view.stored for r in ranked)
    marked = torch.cat([F.pad(r.marked(), (0, most - r.view.stored), value=-torch.inf) for r in ranked], 1)
    budgets = page.allocate(every, marked[:, order], cfg)[:, torch.tensor(order).argsort()]
    parts = budgets.split([r.view.groups for r in ranked], 1)
    return [keep_best(r.view, r.score, r.always, own) for r, own in zip(ranked, parts, strict=True)]


def stays(page: CachePage, view: View, cfg: Any) -> Tensor:
    """[1|B, 1|G, n] bool: the tokens that stay before all others, whatever their score."""
    return view.age() < 1 if page.always is None else page.always(view, cfg)


def family(page: CachePage) -> str:
    """What a page does to the cache, in a few words."""
    if page.attention is not None:
        return "an attention of their own"
    evicts = page.keep is not None or page.score is not None
    if page.codec is not None:
        return "fewer bytes for a token" if not evicts else "fewer tokens, in fewer bytes"
    if page.select is not None:
        return "all tokens held, a part read"
    return "tokens go after prompts" if page.phase == "prefill" else "tokens go at every step"


def refuse_what_does_more(page: CachePage, says: str) -> None:
    """Raise for a page that does more than keep and select: `says` is what the method over it wants, in words."""
    refused = [
        name for name in ("attention", "shift", "allocate", "codec") if getattr(page, name) is not None
    ]
    if refused:
        raise Unsupported(f"{says}; {page.card.title} has {refused[0]}")


def allocating(name: str, page: CachePage, allocate: Callable, across: bool = False) -> CachePage:
    """A page of scores with budgets by head: allocate(view, score) -> [B, G] tokens, of scores [B, G, n]."""
    if page.score is None:
        raise Unsupported(f"{name} shares a budget by scores, and {page.card.title} has none")
    if page.allocate is not None:
        raise Unsupported(
            f"{name} shares the budget of {page.card.title}, which another method shares already"
        )
    return replace(page, allocate=lambda view, score, below: allocate(view, score), across=across)


def storing(
    name: str, page: CachePage, codec: Callable[[], Codec], observe: Callable[[View], None] | None = None
) -> CachePage:
    """A page whose older tokens are stored packed, whatever it chooses; `observe` sees every step beside the page."""
    if page.codec is not None:
        raise Unsupported(f"{name} stores tokens packed, and {page.card.title} does so already")
    if page.shift is not None:
        raise Unsupported(
            f"{name} stores keys packed, and {page.card.title} moves stored keys to other positions"
        )
    below_sees = page.observe

    def both(view: View, below: Any) -> None:
        if below_sees is not None:
            below_sees(view, below)
        if observe is not None:
            observe(view)

    return replace(page, codec=lambda below: codec(), observe=page.observe if observe is None else both)


@dataclass(frozen=True)
class Whole:
    """No settings."""


# what is laid over no other page lies over a cache that keeps and reads everything
WHOLE = CachePage(
    config=Whole,
    budget=lambda cfg: 1.0,
    patterns=("causal_self",),
    card=Card(
        title="full cache",
        paper="",
        year=0,
        idea="every token is kept and read",
        cost="none",
        state="all keys and values",
        needs=("decoder-lm",),
    ),
)


KIND = Kind(
    name="cache",
    page=CachePage,
    says="which stored keys a step reads, and which stay",
    verb='regard.attach(model, NAME, budget=0.25); regard.compare(methods=[NAME], out="runs")',
    room="methods/caches",
    costs=True,
    checks="regard.testing.cache:check_cache_page",
)
