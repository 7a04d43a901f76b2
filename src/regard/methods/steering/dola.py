"""DoLa: the last layer's logits against those of the earlier layer that differs most from it.

    q_j = softmax(φ(h_j)),   M = argmax_{j in J} JSD(q_N, q_j)        φ: what the model makes of its last layer's output
    F(x) = log q_N(x) - s log q_M(x)   where  q_N(x) >= β max q_N,   -inf elsewhere        s = 1: the paper's

J are layers of a part of the model's depth, every second one. Layers are numbered as the paper does, by how many of
them have run: 1 .. N.

>>> import torch
>>> last = torch.tensor([[0.6, 0.3, 0.1]]).log()
>>> early = torch.tensor([[[0.6, 0.3, 0.1]], [[0.2, 0.4, 0.4]]]).log()  # the first says what the last one says
>>> apart, contrast, kept = measure(last, early, Config(cut=0.2))
>>> contrast.exp(), kept  # 0.6 / 0.2, 0.3 / 0.4, 0.1 / 0.4, and 0.1 < 0.2 · 0.6
(tensor([[3.0000, 0.7500, 0.2500]]), tensor([[ True,  True, False]]))
>>> candidates(32, Config())  # of LLaMA 7B, its higher half
[16, 18, 20, 22, 24, 26, 28, 30]
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered


@dataclass(frozen=True)
class Config:
    start: float = 0.5  # J begins at this share of the depth
    stop: float = 1.0  # and ends before this one; the paper's lower half: 0 to 0.5
    every: int = 2  # layers from one of J to the next; 1: all of them
    strength: float = 1.0  # s
    cut: float = 0.1  # β
    normed: bool = True  # whether earlier layers' outputs pass the last norm before the head

    def __post_init__(self) -> None:
        require(0 <= self.start < self.stop <= 1, "0 <= start < stop <= 1", start=self.start, stop=self.stop)
        require(self.every >= 1, "every >= 1", every=self.every)
        require(self.strength >= 0, "strength >= 0", strength=self.strength)
        require(0 <= self.cut <= 1, "0 <= cut <= 1", cut=self.cut)


def candidates(layers: int, cfg: Config) -> list[int]:
    """The layers of J, 1 .. N - 1, in a model of N layers; the embeddings, 0 in the paper, are not asked."""
    found = range(math.ceil(cfg.start * layers), math.ceil(cfg.stop * layers), cfg.every)
    chosen = [j for j in found if 0 < j < layers]
    require(
        chosen,
        "an earlier layer or more between start and stop",
        layers=layers,
        start=cfg.start,
        stop=cfg.stop,
    )
    return chosen


def divergence(last: Tensor, early: Tensor) -> Tensor:
    """[J, B] Jensen-Shannon divergence of logits [B, V] and [J, B, V], in nats."""
    log_p, log_q = last.log_softmax(-1), early.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    apart = [(x.exp() * (x - log_m)).sum(-1) for x in (log_p, log_q)]
    return (apart[0] + apart[1]) / 2


def measure(last: Tensor, early: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [B, V] and [J, B, V]: divergences [J, B], the contrast and what is kept of it [B, V]."""
    last, early = at_least_float32(last), at_least_float32(early)
    apart = divergence(last, early)
    other = early[apart.argmax(0), torch.arange(len(last), device=last.device)]
    contrast = last.log_softmax(-1) - cfg.strength * other.log_softmax(-1)
    floor = last.amax(-1, keepdim=True) + (math.log(cfg.cut) if cfg.cut else -math.inf)
    return apart, contrast, last >= floor


def contrasted(at: Steered, logits: Mapping[str, Tensor], cfg: Config) -> Tensor:
    main = logits["main"]
    if not cfg.strength and not cfg.cut:
        return main
    layers = candidates(at.layers, cfg)
    early = torch.stack([at.early(j - 1, normed=cfg.normed) for j in layers]).to(main)
    _, contrast, kept = measure(main, early, cfg)
    return contrast.masked_fill(~kept, -math.inf)


def reference(last: Tensor, early: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """By the definition: probabilities of each text in Python's numbers, candidates one after the other."""

    def shares(row: list[float]) -> list[float]:
        top = max(row)
        total = math.fsum(math.exp(x - top) for x in row)
        return [math.exp(x - top) / total for x in row]

    def away(p: list[float], q: list[float]) -> float:
        return math.fsum(a * math.log(2 * a / (a + b)) for a, b in zip(p, q, strict=True) if a)

    divergences, contrasts, kept = [], [], []
    for b, row in enumerate(last.tolist()):
        p, others = shares(row), [shares(layer[b]) for layer in early.tolist()]
        apart = [(away(p, q) + away(q, p)) / 2 for q in others]
        divergences.append(apart)
        q = others[apart.index(max(apart))]
        contrasts.append([math.log(x) - cfg.strength * math.log(y) for x, y in zip(p, q, strict=True)])
        kept.append([x >= cfg.cut * max(p) for x in p])
    wide = torch.float64
    return torch.tensor(divergences, dtype=wide).T, torch.tensor(contrasts, dtype=wide), torch.tensor(kept)


def cases(seed: int) -> Iterable[tuple]:
    """Several candidates and one, a candidate that is the last layer, equal candidates, float32, no cut, the whole."""
    g = torch.Generator().manual_seed(seed)

    def drawn(layers: int, batch: int, words: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [
            3 * torch.randn(*s, generator=g, dtype=dtype) for s in ((batch, words), (layers, batch, words))
        ]

    yield *drawn(4, 3, 11), Config()
    yield *drawn(1, 2, 5), Config(cut=0.0, strength=0.5)
    yield *drawn(8, 2, 9, torch.float32), Config()
    yield *drawn(2, 1, 1), Config(cut=1.0)
    last, early = drawn(4, 3, 6)
    early[0] = last
    early[3] = early[1]
    yield last, early, Config(cut=1.0)


METHOD = SteeringPage(
    config=Config,
    logits=contrasted,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"start": 0.0, "every": 1},),
    card=Card(
        title="DoLa",
        paper="DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
        year=2023,
        idea="log probabilities of the last layer minus those of the earlier layer that differs most from it",
        cost="of each token the head once more for each candidate layer",
        needs=("decoder-lm",),
        lineage=("contrastive decoding", "logit lens"),
        neutral={"strength": 0.0, "cut": 0.0},
        caveat="the released code chooses one layer for a whole batch, here each text has its own; takes divergences "
        "from the mixture, KL(M‖q), where the paper's are to it; gives the head the states of earlier layers without "
        "the last norm (normed=False), although one φ is the paper's for all layers; and counts the embeddings among "
        "the lower half. The paper takes the higher half of depth for TruthfulQA, the lower one where answers are "
        "generated, and there divides scores of tokens that stand already by 1.2, which is the caller's to add",
    ),
)
