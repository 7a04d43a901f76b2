"""Circuits of multiple choice: few heads write the letter, and of their queries and keys at the labels few axes count.

    effect(c) = s ⟨g ⊙ o_c, u_right - mean u_wrong⟩          s = 1 / √(mean x² + ε), x the residual before RMSNorm
    share     = Σ of the largest effects / (what x itself gives)       effects in the mean over prompts

    k̂ = μ + (k - μ) V_r V_rᵀ          V_r: the first r right singular vectors of all keys at labels, less their mean μ

o_c is what a head or MLP adds at the last token. Since the norm's scale is frozen, effects of all components and of the
embedding add up to the difference of logits. Queries of the last token are projected like keys. What is left after the
projection says which features a `correct letter` head tells labels by: four labels less their mean span three axes,
which is all that "the n-th item of an enumeration" needs. In Chinchilla 70B queries, keys and values of such heads
were compressed without loss on the labels A to D, and it was only a part of the explanation on labels at random.

>>> import torch
>>> writes, x = torch.tensor([[[6.0, 0.0], [0.0, 2.0], [2.0, 2.0]]]), torch.tensor([[7.0, 1.0]])
>>> keys = torch.tensor([[[1.0, 0.0], [3.0, 0.1], [5.0, -0.1]]])  # along the first axis, nearly
>>> found = measure(writes, x, torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]]), keys, Config(1, 1, eps=0))
>>> [round(v, 3) for v in found.effects[0].tolist()], round(found.share.item(), 3)  # s = 1 / 5; 6 of 7 - 1
([1.2, -0.4, 0.0], 1.0)
>>> found.kept.item() > 0.99, found.low[0, 2].tolist()[0] > 4.99
(True, True)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tracing import TracingPage
from regard.ops.frozen_norm import NORMS, frozen_norm


@dataclass(frozen=True)
class Config:
    rank: int = 3  # axes that are kept of queries or keys
    top: int = 5  # components whose effects are added up
    norm: Literal["rms", "layer"] = "rms"  # the model's final norm
    eps: float = 1e-6  # ε, added to the residual's mean square, or variance

    def __post_init__(self) -> None:
        require(self.rank >= 1 and self.top >= 1, "rank >= 1, top >= 1", rank=self.rank, top=self.top)
        require(self.norm in NORMS, f"norm is one of {NORMS}", norm=self.norm)
        require(self.eps >= 0, "eps >= 0", eps=self.eps)


@dataclass(frozen=True)
class Axes:
    """The affine space of a few axes that vectors lie in most nearly: their mean [D] and the axes [D, rank]."""

    mean: Tensor
    axes: Tensor

    def project(self, x: Tensor) -> Tensor:
        """[..., D] the nearest point of the space, of these or other vectors."""
        return self.mean + (x - self.mean) @ self.axes @ self.axes.mT


@dataclass(frozen=True)
class Letters:
    """Direct effects [B, components], the share of the largest, and vectors at labels on few axes [B, L, D]."""

    effects: Tensor
    share: Tensor
    low: Tensor
    kept: Tensor  # the share of the variance that stays


def direct_effects(
    writes: Tensor, residual: Tensor, right: Tensor, wrong: Tensor, gain: Tensor | None = None,
    norm: str = "rms", eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """[B, C] of writes [B, C, width], residual [B, width], unembeddings right [B, width] and wrong [B, W, width]."""
    to = frozen_norm(right - wrong.mean(1), residual, gain, norm, eps)
    return torch.einsum("bcw,bw->bc", writes, to)


def axes_of(x: Tensor, rank: int) -> Axes:
    """The axes of vectors [..., D], by the singular values of what they differ from their mean."""
    flat = x.flatten(0, -2)
    rule = "as many vectors, and numbers in each, as axes"
    require(rank <= min(flat.shape), rule, rank=rank, vectors=len(flat), width=flat.shape[1])
    mean = flat.mean(0)
    return Axes(mean, torch.linalg.svd(flat - mean, full_matrices=False).Vh[:rank].mT)


def measure(
    writes: Tensor, residual: Tensor, right: Tensor, wrong: Tensor, labels: Tensor, cfg: Config = Config(),
    gain: Tensor | None = None,
) -> Letters:  # fmt: skip
    """What components write for the right letter, and queries or keys at labels on few axes.

    writes [B, C, width] of heads and MLPs at the last token, residual [B, width] before the final norm and its gain
    [width]; unembeddings of the right letter [B, width] and of the others [B, W, width]; queries or keys [B, L, D].
    """
    fits = writes.dim() == 3 and residual.shape == right.shape == (len(writes), writes.shape[2])
    require(fits, "writes [B, C, width], residual and right [B, width]", writes=writes, residual=residual)
    require(cfg.top <= writes.shape[1], "as many components as are added up", top=cfg.top, writes=writes)
    effects = direct_effects(writes, residual, right, wrong, gain, cfg.norm, cfg.eps)
    all_of = direct_effects(residual[:, None], residual, right, wrong, gain, cfg.norm, cfg.eps).mean()
    require(all_of != 0, "a difference of logits in the mean", difference=all_of)
    share = effects.mean(0).topk(cfg.top).values.sum() / all_of
    space = axes_of(labels, cfg.rank)
    low, flat = space.project(labels), labels - space.mean
    return Letters(effects, share, low, (low - space.mean).square().sum() / flat.square().sum())


def reference(
    writes: Tensor, residual: Tensor, right: Tensor, wrong: Tensor, labels: Tensor, cfg: Config = Config(),
    gain: Tensor | None = None,
) -> Letters:  # fmt: skip
    """By the definition, in float64: logits through the norm, one by one; axes from the covariance's eigenvectors."""
    o, x, u, others, y = (t.double() for t in (writes, residual, right, wrong, labels))
    g = torch.ones(x.shape[1]).double() if gain is None else gain.double()
    rows, whole = torch.zeros(o.shape[:2]).double(), 0.0
    for b in range(len(o)):
        centre = (lambda t: t - t.sum() / len(t)) if cfg.norm == "layer" else (lambda t: t)
        scale = (sum(float(v) ** 2 for v in centre(x[b])) / x.shape[1] + cfg.eps) ** 0.5
        logit = lambda t, v: float((centre(t) / scale * g) @ v)  # noqa: B023, E731
        gap = lambda t: logit(t, u[b]) - sum(logit(t, v) for v in others[b]) / others.shape[1]  # noqa: B023, E731
        rows[b] = torch.tensor([gap(one) for one in o[b]], dtype=torch.float64)
        whole += gap(x[b])
    best = sorted((float(c.sum()) for c in rows.T), reverse=True)[: cfg.top]
    flat = y.reshape(-1, y.shape[-1])
    mean = sum(flat) / len(flat)
    away = flat - mean
    values, vectors = torch.linalg.eigh(sum(torch.outer(v, v) for v in away))  # ascending
    low, kept = torch.zeros_like(flat), 0.0
    for i, v in enumerate(away):
        low[i] = mean
        for axis in range(1, cfg.rank + 1):
            low[i] += (v @ vectors[:, -axis]) * vectors[:, -axis]
    kept = values[-cfg.rank :].sum() / values.sum()
    return Letters(rows, torch.tensor(sum(best) / whole, dtype=torch.float64), low.view(y.shape), kept)


