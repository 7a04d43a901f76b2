"""Circuit reuse: do the heads that do one task do the other, and by how much more than chance would have it?

    overlap(k) = |top_k(a) ∩ top_k(b)| / k          a, b: scores of all n heads on two tasks,  k = 1, ..., n
    chance(k)  = E[overlap(k)],  p(k) = P(overlap as large or larger)      over permutations of the heads of b

A circuit is a set of heads, and how large it is taken to be is a choice: the curve over all cutoffs is the answer, one
number is not. A permutation of all heads leaves |top ∩ top| hypergeometric, with the mean k/n. Heads that matter lie
in late layers whatever the task, which alone makes sets overlap: with `within="layer"` heads are permuted among those
of their layer, and the number is a sum of hypergeometric ones. Both are exact, nothing is drawn. Scores are those of
path patching (regard.explaining.path_patch) or any other; of equal scores those of `a` count from the first head and
those of `b` from the last, so that heads with nothing to tell do not overlap by their number. In the
paper about 78 % of the heads in the circuits of two tasks are the same, in a larger GPT-2.

>>> import torch
>>> a, b = torch.tensor([[9.0, 8.0], [1.0, 0.0]]), torch.tensor([[7.0, 0.0], [6.0, 1.0]])
>>> reuse = measure(a, b)
>>> [round(x, 4) for x in reuse.overlap.tolist()]  # the first; of {0, 1} and {0, 2} one; of {0, 1, 2}, {0, 2, 3} two
[1.0, 0.5, 0.6667, 1.0]
>>> [round(x, 4) for x in reuse.p.tolist()]  # two of four: 1 - 1 / 6 for one or more
[0.25, 0.8333, 1.0, 1.0]
>>> [round(x, 4) for x in measure(a, b, Config(within="layer")).p.tolist()]
[0.5, 1.0, 1.0, 1.0]
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import comb
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tracing import TracingPage

NULLS = ("model", "layer")


@dataclass(frozen=True)
class Config:
    within: Literal["model", "layer"] = "model"  # among which heads a permutation moves a head

    def __post_init__(self) -> None:
        require(self.within in NULLS, f"within is one of {NULLS}", within=self.within)


@dataclass(frozen=True)
class Reuse:
    """The share of heads that two top sets of k heads have in common, its mean by chance, and p; [n], k from 1."""

    overlap: Tensor
    chance: Tensor
    p: Tensor

    def at(self, share: float) -> dict[str, float]:
        """The numbers of the top share of the heads, rounded to a number of heads and at least one."""
        require(0 < share <= 1, "0 < share <= 1", share=share)
        k = max(1, round(share * len(self.overlap)))
        found = {"overlap": self.overlap, "chance": self.chance, "p": self.p}
        return {"heads": k, **{name: x[k - 1].item() for name, x in found.items()}}


def ranked(scores: Tensor, last: bool = False) -> Tensor:
    """[n] numbers of the heads, the highest score first, equal ones from the first head on, or from the last."""
    flat = scores.flatten()
    if last:
        return len(flat) - 1 - flat.flip(0).argsort(descending=True, stable=True)
    return flat.argsort(descending=True, stable=True)


def taken(order: Tensor, layers: int) -> Tensor:
    """[n, layers, heads] whether a head is among the first k."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return (place < torch.arange(1, len(order) + 1)[:, None]).view(len(order), layers, -1)


