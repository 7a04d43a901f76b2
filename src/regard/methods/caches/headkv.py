"""HeadKV: heads of the whole model share one budget, by how much each of them matters for finding what was said.

    b_h = sure + (r - ⌊r/β⌋) + S_h P         r = b - sure of the budget b beside the tokens that stay in any case
    P   = ⌊r/β⌋ L G                          every head of L layers of G gives its part to the pool
    S_h = I_h^T / Σ I^T                      I_h importance of head h, of those that share a cache head the mean

where few heads find in a long text what an answer needs, and they are the same whatever the text. They are measured
once for a model; those that matter little live on what all have alike. A head needs no more than the text: what is
over goes to the others, in the same proportion.

>>> parts(torch.tensor([3.0, 1.0, 0.0, 0.0]), budget=12, sure=2, text=100, beta=2.0)  # 7 of each, and 3 : 1 of 20
tensor([22, 12,  7,  7])
"""

import json
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage, allocating
from regard.ops import View
from regard.ops.shares import shares

Rows = tuple[tuple[float, ...], ...]  # of each layer the scores of its heads


@dataclass(frozen=True)
class Config:
    # of each layer the scores of its heads, query or cache heads, or a JSON file of them; None: measured when attached
    importance: Rows | str | None = None
    beta: float = 1.5  # one part in so many goes into the pool
    temperature: float = 1.0  # T, an exponent: 0 makes all heads alike, more than 1 widens what parts them

    def __post_init__(self) -> None:
        require(self.beta >= 1, "beta >= 1", beta=self.beta)
        require(self.temperature >= 0, "temperature >= 0", temperature=self.temperature)
        if isinstance(self.importance, str | Path):
            read(str(self.importance))
        elif self.importance is not None:
            rows = tuple(tuple(float(x) for x in row) for row in self.importance)
            checked(rows)
            object.__setattr__(self, "importance", rows)  # lists, as a file of settings has them


def checked(rows: Rows) -> Rows:
    even = bool(rows) and bool(rows[0]) and len({len(row) for row in rows}) == 1
    require(even, "importance has a row for each layer and a score for each of its heads", importance=rows)
    require(all(x >= 0 for row in rows for x in row), "scores of heads are not below 0", importance=rows)
    return rows


@cache
def read(path: str) -> Rows:
    """Scores of a file: a list of rows, or {"layer-head": [scores]} as head detection of the released code writes."""
    rule = "importance is a JSON file: a list of heads' scores for each layer, or {'layer-head': [scores]}"
    require(Path(path).is_file(), rule, importance=path)
    found = json.loads(Path(path).read_text())
    if isinstance(found, dict):
        means = {tuple(map(int, key.split("-"))): fmean(x) for key, x in found.items()}
        layers, heads = (1 + max(key[axis] for key in means) for axis in (0, 1))
        require(len(means) == layers * heads, rule, importance=path)
        found = [[means[layer, head] for head in range(heads)] for layer in range(layers)]
    return checked(tuple(tuple(float(x) for x in row) for row in found))


def weights(cfg: Config, layers: int, groups: int) -> Tensor:
    """[layers · groups] importance of every cache head, to the power of T."""
    rows = read(cfg.importance) if isinstance(cfg.importance, str) else cfg.importance
    rule = "importance is given, or measured when a model is attached: regard.attach(model, 'headkv')"
    require(rows is not None, rule, importance=rows)
    scores = torch.tensor(rows, dtype=torch.float64)
    fits = len(scores) == layers and scores.shape[1] % groups == 0
    require(fits, "importance is of this model's heads", importance=scores, layers=layers, heads=groups)
    return scores.unflatten(1, (groups, -1)).mean(-1).flatten() ** cfg.temperature


def parts(weights: Tensor, budget: int, sure: int, text: int, beta: float) -> Tensor:
    """[F] tokens of each of the F heads, F times the budget in all, and of none more than the text."""
    least = budget - int((budget - sure) / beta + 1e-9)
    high = torch.full_like(weights, max(0, text - least), dtype=torch.float64)
    pool = min(len(weights) * (budget - least), int(high.sum()))
    return least + shares(weights, torch.zeros_like(high), high, pool)


def allocate(view: View, score: Tensor, cfg: Config) -> Tensor:
    """[B, G] tokens of each head of this layer, in the order of the model."""
    sure = (score == torch.finfo(score.dtype).max).sum(-1).amax(-1).minimum(view.budget)
    text = view.length() if view.window is None else view.length().clamp(max=view.window)
    groups = score.shape[1]
    every = weights(cfg, view.layers, groups)
    own = slice(view.layer * groups, (view.layer + 1) * groups)
    rows = zip(view.budget.tolist(), sure.tolist(), text.expand_as(view.budget).tolist(), strict=True)
    found = [parts(every, *row, cfg.beta)[own] for row in rows]
    return torch.stack(found).to(view.budget.device)


def wrap(page: CachePage, cfg: Config) -> CachePage:
    return replace(allocating("headkv", page, partial(allocate, cfg=cfg)), calibrate="importance")


METHOD = CachePage(
    config=Config,
    wrap=wrap,
    over="snapkv",
    patterns=("causal_self",),
    test_settings=({"beta": 1.0, "temperature": 4.0},),
    card=Card(
        title="HeadKV",
        paper="Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning "
        "(arXiv:2410.19258, ICLR 2025)",
        year=2024,
        idea="heads that retrieve are given more of one budget of the whole model, by importance measured beforehand",
        cost="nothing beyond the method below; importance is measured once for a model",
        state="as many tokens as the method below over all heads of the model, in unequal parts",
        needs=("decoder-lm", "head scores"),
        lineage=("snapkv", "adakv", "retrieval_heads"),
        neutral={"temperature": 0.0},
        caveat="the paper measures importance on needles in texts, of HeadKV-R2 with a step of reasoning; its files of "
        "scores are read, and where none is given heads are measured by induction on random tokens that repeat. "
        "Released code repeats keys for query heads, each with a budget of its own; here heads that share a key have "
        "one. It rounds each part by itself and keeps a prompt whole that is no longer than the budget beside the "
        "window; here the sum is the budget. β is its default. Where only some layers slide a window, the sum is "
        "so but roughly",
    ),
)
