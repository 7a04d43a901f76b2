"""Compactor: what stands out from all other keys and what its neighbourhood reads, weighed together.

    l_j = x̄_jᵀ (X̄ᵀX̄ + ε I)⁻¹ x̄_j        leverage of keys before rotary positions, X̄ [n, D] less their mean
    a_j = mean over j-1, j, j+1 of  A_j |v_j|₂        A_j: attention that j receives in its chunk, seen both ways
    s_j = λ z(l)_j + z(a)_j                           keep the best s, by head, after the prompt

where z takes off the mean and divides by the deviation, over all tokens and heads of a layer. Leverage keeps what
nothing else could stand for, attention what is read often; neither needs a question. The first and last tokens of the
text stay and are no part of either score.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32
from regard.ops.leverage import leverage, moments, seen_both_ways, standardised


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text
    blend: float = 0.5  # λ
    chunk: int = 256  # tokens that attend to each other
    first: int = 8  # tokens that stay at the start of the text
    last: int = 4  # and at its end
    ridge: float = 0.01  # ε

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)
        require(self.first >= 0 and self.last >= 0, "first, last >= 0", first=self.first, last=self.last)
        require(
            self.ridge > 0 and self.blend >= 0, "ridge > 0, blend >= 0", ridge=self.ridge, blend=self.blend
        )


def observe(view: View, cfg: Config) -> None:
    """Queries are gone after their step, so what a prompt's tokens are worth is noted then."""
    if view.phase == "prefill":
        view.notes("worth").add_(seen_both_ways(view, cfg.chunk, cfg.first, cfg.last))


def weighed(view: View, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """(leverage, attention) [B, G, n] and which tokens they are of: those between the first and the last.

    A token whose worth was never noted, generated or at the end of a prompt, has A = 1.
    """
    between = view.hold() & (view.rank() >= cfg.first) & (view.age() >= cfg.last)
    noted = view.notes("worth")
    alone = view.by_cache_head(at_least_float32(view.v).norm(dim=-1))
    outlying = view.by_cache_head(leverage(view.unrotated_keys(), between, cfg.ridge))
    return outlying, torch.where(noted > 0, noted, alone), between


def score(view: View, cfg: Config) -> Tensor:
    """[B, G, n], in deviations of all heads of the layer."""
    outlying, worth, between = own = weighed(view, cfg)
    every = [own if other is view else weighed(other, cfg) for other in view.beside or (view,)]
    of_outlying, of_worth = (moments([(part[i], part[2]) for part in every]) for i in (0, 1))
    return cfg.blend * standardised(outlying, between, *of_outlying) + standardised(worth, between, *of_worth)


def always(view: View, cfg: Config) -> Tensor:
    """The first and the last tokens; of these the last, where the budget has no room for all."""
    last = view.budget.clamp(max=max(1, cfg.last))
    first = (view.budget - last).clamp(max=cfg.first)
    return (view.rank() < first[:, None, None]) | (view.age() < last[:, None, None])


METHOD = CachePage(
    config=Config,
    observe=observe,
    score=score,
    always=always,
    phase="prefill",
    rotates=True,
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    test_settings=({"budget": 8, "first": 1, "last": 2, "chunk": 5},),
    card=Card(
        title="Compactor",
        paper="Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
        year=2025,
        idea="outlying keys and tokens that are read within their chunk, both ways, share one budget",
        cost="N · chunk scores for each query head, and the leverage of n keys of D channels, after the prompt",
        state="budget tokens per head of the prompt and all that is generated, with one number each",
        needs=("decoder-lm",),
        lineage=("leverage", "non_causal_attention"),
        neutral={"budget": 1.0},
        caveat="leverage is exact where released code sketches 48 channels at random. λ is that of the authors' engine "
        "compactor-vllm, the rest that of their kvpress, where λ is the share of tokens that go; at the ends a "
        "missing neighbour is 0 in kvpress, and not counted here; compactor-vllm keeps "
        "16 first and 64 last tokens and leaves |v| and neighbours out. Calibration, which finds the budget of a "
        "context, is left out",
    ),
)
