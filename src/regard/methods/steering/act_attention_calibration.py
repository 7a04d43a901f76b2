"""ACT: attention sinks later than the first token are damped, in heads that a search has found.

    c_j = mean of A_ij over the queries i that see j        S = {j : c_j > α}, but never the first token
    A'_ij = β A_ij  for j in S,   A_ij (1 + (1 - β) Σ_S A_is / Σ_not-S A_is)  for others

A is after the softmax. What sinks give up goes to the other columns of the row in proportion, the first token among
them, so every row keeps its sum. Which tokens are sinks is found head by head on the prompt and stays while tokens are
generated; heads are those that `raising_heads` finds, or all of the middle layers.

>>> import torch
>>> A = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.4, 0.5, 0.1, 0], [0.5, 0.3, 0.2, 0.0]])
>>> changed, sinks = measure(A[None, None], torch.ones(4, 4).bool().tril()[None, None], Config(alpha=0.2))
>>> sinks[0, 0]  # c = 0.6 (the first token), 0.4333, 0.15, 0
tensor([False,  True, False, False])
>>> changed[0, 0, 3]  # 0.4 · 0.3 stays; 0.18 goes to 0.5 and 0.2, which grow by 0.18 / 0.7
tensor([0.6286, 0.1200, 0.2514, 0.0000])
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Config:
    heads: tuple[Head, ...] | None = (
        None  # (layer, head) of each that is calibrated; None: all of the layers below
    )
    alpha: float = 0.1  # mean weight above which a token is a sink
    beta: float = 0.4  # share that sinks keep
    first: int = 2  # layers before this one are left as they are
    spared: int = 1  # and so many of the last

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "0 <= alpha <= 1", alpha=self.alpha)
        require(0 <= self.beta <= 1, "0 <= beta <= 1", beta=self.beta)
        require(self.first >= 0 and self.spared >= 0, "layers >= 0", first=self.first, spared=self.spared)
        pairs = self.heads is None or all(len(pair) == 2 and min(pair) >= 0 for pair in self.heads)
        require(pairs, "heads are pairs (layer, head)", heads=self.heads)


def received(w: Tensor, seen: Tensor) -> Tensor:
    """[B, H, n] mean weight of each key over the queries that see it: w [B, H, R, n], seen [B, 1 | H, R, n] bool."""
    return w.masked_fill(~seen, 0).sum(-2) / seen.sum(-2).clamp(min=1)


def sinks_of(c: Tensor, alpha: float) -> Tensor:
    """[B, H, n] bool: keys of a mean weight c [B, H, n] above alpha, the first token left out."""
    first = (c > 0).int().argmax(-1, keepdim=True)  # it has all of its own weight, and padding has none
    return (c > alpha) & (torch.arange(c.shape[-1], device=c.device) != first)


def calibrated(w: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """w [B, H, R, n] with sinks [B, H, n] at the share beta; a row that sees nothing else stays as it is."""
    damped = sinks[:, :, None]
    freed = (1 - beta) * w.masked_fill(~damped, 0).sum(-1, keepdim=True)
    rest = w.masked_fill(damped, 0).sum(-1, keepdim=True)
    grown = 1 + freed / rest.where(rest > 0, 1)
    return torch.where(rest > 0, w * torch.where(damped, beta, grown), w)


def measure(w: Tensor, seen: Tensor, cfg: Config | None = None) -> tuple[Tensor, Tensor]:
    """Calibrated weights [B, H, R, n] of a prompt, every head of them, and its sinks [B, H, n]."""
    cfg, wide = cfg or Config(), at_least_float32(w)
    sinks = sinks_of(received(wide, seen), cfg.alpha)
    return calibrated(wide, sinks, cfg.beta).to(w.dtype), sinks


def raising_heads(accuracy: Callable[[tuple[Head, ...]], float], heads: Iterable[Head]) -> tuple[Head, ...]:
    """The heads that raise the accuracy on calibration prompts, each calibrated alone; () is the model as it is.

    >>> raising_heads(lambda heads: 0.5 + sum(0.1 * (head - 1) for _, head in heads), [(2, 0), (2, 1), (2, 2)])
    ((2, 2),)
    """
    plain = accuracy(())
    return tuple(head for head in heads if accuracy((head,)) > plain)


def acts(at: Steered, cfg: Config) -> bool:
    named = cfg.heads is None or any(layer == at.layer for layer, _ in cfg.heads)
    return cfg.beta != 1 and named and cfg.first <= at.layer < at.layers - cfg.spared


def weights(at: Steered, w: Tensor, cfg: Config) -> Tensor:
    if "sinks" not in at.notes:
        require(at.phase == "prefill", "this cache began with the method attached", phase=at.phase)
        at.notes["sinks"] = sinks_of(at.received(), cfg.alpha)
    sinks, keys = at.notes["sinks"], at.keys[:, None].expand(-1, w.shape[1], -1)
    known = (keys >= 0) & (keys < sinks.shape[-1])  # later tokens are no sinks
    sinks = sinks.gather(-1, keys.clamp(0, sinks.shape[-1] - 1)) & known
    chosen = [cfg.heads is None or (at.layer, head) in cfg.heads for head in range(w.shape[1])]
    sinks = sinks & torch.tensor(chosen, device=w.device)[:, None]
    return calibrated(at_least_float32(w), sinks, cfg.beta).to(w.dtype)


def reference(w: Tensor, seen: Tensor, cfg: Config | None = None) -> tuple[Tensor, Tensor]:
    """By the definition, head by head and number by number."""
    cfg, (B, H, R, n) = cfg or Config(), w.shape
    changed, sinks = w.double().clone(), torch.zeros(B, H, n, dtype=torch.bool)
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        A, sees = w[b, h].double().tolist(), seen[b, h % seen.shape[1]].tolist()
        columns = [[A[i][j] for i in range(R) if sees[i][j]] for j in range(n)]
        found = [j for j in range(n) if columns[j] and math.fsum(columns[j]) / len(columns[j]) > cfg.alpha]
        first = min((j for j in range(n) if columns[j]), default=-1)
        S = [j for j in found if j != first]
        sinks[b, h, S] = True
        for i, row in enumerate(A):
            changed[b, h, i] = torch.tensor(moved(row, S, cfg.beta), dtype=torch.float64)
    return changed, sinks


def moved(row: Sequence[float], S: Sequence[int], beta: float) -> list[float]:
    taken, others = math.fsum(row[j] for j in S), math.fsum(a for j, a in enumerate(row) if j not in S)
    if others == 0:
        return list(row)
    return [beta * a if j in S else a + (1 - beta) * taken * a / others for j, a in enumerate(row)]


def cases(seed: int) -> Iterable[tuple]:
    """Left padding and a sharp head; one token; a tie at alpha; float32 in a window; rows of sinks alone; beta 1."""
    g = torch.Generator().manual_seed(seed)

    def drawn(
        B: int, H: int, n: int, sharp: float, seen: Tensor, dtype: torch.dtype = torch.float64
    ) -> tuple:
        scores = sharp * torch.randn(B, H, n, n, generator=g, dtype=dtype)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(), seen.expand(B, -1, n, n)

    causal = torch.ones(9, 9).bool().tril()
    padded = causal[None, None].repeat(2, 1, 1, 1)
    padded[1, :, :3] = padded[1, :, :, :3] = False
    yield *drawn(2, 3, 9, 4.0, padded), Config()
    yield drawn(1, 1, 1, 1.0, torch.ones(1, 1, 1, 1).bool())
    yield torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]]]]).double(), causal[None, None, :3, :3], \
        Config(alpha=0.25)  # fmt: skip
    yield *drawn(2, 2, 9, 2.0, (causal & ~causal.tril(-4))[None, None], torch.float32), Config(beta=0.0)
    alone = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0.75, 0.25]]).double()[None, None]
    yield alone, causal[None, None, :3, :3], Config(alpha=0.5)
    yield *drawn(2, 3, 9, 4.0, padded), Config(beta=1.0)


METHOD = SteeringPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    acts=acts,
    weights=weights,
    test_settings=({"first": 0, "spared": 0, "alpha": 0.02},),
    card=Card(
        title="ACT",
        paper="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
        "through Attention Calibration",
        year=2024,
        idea="attention sinks after the first token give part of their weight to the rest of the row, in chosen "
        "heads",
        cost="a column mean of each prompt's weights; the search, once a model, is an evaluation for each head",
        needs=("decoder-lm", "heads from a search"),
        lineage=("streaming_llm",),
        neutral={"beta": 1.0},
        caveat="the threshold is the code's constant 0.1, where the paper's is relative to the length. The code "
        "spares the first sink that it finds, here it is the first token; it sets A[0, 0] to 1, here nothing "
        "needs it. The code decides anew in every forward, so that a single cached query has no mean; here "
        "the prompt decides. The code changes the first text of a batch alone, and its Llama path always uses "
        "the heads found for classification",
    ),
)
