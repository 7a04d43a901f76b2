"""FastV: visual tokens that hardly anything attends to after the decoder's first layers leave the later ones.

    φ_j = 1/(H |Q|) Σ_h Σ_{i ∈ Q} A_h[i, j]        A: softmax weights of the last layer that saw all, the K-th
    the k highest φ_j stay, at the positions that they had

where j is a visual token, Q the queries (all tokens of the prompt, or its last one alone) and k the budget. The first
K layers move what an image says into few tokens; from then on most of the others are read for nothing.

>>> import torch
>>> weights = torch.tensor([[[0.2, 0.8, 0.0], [0.5, 0.1, 0.4]]])  # [H, R, n]; means 0.35, 0.45, 0.2
>>> measure(weights, 2, Config()), measure(weights[:, -1:], 2, Config())  # of the last alone 0.5, 0.1, 0.4
(tensor([0, 1]), tensor([0, 2]))
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops.images import LayerView, count_of, highest


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.25  # share, or number, of a prompt's visual tokens that stay
    layer: int = 2  # K: how many layers see all of them
    queries: Literal["all", "last"] = "all"  # the paper's mean over tokens; the released code's last token

    def __post_init__(self) -> None:
        count_of(self.keep, 1)
        require(self.layer >= 1, "a layer or more sees all tokens", layer=self.layer)


def measure(weights: Tensor, count: int, cfg: Config | None = None) -> Tensor:
    """[k] places, ascending, of the visual tokens that stay, of weights [H, R, n] on them by R queries."""
    weights = weights if weights.dtype == torch.float64 else weights.float()
    return highest(weights.mean((0, 1)), count)


def after(view: LayerView, cfg: Config) -> Tensor | None:
    rule = "layer < layers of the decoder: nothing is left that would see fewer tokens"
    require(cfg.layer < view.layers, rule, layer=cfg.layer, layers=view.layers)
    count = count_of(cfg.keep, len(view.image))
    if view.layer != cfg.layer - 1 or count >= len(view.alive):
        return None
    weights = view.weights("last") if cfg.queries == "last" else view.whole()[:, :, view.visual]
    return view.alive[measure(weights, count, cfg)]


def reference(weights: Tensor, count: int, cfg: Config | None = None) -> Tensor:
    """By the definition: one sum for each token, the least of what is left taken away one by one."""
    heads, rows, tokens = weights.shape
    given, scores = weights.double().tolist(), [0.0] * tokens
    for j in range(tokens):
        for head in range(heads):
            scores[j] += sum(given[head][i][j] for i in range(rows))
    left = list(range(tokens))
    while len(left) > count:
        left.remove(min(reversed(left), key=lambda j: scores[j]))  # of equal ones the later goes
    return torch.tensor(left)


def cases(seed: int) -> Iterable[tuple]:
    """All queries and the last; causal rows; one token; as many as there are; equal scores; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(heads: int, rows: int, tokens: int) -> Tensor:
        return torch.randn(heads, rows, tokens, generator=g, dtype=torch.float64).softmax(-1)

    yield drawn(4, 40, 32), 8
    yield drawn(2, 1, 64), 7
    yield drawn(2, 6, 20).float(), 5
    yield drawn(3, 24, 24).tril(), 12
    yield drawn(3, 2, 1), 1
    yield drawn(1, 5, 9), 9
    yield torch.randint(0, 3, (2, 4, 24), generator=g) / 8, 9  # exact in binary, so equal scores are equal


METHOD = TokensPage(
    config=Config,
    after=after,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 3, "layer": 1, "queries": "last"},),
    card=Card(
        title="FastV",
        paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        year=2024,
        idea="after two layers of the decoder, visual tokens that receive little attention leave the later ones",
        cost="attention weights of one layer (all rows, or one); K layers read P tokens, the rest k",
        needs=("vision-language model",),
        neutral={"keep": 1.0},
        caveat="the paper averages over all queries, a causal mask's zeros among them, so that early tokens gain; "
        "the released code reads the last token alone: queries='last'. Default keep is 0.25 as on the other pages, the "
        "paper's half is keep=0.5. Images of one prompt share the budget. The released K = 0, a random choice before "
        "the first layer, is random_tokens",
    ),
)