def cases(seed: int) -> Iterable[tuple]:
    """One component and several, one wrong letter and three, all axes and few, with a gain and without."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    for b, c, width, letters, d, cfg in (
        (3, 1, 4, 2, 3, Config(1, 1)),
        (5, 6, 8, 4, 6, Config(3, 5)),
        (2, 7, 5, 4, 4, Config(4, 2, "layer", 0.1)),  # every axis: nothing is lost
        (7, 3, 6, 1, 5, Config(2, 3, "layer")),  # one query a prompt
    ):
        wrong = draw(b, max(1, letters - 1), width)
        given = draw(b, c, width), 2 * draw(b, width), draw(b, width), wrong, draw(b, letters, d) + 1
        yield *given, cfg
        yield *given, cfg, draw(width)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    patterns=("causal_self",),
    card=Card(
        title="Circuits of multiple choice",
        paper="Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla",
        year=2023,
        idea="heads that write the letter by their direct effects, their queries and keys at labels on three axes",
        cost="one forward of the prompts and a singular value decomposition of the keys of a head at the labels",
        needs=("decoder-lm",),
        lineage=("direct logit attribution",),
        caveat="no code of the paper was found; rank 3, and that the mean is taken out first and put back, are not "
        "confirmed by a source. The direct effect leaves the scale of the final norm frozen; of LayerNorm means are "
        "taken out. Queries and keys are meant as attention uses them, after rotary positions if a model has them: "
        "labels stand at the same places in every prompt",
    ),
)
