"""Mechanisms of factual recall: which heads write the subject, and which of them the MLP after them takes up or erases.

    written(h) = s ⟨g ⊙ (o_h - mean o_h), u⟩      o_h: what head h adds to the residual at the last token
    s          = 1 / √(var x + ε)                  of the residual x before the final norm, frozen; g its gain
    m ≈ Σ_h c_h o_h + b                            m: what the layer's MLP adds;  c, b by least squares over prompts

On "The capital of France is" u is the unembedding of France or of Paris, and what all components write adds up to the
logit, but for the norm's own shift. c_h > 0 says that the MLP adds to what head h wrote, c_h < 0 that it takes from it;
b is what it adds whatever the prompt: the direction of the task. Where the norm is RMSNorm no mean is taken out and
s = 1 / √(mean x² + ε). The paper finds subject heads, an MLP that acts like get_capital, and a last layer that pushes
right answers down, in GPT-2, OPT 1.3B and Llama-2 7B.

>>> import torch
>>> heads = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
>>> mlp = 0.5 * heads[:, 0] - heads[:, 1] + torch.tensor([3.0, 0.0])
>>> found = measure(heads, mlp, torch.full((3, 2), 2.0), torch.tensor([1.0, 0.0]), cfg=Config(eps=0))
>>> found.written[0].tolist()  # the residual (2, 2) has a mean square of 4: half of ⟨o, u⟩
[1.0, 0.0]
>>> [round(x, 4) for x in [*found.coefficients.tolist(), *found.bias.tolist()]]
[0.5, -1.0, 3.0, 0.0]
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
    norm: Literal["rms", "layer"] = "rms"  # the model's final norm
    eps: float = 1e-6  # ε, added to the residual's mean square, or variance

    def __post_init__(self) -> None:
        require(self.norm in NORMS, f"norm is one of {NORMS}", norm=self.norm)
        require(self.eps >= 0, "eps >= 0", eps=self.eps)


@dataclass(frozen=True)
class Recall:
    """What heads write along a direction [B, heads], and what the MLP does with each of them."""

    written: Tensor
    coefficients: Tensor  # [heads]
    bias: Tensor  # [width]
    explained: Tensor  # the share of the MLP's variance over prompts that the heads account for

    def share(self, count: int) -> float:
        """What the `count` heads that write most hold of all that heads write for the direction, in the mean."""
        for_it = self.written.mean(0).clamp(min=0)
        require(bool(for_it.any()), "a head that writes for the direction", written=for_it)
        return (for_it.topk(count).values.sum() / for_it.sum()).item()


def written(
    heads: Tensor, residual: Tensor, direction: Tensor, gain: Tensor | None = None, cfg: Config = Config()
) -> Tensor:
    """[B, heads] of heads [B, heads, width], residual [B, width], direction [width] or [B, width], gain [width]."""
    return torch.einsum("bhw,bw->bh", heads, frozen_norm(direction, residual, gain, cfg.norm, cfg.eps))


def regressed(heads: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c [heads], b [width], share explained) of mlp [B, width] on heads [B, heads, width] and a bias."""
    x, y = heads - heads.mean(0), mlp - mlp.mean(0)
    columns = x.movedim(1, -1).flatten(0, 1)  # [B width, heads]
    rank = int(torch.linalg.matrix_rank(columns))
    rule = "heads whose outputs vary from prompt to prompt, each in a way of its own"
    require(rank == heads.shape[1], rule, rank=rank, heads=heads.shape[1], prompts=len(heads))
    c = torch.linalg.lstsq(columns, y.flatten()[:, None]).solution[:, 0]
    left = y - torch.einsum("bhw,h->bw", x, c)
    bias = mlp.mean(0) - torch.einsum("hw,h->w", heads.mean(0), c)
    return c, bias, 1 - left.square().sum() / y.square().sum()


