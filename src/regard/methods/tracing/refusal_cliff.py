"""Refusal cliff: what a model means to answer, read token by token, falls at the last tokens before it answers.

    p(x) = σ(w · x + b)                    a linear probe on states x of one layer, fitted at the last token alone:
    (w, b) = argmin  mean BCE + λ/2 ‖w‖²   label 1 where the model refuses; then swept over all tokens of other texts
    cliff = mean of p over the reasoning - p at the last token of the template that closes it
    s(l, h) = mean over texts of  (z_h W_O[h]) · w / ‖w‖        what head h of layer l writes at the last token

Above 0 where the intention to refuse is given up at the end. Heads with the most negative s write against it: with some
3 % of the heads off, attacks succeed in less than 10 % of the cases. Direct writes only: a head that acts through later
layers has a small s.

With states x = ±1 at the labels and λ = 2 σ(-1/2), w = 1/2 and b = 0 solve  σ(-w) = λ w; hence p(1) = σ(1/2):

>>> import torch
>>> at_end = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
>>> traces = torch.tensor([[[1.0], [1.0], [-1.0]]], dtype=torch.float64)
>>> heads = torch.tensor([[[[3.0], [-2.0]]]], dtype=torch.float64)  # one layer, one text, two heads of width 1
>>> cfg = Config(penalty=2 * torch.tensor(-0.5, dtype=torch.float64).sigmoid().item())
>>> reasoning = torch.tensor([[True, True, False]])
>>> out = torch.ones(1, 2, 1, 1, dtype=torch.float64)
>>> found = measure(at_end, torch.tensor([1, 0]), traces, reasoning, heads, out, cfg)
>>> round(found.weight.item(), 6), round(found.cliff.item(), 4)  # σ(1/2) - σ(-1/2) = 0.6225 - 0.3775
(0.5, 0.2449)
>>> found.scores.tolist(), suppressors(found.scores, 1)
([[3.0, -2.0]], [(0, 1)])
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, Edit, Observer, Site, require
from regard.kinds.tracing import TracingPage

STEPS = 100  # of Newton's method at most; some ten are needed


@dataclass(frozen=True)
class Config:
    share: float = 0.03  # of all heads, that are switched off
    penalty: float = 1e-2  # λ: without it classes that a plane separates have no optimum
    everywhere: bool = False  # heads are off at all tokens, and not at the last alone

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "0 < share <= 1", share=self.share)
        require(self.penalty > 0, "penalty > 0", penalty=self.penalty)


@dataclass(frozen=True)
class Cliff:
    """A probe, what it reads, and the heads that write along it."""

    weight: Tensor  # [width]
    bias: Tensor  # []
    trace: Tensor  # [B, N] probability of refusal at each token
    cliff: Tensor  # [B]
    scores: Tensor  # [layers, H]


def fit_probe(states: Tensor, labels: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """(w [width], b []) of states [n, width] and labels [n] of 0 and 1, by Newton's method with halved steps."""
    y = labels.to(states.dtype)
    require(0 < y.sum() < len(y), "both labels are there", refused=int(y.sum()), of=len(y))
    x = torch.cat([states, torch.ones_like(states[:, :1])], 1)  # [n, width + 1]
    shrink = torch.full_like(x[0], cfg.penalty)
    shrink[-1] = 0

    def loss(theta: Tensor) -> Tensor:
        fit = torch.nn.functional.binary_cross_entropy_with_logits(x @ theta, y)
        return fit + (shrink * theta.square()).sum() / 2

    theta = torch.zeros_like(x[0])
    for _ in range(STEPS):
        p = (x @ theta).sigmoid()
        slope = x.mT @ (p - y) / len(y) + shrink * theta
        curvature = (x * (p * (1 - p))[:, None]).mT @ x / len(y) + shrink.diag()
        step, size = torch.linalg.solve(curvature, slope), 1.0
        while size > 1e-8 and loss(theta - size * step) > loss(theta):
            size /= 2
        theta = theta - size * step
        if slope.abs().max() < 1e-12:
            break
    return theta[:-1], theta[-1]


def fall(trace: Tensor, reasoning: Tensor) -> Tensor:
    """[B] the mean of trace [B, N] over the tokens of reasoning [B, N], less its value at the last token."""
    require(bool(reasoning.any(-1).all()), "a token of reasoning in every text", tokens=reasoning.sum(-1))
    within = torch.where(reasoning, trace, 0).sum(-1) / reasoning.sum(-1)
    return within - trace[:, -1]


def head_scores(z: Tensor, out: Tensor, direction: Tensor) -> Tensor:
    """[..., H] mean projection on a direction [width] of what z [..., B, H, E] writes by out [..., H, E, width]."""
    read = out @ (direction / direction.norm())  # [..., H, E]
    return (z.mean(-3) * read).sum(-1)


def measure(
    fitted: Tensor, labels: Tensor, states: Tensor, reasoning: Tensor, z: Tensor, out: Tensor, cfg: Config = Config()
) -> Cliff:  # fmt: skip
    """The probe of fitted [n, width] and labels [n], swept over states [B, N, width]; the last token is column N - 1.

    reasoning [B, N] is True at the tokens of the plateau, so that padding has no part in it; z [layers, B, H, E] heads
    at the last token, out [layers, H, E, width] the part of the output projection that each of them meets.
    """
    wide = (fitted.shape[-1], states.shape[-1], out.shape[-1])
    require(len({*wide}) == 1, "states and what heads write have one width", widths=wide)
    require(reasoning.shape == states.shape[:2], "reasoning [B, N]", reasoning=reasoning, states=states)
    weight, bias = fit_probe(fitted, labels, cfg)
    trace = (states @ weight + bias).sigmoid()
    return Cliff(weight, bias, trace, fall(trace, reasoning), head_scores(z, out, weight))


