"""Scan and snap: attention leaves tokens that say nothing, ranks the others by co-occurrence, and then stands still.

    a text      L tokens drawn independently from P(· | class), then the class's last token; the label is the next token
    attention   A_i = exp Z[last, x_i] / Σ_j exp Z[last, x_j]        over the L tokens before; no positions, no 1/√D
    output      f = Σ_i A_i e(x_i),   logits = Y f / ‖f‖              e one-hot; Y and Z start at 0, no residual
    in counts   A on token l = n_l exp Z[last, l] / Σ_m n_m exp Z[last, m]:  without positions a text is its counts n

    c_l = P(l | class) exp Z[last, l] / Σ_m P(m | class) exp Z[last, m]          the attention of an endless text

A class is a next token. Classes share 10 common tokens of unnormalised probability 1 and have 10 distinct ones each, of
0.1 to 1, so that c gives the common ones 0.645 at the start. Texts are fresh in each step of plain SGD. The common mass
and the largest weight are those of the worst class. Order is asked twice: Spearman of P(l | class) with c_l, which is 1
before any training since c starts at P, and with Z[last, l], which starts at nothing; the smaller one of a class
counts, its mean over classes is judged and the least is beside it. Late is the second half of the steps: twice the time
must move the mean entropy of c by less than 1 %. Nothing ends, it slows down: Z goes on like a power of log t.

The theory has Y learn much faster than Z. With a ratio of 10 the two classes of the released figure, each after a last
token of its own, keep 0.83 of the common mass: they are told apart before Z has moved. Twenty classes after one last
token, the theory's case, take longer. This and the rates were chosen on seed 9; measured are seeds 0, 1 and 2, whose
worst counts. Beside them are a ratio of 100 at the same rate of Y, and the run of the released figure: rates 1 and 1,
a ratio of 1, momentum 0.9, 100 steps. The threshold of 0.3 is not the paper's, and that run does not meet it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured
from regard.train.loop import fit

COMMON, DISTINCT, LEAST = (
    10,
    10,
    0.1,
)  # tokens, tokens of a class, the least of their unnormalised probabilities
LENGTH, BATCH, SEEDS = 128, 128, (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """`lasts`: last tokens, one for all classes or one for each; `ratio`: the rate of Y over that of Z."""

    classes: int = 20
    lasts: int = 1
    ratio: float = 10.0
    rate: float = 5.0
    momentum: float = 0.0
    steps: int = 1600

    @property
    def tokens(self) -> int:
        return COMMON + self.classes * DISTINCT

    def last(self, classes: Tensor) -> Tensor:
        return classes % self.lasts


JUDGED = Setting()
BESIDE = {
    "ratio_100": Setting(ratio=100.0, rate=0.5),
    "figure": Setting(classes=2, lasts=2, ratio=1.0, rate=1.0, momentum=0.9, steps=100),
}


# texts and the model


def distinct(c: int) -> slice:
    return slice(COMMON + c * DISTINCT, COMMON + (c + 1) * DISTINCT)


def chances(at: Setting) -> Tensor:
    """P(l | class) [classes, tokens]."""
    p = torch.zeros(at.classes, at.tokens)
    p[:, :COMMON] = 1.0
    for c in range(at.classes):
        p[c, distinct(c)] = torch.linspace(LEAST, 1.0, DISTINCT)
    return p / p.sum(1, keepdim=True)


def texts(p: Tensor, classes: Tensor, g: torch.Generator) -> Tensor:
    """[B, LENGTH]"""
    return torch.multinomial(p[classes], LENGTH, replacement=True, generator=g)


def counts(x: Tensor, tokens: int) -> Tensor:
    """[B, tokens]: how often each token stands in a text."""
    return torch.zeros(len(x), tokens).scatter_add(1, x, torch.ones(x.shape))


def logits(n: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """[B, classes], of counts n and rows z of Z [B, tokens], and Y [classes, tokens]."""
    weights = n * (z - z.amax(1, keepdim=True)).exp()
    mixed = weights / weights.sum(1, keepdim=True)
    return mixed / mixed.norm(dim=1, keepdim=True) @ y.T


def expected(z: Tensor, at: Setting) -> Tensor:
    """c [classes, tokens]."""
    return (chances(at).double().log() + z.double()[at.last(torch.arange(at.classes))]).softmax(1)


def trained(at: Setting, seed: int) -> tuple[list[Tensor], float]:
    """(Z at the start, after half of the steps and at the end; the mean loss of the last 50 steps)"""
    p, g = chances(at), generator(seed)
    y, z = (torch.zeros(n, at.tokens, requires_grad=True) for n in (at.classes, at.lasts))
    groups = [{"params": [y], "lr": at.ratio * at.rate}, {"params": [z], "lr": at.rate}]
    snaps = [z.detach().clone()]

    def loss_at(step: int) -> Tensor:
        classes = torch.randint(at.classes, (BATCH,), generator=g)
        n = counts(texts(p, classes, g), at.tokens)
        return F.cross_entropy(logits(n, z[at.last(classes)], y), classes)

    def keep(step: int, loss: float) -> None:
        if step + 1 in (at.steps // 2, at.steps):
            snaps.append(z.detach().clone())

    losses = fit(torch.optim.SGD(groups, momentum=at.momentum), loss_at, at.steps, clip=None, after_step=keep)
    return snaps, mean(losses[-50:])


# what attention did


def entropy(c: Tensor) -> float:
    """Mean over classes, in nats."""
    return torch.special.entr(c).sum(1).mean().item()


def rank(a: Tensor, b: Tensor) -> float:
    return float(spearmanr(a, b).statistic)


def orders(z: Tensor, at: Setting, p: Tensor) -> list[float]:
    """Of each class, the smaller of Spearman(p, c) and Spearman(p, Z) over its distinct tokens."""
    c, rows = expected(z, at), z[at.last(torch.arange(at.classes))]
    own = [(p[i, distinct(i)], c[i, distinct(i)], rows[i, distinct(i)]) for i in range(at.classes)]
    return [min(rank(a, b), rank(a, row)) for a, b, row in own]


def findings(at: Setting, seed: int) -> dict[str, float]:
    (start, half, end), loss = trained(at, seed)
    before, middle, after = (expected(z, at) for z in (start, half, end))
    p = chances(at)
    by_class, moved = orders(end, at, p), p[:, torch.randperm(at.tokens, generator=generator(seed))]
    elsewhere = [rank(a, row) for a, row in zip(moved, after, strict=True)]
    return {
        "common_left": (after[:, :COMMON].sum(1) / before[:, :COMMON].sum(1)).max().item(),
        "order": mean(by_class),
        "order_least": min(by_class),
        "order_shuffled": mean(elsewhere),
        "late_entropy_change": abs(entropy(after) / entropy(middle) - 1),
        "entropy_change": abs(entropy(after) / entropy(before) - 1),
        "largest": after.max().item(),
        "loss": loss,
    }


def measure() -> Measured:
    with threads(1):
        by_seed = [findings(JUDGED, seed) for seed in SEEDS]
        beside = {name: findings(at, SEEDS[0]) for name, at in BESIDE.items()}
    worst = {
        "common_left": max(f["common_left"] for f in by_seed),
        "order": min(f["order"] for f in by_seed),
        "late_entropy_change": max(f["late_entropy_change"] for f in by_seed),
        "largest": max(f["largest"] for f in by_seed),
    }
    numbers: dict[str, Any] = worst | {f"{key}_by_seed": [f[key] for f in by_seed] for key in by_seed[0]}
    numbers |= {f"{name}_{key}": value for name, f in beside.items() for key, value in f.items()}
    parts = {
        "common tokens": worst["common_left"] <= 0.3,
        "order": worst["order"] >= 0.8,
        "late entropy": worst["late_entropy_change"] < 0.01,
        "largest weight": worst["largest"] < 0.95,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="scan_and_snap",
    statement=(
        "one layer of attention trained by SGD, its decoder much faster, starts uniform, leaves tokens that all "
        "classes share, weighs the others in the order of their co-occurrence with the class, and stops changing "
        "before it is one-hot"
    ),
    bound=(
        "attention on common tokens <= 0.3 times that at the start; Spearman of co-occurrence and attention >= 0.8; "
        "entropy changes by < 1 % in the second half of the training; largest weight < 0.95"
    ),
    measure=measure,
)
