"""G-Search: the fewest visual tokens after each layer that keep a model's performance, found from shallow to deep.

    after layer l there stay the k_l of highest attention  a_i = mean over heads and query rows of A_l[h, t, i]
    k_l = min { k <= k_{l-1} : performance(k_0, .., k_{l-1}, k, k, ..) >= performance(all) - tolerance }   by bisection
    ρ_l = 1 / (1 + exp(β x_l - c)),  x_l = (l + 1) / L,  c such that mean_l ρ_l is the budget              P-Sigmoid

Rankings of visual tokens hardly differ between layers, so the essential ones are taken to become fewer with depth: the
first k that passes with k in all later layers too is what layer l needs, and the schedule found is the smallest. Where
a budget is given instead, shares fall with depth along a sigmoid, whose steepness β is the best of those tried.

>>> def passes(kept):  # the layers need 3, 4 and 1 tokens
...     return all(k >= need for k, need in zip(kept, (3, 4, 1)))
>>> search(passes, layers=3, tokens=8)  # 4 at once: what is dropped does not come back
(4, 4, 1)
>>> [round(share, 4) for share in sigmoid(2, 2 * math.log(3), 0.5)]  # exp(c) = 3^1.5: 1 / (1 + 3^-0.5), 1 / (1 + 3^0.5)
[0.634, 0.366]
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops import at_least_float32
from regard.ops.images import LayerView, highest

ROWS = ("last", "question")
STEEP = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0)
Performance = Callable[[tuple], float]


@dataclass(frozen=True)
class Config:
    kept: tuple[
        float | int, ...
    ] = ()  # visual tokens after each layer, shares or numbers; () all, (k,) k after all
    rows: str = "last"  # queries whose attention ranks

    def __post_init__(self) -> None:
        require(self.rows in ROWS, f"rows is one of {ROWS}", rows=self.rows)
        kinds = {type(k) for k in self.kept}
        require(kinds in (set(), {int}, {float}), "shares (floats) or numbers (ints) alone", kept=self.kept)
        falls = all(a >= b for a, b in zip(self.kept, self.kept[1:]))
        require(falls and all(k >= 0 for k in self.kept), "kept falls, to 0 at most", kept=self.kept)
        require(kinds != {float} or self.kept[0] <= 1, "shares <= 1", kept=self.kept)


def count_at(layer: int, tokens: int, cfg: Config) -> int:
    """Visual tokens of so many that stay after a layer; beyond the schedule its last entry holds."""
    if not cfg.kept:
        return tokens
    k = cfg.kept[min(layer, len(cfg.kept) - 1)]
    return math.ceil(k * tokens - 1e-9) if isinstance(k, float) else min(k, tokens)


def staying(weights: Tensor, count: int) -> Tensor:
    """[count] of the tokens that weights [H, R, n] rank highest, ascending."""
    return highest(at_least_float32(weights).mean((0, 1)), count)


def search(performance: Performance, layers: int, tokens: int, tolerance: float = 0.0) -> tuple[int, ...]:
    """The schedule, for the layers that others follow: `performance` is asked log2(tokens) times for each."""
    least, found, high = performance((tokens,) * layers) - tolerance, [], tokens
    for layer in range(layers):
        low = 0
        # high has passed in this and all later layers
        while low < high:
            middle = (low + high) // 2
            if performance((*found, *(layers - layer) * (middle,))) >= least:
                high = middle
            else:
                low = middle + 1
        found.append(high)
    return tuple(found)


def sigmoid(layers: int, steepness: float, budget: float) -> tuple[float, ...]:
    """Shares ρ after each layer, whose mean is the budget."""
    require(0 < budget < 1, "0 < budget < 1", budget=budget)
    require(steepness >= 0, "steepness >= 0", steepness=steepness)
    x = torch.arange(1, layers + 1, dtype=torch.float64) / layers
    level = math.log(budget / (1 - budget))  # c of a constant share; it lies β x above that
    low, high = level, level + steepness
    for _ in range(80):
        c = (low + high) / 2
        low, high = (c, high) if (c - steepness * x).sigmoid().mean() < budget else (low, c)
    return tuple((high - steepness * x).sigmoid().tolist())


def sigmoid_search(
    performance: Performance, layers: int, budget: float, steepnesses: Sequence[float] = STEEP
) -> tuple[float, ...]:
    """The sigmoid of this budget that performs best, of equal ones the flattest."""
    tried = [sigmoid(layers, steepness, budget) for steepness in sorted(steepnesses)]
    scores = [performance(kept) for kept in tried]
    return tried[scores.index(max(scores))]


def after(view: LayerView, cfg: Config) -> Tensor | None:
    count = count_at(view.layer, len(view.image), cfg)
    if count >= len(view.alive):
        return None
    return view.alive[staying(view.weights(cfg.rows), count)] if count else view.alive[:0]


def measure(
    weights: Tensor, needed: Sequence[int], steepness: float, budget: float, cfg: Config
) -> dict[str, Tensor]:
    """What is alive after each layer [L, P] of weights [L, H, R, P]; the schedule found and the sigmoid.

    A schedule performs where it keeps as many as `needed`, by layer.
    """
    layers, tokens = len(weights), weights.shape[-1]
    alive, left = torch.zeros(layers, tokens, dtype=torch.bool), torch.arange(tokens)
    for layer, given in enumerate(weights):
        left = left[staying(given[..., left], count_at(layer, tokens, cfg))]
        alive[layer, left] = True

    def performance(kept: tuple) -> float:
        return float(all(k >= n for k, n in zip(kept, needed, strict=True)))

    found = search(performance, layers, tokens), sigmoid(layers, steepness, budget)
    return {
        "alive": alive,
        "search": torch.tensor(found[0]),
        "sigmoid": torch.tensor(found[1], dtype=torch.float64),
    }


def reference(
    weights: Tensor, needed: Sequence[int], steepness: float, budget: float, cfg: Config
) -> dict[str, Tensor]:
    """By the definition: the smallest schedule that falls and is enough has the most that any later layer needs."""
    layers, tokens = len(weights), weights.shape[-1]
    alive, left = [], list(range(tokens))
    for layer, heads in enumerate(weights.double().tolist()):
        rows = [row for head in heads for row in head]
        mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        k = (cfg.kept or (tokens,))[layer if layer < len(cfg.kept) else -1]
        count = -int(-(k * tokens) // 1) if isinstance(k, float) else k
        left = sorted(sorted(left, key=lambda i: (-mean[i], i))[:count])
        alive.append([i in left for i in range(tokens)])
    c = math.log(budget / (1 - budget))
    for _ in range(60):  # Newton's steps from below, each at most 1
        shares = [1 / (1 + math.exp(steepness * (n + 1) / layers - c)) for n in range(layers)]
        gap = budget - math.fsum(shares) / layers
        c += max(-1.0, min(1.0, gap * layers / math.fsum(s * (1 - s) for s in shares)))
    shares = [1 / (1 + math.exp(steepness * (n + 1) / layers - c)) for n in range(layers)]
    most = [max(needed[layer:]) for layer in range(layers)]
    return {
        "alive": torch.tensor(alive),
        "search": torch.tensor(most),
        "sigmoid": torch.tensor(shares, dtype=torch.float64),
    }


def cases(seed: int) -> Iterable[tuple]:
    """Shares and numbers; needs that rise with depth; ties; nothing dropped, everything dropped; one token; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=dtype)

    yield drawn(4, 2, 1, 16), (16, 9, 11, 2), 6.0, 0.4, Config(kept=(12, 12, 7, 1))
    yield drawn(5, 3, 4, 9), (0, 3, 2, 2, 0), 20.0, 0.75, Config(kept=(0.8, 0.5, 0.5, 0.0), rows="question")
    yield drawn(3, 2, 1, 13, dtype=torch.float32), (5, 5, 13), 0.0, 0.1, Config(kept=(0.3,))
    yield drawn(3, 2, 1, 6), (0, 0, 0), 2.0, 0.5, Config()
    yield drawn(1, 1, 1, 1), (1,), 3.0, 0.9, Config(kept=(1,))
    yield (3 * drawn(3, 1, 1, 20)).floor(), (7, 1, 4), 1.0, 0.2, Config(kept=(15, 8, 3))


METHOD = TokensPage(
    config=Config,
    after=after,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"kept": (0.5,)},),
    card=Card(
        title="G-Search",
        paper="Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction",
        year=2024,
        idea="search, layer by layer, the fewest visual tokens that keep performance, ranked by attention",
        cost="attention of the last token at every layer that drops; once, before: log2(tokens) evaluations for each "
        "layer, or one for each steepness",
        needs=("vision-language model", "questions to search on"),
        lineage=("FastV",),
        neutral={"kept": ()},
        caveat="a schedule is a model's own, so none is set: `search` or `sigmoid_search` give one. It is the smallest "
        "where more tokens never perform worse; otherwise one that passed. No code was found: the ranking query (the "
        "last token; rows='question' averages all text after the image) and the tolerance are choices here. The paper "
        "finds the sigmoid's parameters by Bayesian optimisation; here the budget sets its midpoint and its steepness "
        "is the best of a list. Tokens of a layer are counted after it, so the first layer sees all",
    ),
)
