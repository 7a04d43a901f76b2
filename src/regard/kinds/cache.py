"""Caches: which stored keys a step reads, and which stay."""

from collections.abc import Callable
from dataclasses import dataclass

from regard.core import Kind, Page
from regard.core.deprecation import renamed_fields


@renamed_fields(place="shift", attend="attention", turns="rotates")
@dataclass(frozen=True, eq=False)
class CachePage(Page):
    """A KV-cache policy. Of these four a page gives what its paper changes (see ops/view.py for View):

    score(view, cfg) -> [B, G, n]   importance of every stored token; the runner keeps the best within the budget
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
    calibrate  what is measured on the model when the page is attached without it: "induction", or ""
    phase      when `score` or `keep` evicts: after the prompt ("prefill"), or after each step ("both")
    by_place   whether `keep`, `select` and `shift` follow from places in the text alone (index, padding, positions,
               budget, window), whatever keys and layer: then layers that hold the same tokens share their answers
    reads_generated  whether a step reads, beyond its budget, what was generated since the page's last full step
    """

    budget: Callable = None  # type: ignore[assignment]
    score: Callable | None = None
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
    reads_generated: bool = False
    kind = "cache"


KIND = Kind(
    name="cache",
    page=CachePage,
    says="which stored keys a step reads, and which stay",
    verb='regard.attach(model, NAME, budget=0.25); regard.compare(methods=[NAME], out="runs")',
    room="methods/caches",
    costs=True,
    checks="regard.testing.cache:check_cache_page",
)
