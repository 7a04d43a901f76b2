"""LagKV: tokens that look unlike what follows them stay; each part of the text is judged by the next.

    parts of L tokens after the first S:  K^p, V^p          p = 0, 1, …
    k̄_j = (k_j - min K^{p+1}) / (max K^{p+1} - min K^{p+1})     by channel, over the tokens of the next part
    s_j = softmax_j( std k̄_j ) + softmax_j( std v̄_j )           std over channels, softmax over part p

where neighbours in a text have similar keys and values, so the range of the next part tells what is common. Of each
part an equal share stays, its best s. The first S tokens stay, and so does what has no whole part behind it. A part is
judged once, as soon as the next one is complete, while generating too.

>>> unjudged(torch.tensor([10, 271, 272, 500]), Config())
tensor([  1, 255, 128, 228])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32, gather_rows
from regard.ops.texts import at_places, slots_by_place


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # of the whole text; None: half of it
    sinks: int = 16  # S, first tokens, which stay
    lag: int = 128  # tokens of a part

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)
        require(self.lag >= 2, "lag >= 2", lag=self.lag)


def unjudged(length: Tensor, cfg: Config) -> Tensor:
    """[1|B] newest tokens that have no whole part behind theirs."""
    judged = ((length - cfg.sinks) // cfg.lag - 1).clamp(min=0) * cfg.lag
    return (length - cfg.sinks - judged).clamp(min=1)


def spread(parts: Tensor, there: Tensor) -> Tensor:
    """[B, G, P - 1, L]: softmax over a part of the deviation of its tokens, in the range of the next part.

    parts [B, G, P, L, D], there [b, g, P, L]. Old tokens go first, so what is left of a part that is yet to be judged
    has the whole next part behind it.
    """
    part, following = parts[:, :, :-1], parts[:, :, 1:]
    low, high = following.amin(3, keepdim=True), following.amax(3, keepdim=True)
    inside = (part - low) / (high - low).clamp(min=1e-6)
    return inside.std(-1).masked_fill(~there[:, :, :-1], -torch.inf).softmax(-1)


def shares(view: View, cfg: Config) -> Tensor:
    """[B, G, n] in (0, 1]: 1 for the best token of its part, 1/L less for each that follows."""
    count = (int(view.length().max()) - cfg.sinks) // cfg.lag
    place, hold = view.rank() - cfg.sinks, view.hold()
    slots = slots_by_place(place, hold, count * cfg.lag)
    there = (slots >= 0).unflatten(-1, (count, cfg.lag))
    keys, values = (
        spread(gather_rows(at_least_float32(x), slots).unflatten(2, (count, cfg.lag)), there)
        for x in (view.k, view.v)
    )
    order = (
        view.by_cache_head(keys + values)
        .masked_fill(~there[:, :, :-1], -torch.inf)
        .argsort(dim=-1, descending=True, stable=True)
    )
    share = 1 - order.argsort(dim=-1) / cfg.lag
    return at_places(share.flatten(2), place, hold)


def score(view: View, cfg: Config) -> Tensor:
    noted, age = view.notes("share"), view.age()
    due = view.hold() & (view.rank() >= cfg.sinks) & (age >= unjudged(view.length(), cfg)[:, None, None])
    due = due & (noted == 0)
    if bool(due.any()):
        noted.copy_(torch.where(due, shares(view, cfg), noted))
    return noted


def always(view: View, cfg: Config) -> Tensor:
    """The first tokens and those that are not judged yet; of these the newest, where the budget has no more room."""
    sinks = (view.budget - 1).clamp(max=cfg.sinks)
    newest = torch.minimum(unjudged(view.length(), cfg), view.budget - sinks)
    return (view.rank() < sinks[:, None, None]) | (view.age() < newest[:, None, None])


METHOD = CachePage(
    config=Config,
    score=score,
    always=always,
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "sinks": 1, "lag": 3},),
    card=Card(
        title="LagKV",
        paper="LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
        year=2025,
        idea="the range of the next 128 keys and values shows which of the 128 before them are out of the ordinary",
        cost="minima, maxima and deviations of the keys and values of a part, once",
        state="budget tokens per head, and one number each",
        needs=("decoder-lm",),
        lineage=("streaming_llm",),
        neutral={"budget": 1.0},
        caveat="the paper sets the share of each part, and first and last tokens come on top; here the budget is of "
        "the whole, and the parts share what those leave. Under a fixed number of tokens old parts shrink again, by "
        "the order they once had. kvpress keeps 4 first tokens and evicts after the prompt alone; of tokens "
        "of equal rank in their parts any may stay there, here the earlier",
    ),
)
