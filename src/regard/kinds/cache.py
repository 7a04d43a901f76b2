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
    if page.due is not None:
        now = page.due(views[0], cfg)
        if not bool(now.any()):
            return [None] * len(views)
        views = [replace(view, budget=torch.where(now, view.budget, view.seen)) for view in views]
    if page.keep is not None:
        return [page.keep(view, cfg) for view in views]
    if page.score is None or (page.allocate is None and not any(view.over() for view in views)):
        return [None] * len(views)
    scores, always = scored(page, views, cfg), [stays(page, v, cfg) for v in views]
    if page.allocate is None:
        return [keep_best(*each) for each in zip(views, scores, always, strict=True)]
    # in the order of the model: of equal scores the first head wins, whatever groups the rows of a batch have made
    heads = torch.tensor([head for view in views for head in view.heads or range(view.groups)])
    order = heads.argsort()
    every = replace(views[0], heads=tuple(heads[order].tolist()))
    budgets = page.allocate(every, ranked(views, scores, always)[:, order], cfg)[:, order.argsort()]
    parts = budgets.split([v.groups for v in views], 1)
    return [keep_best(*each) for each in zip(views, scores, always, parts, strict=True)]


def scored(page: CachePage, views: Sequence[View], cfg: Any) -> list[Tensor]:
    """The scores of each view. A page that compares or adds up heads finds all of them in `View.beside`."""
    for view in views:
        view.beside = tuple(views)
    scores = [present(page.score, "a page with scores")(view, cfg) for view in views]
    for view in views:  # what hold each other hold their keys
        view.beside = ()
    return scores


def ranked(views: Sequence[View], scores: Sequence[Tensor], always: Sequence[Tensor]) -> Tensor:
    """[B, G, n] scores of all heads, group after group: the highest for what stays anyhow, -inf where nothing is."""
    most, parts = max(v.stored for v in views), []
    for view, score, stay in zip(views, scores, always, strict=True):
        score = at_least_float32(score).expand(len(view.q), view.groups, -1)
        score = torch.where(stay, torch.finfo(score.dtype).max, score).masked_fill(~view.hold(), -torch.inf)
        parts.append(F.pad(score, (0, most - view.stored), value=-torch.inf))
    return torch.cat(parts, 1)


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


def allocating(name: str, page: CachePage, allocate: Callable) -> CachePage:
    """A page of scores with budgets by head: allocate(view, score) -> [B, G] tokens, of scores [B, G, n]."""
    if page.score is None:
        raise Unsupported(f"{name} shares a budget by scores, and {page.card.title} has none")
    if page.allocate is not None:
        raise Unsupported(
            f"{name} shares the budget of {page.card.title}, which another method shares already"
        )
    return replace(page, allocate=lambda view, score, below: allocate(view, score))


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
