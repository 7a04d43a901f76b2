"""TokenSelect: all heads vote together for the tokens that this step reads.

    read {first n_init} ∪ {last n_local} ∪ top-k_j  Σ_h softmax_j(q_h · k_j)      over the tokens in between

where the softmax inside each head's vote keeps a head with large raw scores from deciding alone, and one shared
set lets whole rows be gathered. While the query stays similar, cos(q_t, q_s) ≥ reuse, the set of step s is read
again and no scores are computed (the paper's Selection Cache). A chunk of a prompt selects by its mean query.

>>> split(2688, Config())
(128, 512, 2048)
>>> split(100, Config())
(5, 19, 76)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import CachePage, Card, require
from regard.ops import View, top_slots


@dataclass(frozen=True)
class Config:
    budget: int | float | str | None = None  # init + local + k together, in their proportion; None: as given
    init: int = 128
    local: int = 512
    k: int = 2048
    reuse: float | None = 0.9  # None: select at every step
    vote: str = "soft"  # or "raw": sum the scores of the heads as they are

    def __post_init__(self) -> None:
        require(
            self.local >= 1 and self.init >= 0 and self.k >= 1,
            "init >= 0, local >= 1, k >= 1",
            local=self.local,
        )
        require(self.vote in ("soft", "raw"), 'vote is "soft" or "raw"', vote=self.vote)


def split(budget: int, cfg: Config) -> tuple[int, int, int]:
    """(init, local, k) of a budget, in the proportions of the configuration."""
    whole = cfg.init + cfg.local + cfg.k
    init, local = round(budget * cfg.init / whole), max(1, round(budget * cfg.local / whole))
    return init, local, max(0, budget - init - local)


def votes(view: View, cfg: Config) -> Tensor:
    """[B, 1, n] votes of all query heads for every stored token, from the mean query of the step."""
    asked = (
        view if view.new == 1 else replace(view, q=view.q.mean(2, keepdim=True), visible=lambda rows: None)
    )
    s = asked.scores()[:, :, 0]
    s = s.masked_fill(~view.hold(), -torch.inf) if view.real is not None else s
    return (s.softmax(-1) if cfg.vote == "soft" else s).sum(1, keepdim=True)


def similar(view: View, cfg: Config) -> bool:
    q, old = view.q[:, :, -1].flatten(1), view.memory.get("query")
    if cfg.reuse is not None and old is not None and old.shape == q.shape:
        return bool((F.cosine_similarity(q.float(), old.float()) >= cfg.reuse).all())
    return False


def select(view: View, cfg: Config) -> Tensor | None:
    n, new = view.stored, view.new
    budget = int(view.budget.max()) + new - 1
    if budget >= n or (view.phase == "prefill" and new == view.seen):
        return None
    init, local, k = split(budget - new + 1, cfg)
    local = max(local, 1) + new - 1
    if not similar(view, cfg) or "middle" not in view.memory:
        view.memory["middle"] = middle(view, cfg, init, n - local, k)
        view.memory["query"] = view.q[:, :, -1].flatten(1)
    ends = torch.cat([torch.arange(init), torch.arange(n - local, n)]).to(view.q.device)
    chosen = view.memory["middle"]
    return torch.cat([ends.expand(*chosen.shape[:2], -1), chosen], -1)


def middle(view: View, cfg: Config, start: int, stop: int, k: int) -> Tensor:
    """[B, 1, k] best-voted slots in [start, stop)."""
    return top_slots(votes(view, cfg)[..., start:stop], k) + start


METHOD = CachePage(
    config=Config,
    select=select,
    budget=lambda cfg: cfg.init + cfg.local + cfg.k,
    patterns=("causal_self",),
    card=Card(
        title="TokenSelect",
        paper="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic "
        "Token-Level KV Cache Selection",
        year=2024,
        idea="a soft vote of all heads picks one shared set of tokens per step, reused while the query hardly changes",
        cost="reads all keys to vote, then init + local + k rows; with reuse only the latter",
        state="the whole cache; memory does not shrink",
        needs=("qkv", "decoder-lm"),
        neutral={"budget": 1.0},
        caveat="a prompt fed in one piece is attended in full; fed in chunks, each later chunk selects by its mean "
        "query. Positions stay those of the text; released kernels re-number the gathered set to extrapolate, rotate "
        "only q when voting, without 1/sqrt(D), and ship with the reuse switched off",
    ),
)