def log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of n over k, -inf where there is no such choice."""
    inside = (k >= 0) & (k <= n)
    k = k.clamp(min=0).minimum(n)
    found = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return found.masked_fill(~inside, -torch.inf)


def hypergeometric(size: int, first: Tensor, second: Tensor) -> Tensor:
    """[..., size + 1] the distribution of how many of `second` drawn from `size` are among `first` marked ones."""
    x = torch.arange(size + 1, dtype=torch.float64)
    a, b, n = (t.double()[..., None] for t in (first, second, torch.full_like(first, size)))
    return (log_choose(a, x) + log_choose(n - a, b - x) - log_choose(n, b)).exp()


def convolved(each: Tensor) -> Tensor:
    """[n, sum] the distribution of a sum of independent numbers, of their distributions [n, layers, heads + 1]."""
    total = each[:, 0]
    for one in each[:, 1:].unbind(1):
        grown = total.new_zeros(len(total), total.shape[1] + one.shape[1] - 1)
        for i, weight in enumerate(one.unbind(1)):
            grown[:, i : i + total.shape[1]] += weight[:, None] * total
        total = grown
    return total


def measure(a: Tensor, b: Tensor, cfg: Config = Config()) -> Reuse:
    """Overlap, chance and p at every cutoff, of scores a, b [layers, heads] of two tasks."""
    rule = "two tasks have a score for each of the same heads [layers, heads]"
    require(a.dim() == 2 and a.shape == b.shape and a.numel() > 0, rule, a=tuple(a.shape), b=tuple(b.shape))
    require(not bool(a.isnan().any() | b.isnan().any()), "every head has a score", a=a, b=b)
    top = [taken(ranked(a), len(a)), taken(ranked(b, last=True), len(b))]
    common = (top[0] & top[1]).sum((1, 2))  # [n]
    groups = [
        t.sum(-1) if cfg.within == "layer" else t.sum((1, 2))[:, None] for t in top
    ]  # [n, layers] or [n, 1]
    null = convolved(hypergeometric(a.numel() // groups[0].shape[1], *groups))
    number = torch.arange(null.shape[1])
    k = torch.arange(1, a.numel() + 1, dtype=torch.float64)
    tail = (null * (number >= common[:, None])).sum(1).clamp(max=1)
    return Reuse(common / k, (null * number).sum(1) / k, tail)


def reference(a: Tensor, b: Tensor, cfg: Config = Config()) -> Reuse:
    """By the definition: sets of heads; every way to choose as many heads of b's, layer by layer or of all, counted."""
    heads = [(i, j) for i in range(a.shape[0]) for j in range(a.shape[1])]
    first = sorted(heads, key=lambda h: (-a[h].item(), h))
    second = sorted(heads, key=lambda h: (-b[h].item(), -h[0], -h[1]))
    rows = []
    for k in range(1, len(heads) + 1):
        one, two = set(first[:k]), set(second[:k])
        pools = [[h for h in heads if h[0] == i] for i in range(len(a))] if cfg.within == "layer" else [heads]
        ways: dict[int, int] = {}
        for hits in product(*(range(len(pool) + 1) for pool in pools)):
            count = 1
            for pool, x in zip(pools, hits, strict=True):
                marked, drawn = len(one & set(pool)), len(two & set(pool))
                count *= comb(marked, x) * comb(len(pool) - marked, drawn - x) if drawn >= x else 0
            ways[sum(hits)] = ways.get(sum(hits), 0) + count
        total, common = sum(ways.values()), len(one & two)
        mean = Fraction(sum(x * n for x, n in ways.items()), total * k)
        rows.append((common / k, float(mean), sum(n for x, n in ways.items() if x >= common) / total))
    return Reuse(*torch.tensor(rows, dtype=torch.float64).T)


def cases(seed: int) -> Iterable[tuple]:
    """Scores alike and unlike, with ties and without, one head, one layer, both kinds of permutation."""
    g = torch.Generator().manual_seed(seed)
    for layers, heads in ((1, 1), (1, 7), (3, 4), (4, 3)):
        a, noise = (torch.randn(layers, heads, generator=g, dtype=torch.float64) for _ in range(2))
        for b in (noise, a + 0.5 * noise):
            for within in NULLS:
                yield a, b, Config(within)
    a, b = (torch.randint(3, (3, 3), generator=g).double() for _ in range(2))  # many equal scores
    yield from ((a, b, Config(within)) for within in NULLS)
    yield torch.zeros(2, 3), torch.zeros(2, 3), Config()


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    patterns=("causal_self",),
    card=Card(
        title="Circuit component reuse",
        paper="Circuit Component Reuse Across Tasks in Transformer Language Models",
        year=2024,
        idea="the heads that path patching finds for two tasks are compared at every cutoff, beside what chance gives",
        cost="none beside the scores: path patching runs the model twice for each head",
        needs=("decoder-lm",),
        lineage=("path patching", "indirect object identification"),
        caveat="the paper gives the overlap of two circuits of one size, here the curve over all sizes with exact "
        "permutation means and p-values. Released code freezes heads at the patched position only and leaves MLPs "
        "free, so effects through MLPs count; `regard.explaining.path_patch` freezes all positions, and MLPs or not "
        "(`mlps`). Its repair of one circuit by the attention of four heads is not in the code, and not here",
    ),
)
