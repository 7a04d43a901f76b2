"""CurDKV: rows of keys and values that a CUR decomposition would take, by squared lengths within short windows.

    κ_j = |k_j|² / Σ_{i in window of j} |k_i|²        ν_j = |v_j|² / Σ_{i in window of j} |v_i|²
    s_j = κ_j ν_j / Σ_i κ_i ν_i                       keep s first tokens and the best s, by head, after the prompt

where windows are of w tokens of the text. A CUR decomposition rebuilds a matrix from a few of its own rows, and those
of high leverage lose least; lengths stand for leverage here. Values decide beside keys, since what attention gives is
made of values: a token that is much attended to and whose value is short changes little.

>>> x = torch.tensor([[[[2.0], [1.0], [1.0], [3.0]]]])
>>> there = torch.tensor([[[True, True, True, False]]])
>>> shares(x, torch.tensor([[[0, 0, 1, 1]]]), there)
tensor([[[0.8000, 0.2000, 1.0000, 0.0000]]])
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, at_least_float32


@dataclass(frozen=True)
class Config:
    budget: Budget | int | float | str | None = None  # None: half of the text
    by: Literal["product", "mean", "key", "value"] = "product"  # what κ and ν make together
    window: int | None = 16  # tokens that share a window; None: the whole text
    sinks: int = 4  # first tokens, which stay

    def __post_init__(self) -> None:
        known = self.by in ("product", "mean", "key", "value")
        require(known, 'by is "product", "mean", "key" or "value"', by=self.by)
        require(self.window is None or self.window >= 1, "window >= 1", window=self.window)
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)


def shares(x: Tensor, window: Tensor, there: Tensor) -> Tensor:
    """[B, G, n] part that each row of x [B, G, n, D] has in the squared lengths of its window; 0 where not `there`."""
    squared = at_least_float32(x).square().sum(-1).masked_fill(~there, 0)
    window = torch.where(there, window, 0).expand_as(squared)
    total = squared.new_zeros(*squared.shape[:2], int(window.max()) + 1).scatter_add(-1, window, squared)
    return squared / total.gather(-1, window).clamp(min=torch.finfo(squared.dtype).tiny)


def score(view: View, cfg: Config) -> Tensor:
    there, place = view.hold(), view.rank()
    window = torch.zeros_like(place) if cfg.window is None else place // cfg.window
    by_key, by_value = shares(view.k, window, there), shares(view.v, window, there)
    made = {
        "product": by_key * by_value,
        "mean": (by_key + by_value) / 2,
        "key": by_key,
        "value": by_value,
    }[cfg.by]
    made = view.by_cache_head(made)
    # of a head the sum is 1, so that heads can share a budget
    return made / made.sum(-1, keepdim=True).clamp(min=torch.finfo(made.dtype).tiny)


def always(view: View, cfg: Config) -> Tensor:
    sinks = (view.budget - 1).clamp(max=cfg.sinks)
    return (view.rank() < sinks[:, None, None]) | (view.age() < 1)


METHOD = CachePage(
    config=Config,
    score=score,
    always=always,
    phase="prefill",
    budget=lambda cfg: 0.5,
    patterns=("causal_self",),
    card=Card(
        title="CurDKV",
        paper="Value-Guided KV Compression for LLMs via Approximated CUR Decomposition (NeurIPS 2025)",
        year=2025,
        idea="squared lengths of keys and values, within short windows, choose what stays",
        cost="two norms for each stored token, after the prompt",
        state="budget tokens per head of the prompt, and all that is generated",
        needs=("decoder-lm",),
        lineage=("knorm", "leverage"),
        neutral={"budget": 1.0},
        caveat="exact: the paper projects keys and values to a few random directions first, which keeps lengths on "
        "average; released code leaves this off by default. The authors' code counts windows from the end of the "
        "prompt, kvpress from its start, as here. Without windows released code does not normalise, which changes the "
        "mean alone. The newest token stays in any case; in later turns, tokens count that are still stored",
    ),
)