def measure(
    heads: Tensor, mlp: Tensor, residual: Tensor, direction: Tensor, gain: Tensor | None = None,
    cfg: Config = Config(),
) -> Recall:  # fmt: skip
    """What heads write along the direction, and the regression of the MLP after them on them.

    heads [B, heads, width] of one layer at one token; mlp [B, width] of that layer; residual [B, width] before the
    final norm; direction [width], or [B, width] one a prompt; gain [width] of the norm. Raises ValueError for heads
    that never vary or repeat each other.
    """
    same = heads.dim() == 3 and mlp.shape == residual.shape == (len(heads), heads.shape[2])
    rule = "heads [B, heads, width], mlp and residual [B, width]"
    require(same, rule, heads=tuple(heads.shape), mlp=tuple(mlp.shape), residual=tuple(residual.shape))
    require(bool((mlp != mlp[0]).any()), "an MLP whose output varies from prompt to prompt", mlp=mlp)
    return Recall(written(heads, residual, direction, gain, cfg), *regressed(heads, mlp))


def reference(
    heads: Tensor, mlp: Tensor, residual: Tensor, direction: Tensor, gain: Tensor | None = None,
    cfg: Config = Config(),
) -> Recall:  # fmt: skip
    """By the definition, in float64: heads through the norm, number by number; normal equations with the bias."""
    o, m, x, u = (t.double() for t in (heads, mlp, residual, direction))
    count, names, width = o.shape
    g = torch.ones(width, dtype=torch.float64) if gain is None else gain.double()
    rows = torch.zeros(count, names, dtype=torch.float64)
    gram, right = torch.zeros(names + width, names + width).double(), torch.zeros(names + width).double()
    for b in range(count):
        mean = float(x[b].sum() / width) if cfg.norm == "layer" else 0.0
        scale = (sum((float(v) - mean) ** 2 for v in x[b]) / width + cfg.eps) ** 0.5
        for h in range(names):
            centre = float(o[b, h].sum() / width) if cfg.norm == "layer" else 0.0
            to = u if u.dim() == 1 else u[b]
            rows[b, h] = sum(float((o[b, h, i] - centre) * g[i] * to[i]) for i in range(width)) / scale
        for i in range(width):
            row = torch.cat([o[b, :, i], torch.eye(width).double()[i]])  # m[b, i] = row · (c, bias)
            gram += torch.outer(row, row)
            right += row * m[b, i]
    found = torch.linalg.solve(gram, right)
    c, bias = found[:names], found[names:]
    wrong = sum(float(((o[b] * c[:, None]).sum(0) + bias - m[b]).square().sum()) for b in range(count))
    varies = sum(float((m[b] - m.mean(0)).square().sum()) for b in range(count))
    return Recall(rows, c, bias, torch.tensor(1 - wrong / varies, dtype=torch.float64))


def cases(seed: int) -> Iterable[tuple]:
    """Both norms, with a gain and without, one head, one direction for all prompts or one for each, small residuals."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    for count, heads, width in ((2, 1, 3), (6, 3, 5), (9, 4, 8)):
        for norm, eps, size in (("rms", 1e-6, 3.0), ("layer", 1e-5, 3.0), ("layer", 0.1, 0.1)):
            o, m = draw(count, heads, width), draw(count, width) + 2
            cfg = Config(norm, eps)  # type: ignore[arg-type]
            yield o, m, size * draw(count, width) + 1, draw(width), draw(width), cfg
            yield o, m, size * draw(count, width) + 1, draw(count, width), None, cfg
    yield tuple(t.float() for t in (draw(5, 2, 4), draw(5, 4), draw(5, 4), draw(4)))


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    patterns=("causal_self",),
    card=Card(
        title="Mechanisms of factual recall",
        paper="Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
        year=2024,
        idea="heads move the subject to the last token, and a regression on them says which of them the MLP takes up",
        cost="one forward of the prompts; least squares in as many unknowns as a layer has heads",
        needs=("decoder-lm",),
        lineage=("direct logit attribution",),
        caveat="the form of the paper's regression is not settled by its code (the analysis is in a notebook that was "
        "not to be had): here one number a head and a bias vector, by least squares over prompts and widths. The scale "
        "of the final norm is frozen at that of the whole residual; the shift of a LayerNorm belongs to no component",
    ),
)
