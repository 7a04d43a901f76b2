"""Two methods on one cache: the first for prompts, the second for what is generated.

    after a prompt           the first chooses what stays, or what is read
    after a generated token  the second does

where a prompt can be judged at its end by its last queries, and a long answer needs a rule for every step: what one of
them is good at, the other need not do. `snapkv+then+h2o` compresses the prompt once and holds the budget from there on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from regard.core import Card
from regard.kinds.cache import CachePage, decide, refuse_what_does_more
from regard.ops import Kept, View


@dataclass(frozen=True)
class Config:
    """No settings of its own: those of the two methods."""


def follow(page: CachePage, cfg: Config, other: CachePage, own: Any) -> CachePage:
    """`page` in forwards of several tokens, `other` in those of one."""
    for one in (page, other):
        refuse_what_does_more(one, "then joins methods that keep and select")

    def of(view: View, below: Any) -> tuple[CachePage, Any]:
        return (page, below) if view.phase == "prefill" else (other, own)

    def keep(view: View, below: Any) -> Kept | None:
        acting, cfg = of(view, below)
        return decide(acting, [view], cfg)[0]

    def select(view: View, below: Any) -> Any:
        acting, cfg = of(view, below)
        return None if acting.select is None else acting.select(view, cfg)

    def observe(view: View, below: Any) -> None:
        for one, cfg in ((page, below), (other, own)):
            if one.observe is not None:
                one.observe(view, cfg)

    def where(name: str, function: Callable) -> Callable | None:
        return function if getattr(page, name) or getattr(other, name) else None

    evicts = page.keep or page.score or other.keep or other.score
    return replace(
        page,
        keep=keep if evicts else None,
        score=None,
        always=None,
        select=where("select", select),
        observe=where("observe", observe),
        phase="both",
        by_place=False,
        rotates=page.rotates or other.rotates,
        reads_output=page.reads_output or other.reads_output,
        rewrites=page.rewrites or other.rewrites,
    )


METHOD = CachePage(
    config=Config,
    wrap=follow,
    over="snapkv",
    joins="h2o",
    patterns=("causal_self",),
    card=Card(
        title="then",
        paper="none: two methods joined",
        year=2024,
        idea="one method for prompts, another for what is generated",
        cost="that of the two",
        state="the budget, after prompts and after every step",
        needs=("decoder-lm",),
        lineage=("snapkv", "h2o"),
        caveat="both have one budget, that of the first. What the second sums up it sums up in prompts too",
    ),
)