def reference(
    fitted: Tensor, labels: Tensor, states: Tensor, reasoning: Tensor, z: Tensor, out: Tensor, cfg: Config = Config()
) -> Cliff:  # fmt: skip
    """The same by the definition: down the gradient until it is gone, then token by token and head by head."""
    x, w, b = fitted.double(), fitted.new_zeros(fitted.shape[1]).double(), fitted.new_zeros(()).double()
    # no step is longer than the curvature allows: σ' <= 1/4
    rate = 1 / (cfg.penalty + (1 + x.square().sum(1).max()) / 4)
    for _ in range(200_000):
        off = 1 / (1 + torch.exp(-(x @ w + b))) - labels.double()
        down = (off[:, None] * x).mean(0) + cfg.penalty * w, off.mean()
        w, b = w - rate * down[0], b - rate * down[1]
        if max(down[0].abs().max(), down[1].abs()) < 1e-13:
            break
    length = float(w @ w) ** 0.5
    trace = torch.zeros(states.shape[:2], dtype=torch.float64)
    cliff = torch.zeros(len(states), dtype=torch.float64)
    for i, text in enumerate(states.double()):
        for j, state in enumerate(text):
            trace[i, j] = 1 / (1 + torch.exp(-(state @ w) - b))
        plateau = [float(trace[i, j]) for j in range(len(text)) if reasoning[i, j]]
        cliff[i] = sum(plateau) / len(plateau) - trace[i, len(text) - 1]
    scores = torch.zeros(len(z), z.shape[2], dtype=torch.float64)
    for layer, texts in enumerate(z.double()):
        for heads in texts:
            for h, head in enumerate(heads):
                written = sum(head[e] * out[layer, h, e].double() for e in range(len(head)))
                scores[layer, h] += float(written @ w) / length / len(texts)
    return Cliff(w, b, trace, cliff, scores)


def cases(seed: int) -> Iterable[tuple]:
    """Labels that a plane separates and that none does, one head, one text, a plateau of one token and of all."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    for n, width, batch, tokens, layers, heads, e in (
        (2, 1, 1, 2, 1, 1, 1),
        (12, 3, 2, 5, 2, 3, 2),
        (9, 2, 3, 4, 1, 4, 3),
    ):
        labels = (torch.rand(n, generator=g) < 0.4).long()
        labels[:2] = torch.tensor([0, 1])
        apart = labels[:, None] * (4.0 if n == 9 else 0.5)
        reasoning = torch.rand(batch, tokens, generator=g) < 0.5
        reasoning[0], reasoning[:, 0] = n == 12, True
        rest = (
            draw(batch, tokens, width),
            reasoning,
            draw(layers, batch, heads, e),
            draw(layers, heads, e, width),
        )
        yield draw(n, width) + apart, labels, *rest, Config(penalty=0.5)


def observer() -> Observer:
    """Head outputs at the last query of a forward: [B, H, 1, E] a layer and step."""
    return Observer("z", Site("z", rows=-1, tower="text"), name="refusal_cliff")


def suppressors(scores: Tensor, count: int) -> list[tuple[int, int]]:
    """The heads (layer, query head) of the `count` lowest scores [layers, H], the lowest first; ties in their order."""
    order = scores.flatten().argsort(stable=True)[:count].tolist()
    return [divmod(i, scores.shape[1]) for i in order]


def ablate(heads: Iterable[tuple[int, int]], cfg: Config, phase: str = "both") -> tuple[Edit, ...]:
    """Edits that take away what heads (layer, query head) write, one a layer."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    rows = None if cfg.everywhere else -1
    sites = [
        Site("z", layers=n, heads=tuple(h), rows=rows, phase=phase, tower="text") for n, h in by_layer.items()
    ]
    return tuple(Edit(site, "zero") for site in sites)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    observer=observer,
    ablate=ablate,
    patterns=("causal_self",),
    card=Card(
        title="Refusal cliff",
        paper="Refusal Falls off a Cliff: How Safety Alignment Fails in Reasoning?",
        year=2025,
        idea="a probe of refusal swept over the reasoning, its fall at the last tokens, and the heads that write it",
        cost="one forward a text; layers·H·E·width for the scores",
        needs=("decoder-lm", "z"),
        lineage=("linear probes", "direct logit attribution"),
        caveat="released code fits the probe by a few epochs of Adam without a penalty; here it is the one optimum, of "
        "a small λ (bias left free). It reads the states after the final norm and projects heads without it, along one "
        "direction in all layers. It switches heads off at all tokens (`everywhere`; here at the last, where they are "
        "scored) and then stretches the layer's heads back to their norm over the whole batch, so that texts act on "
        "each other: not here. Its filter of answers that do not refuse lets nearly all through. Where the plateau "
        "lies is not fixed there: the caller marks it. Cliff-as-a-Judge (tuning on the texts of the largest cliff) is "
        "not here; of the paper, its abstract and code were read",
    ),
)
