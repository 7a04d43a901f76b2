"""Causal path explanation: the units that cause a class logit, found backwards by interventions along kept paths.

    h_l = f_l(h_{l-1}),  h_0 = x,  h_L = the logits;  S_L = {class}
    e_u = y(x) - y(x | do(u = 0) through S)        u in layer l: what leaves u passes through the kept units S_{l+1},
                                                   then S_{l+2}, ... alone; all others keep their clean values
    S_l = {u : mean e_u > 0,  mean e_u >= z · standard error,  mean e_u >= share · the layer's largest}

So a unit counts by what it does to the logit through units that are causes themselves, and the walk ends where no unit
of a layer is kept: nothing before it has a path any more. Edges u -> v are the same effect with v as the only way out
of u, and the saliency is the gradient of the logit by the input along kept units. Units are what dimension 1 counts:
neurons, or whole filters of a convolution.

>>> import torch
>>> first, second = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [-1.0, 1.0]])
>>> layers = [lambda h: (h @ first).relu(), lambda h: h @ second]  # logit 0 = 3 h_0 - h_1
>>> graph = measure(layers, torch.tensor([[2.0, 1.0], [2.0, 5.0]]), 0)
>>> graph.effects[0].tolist(), graph.kept[0].tolist()  # without h_0 it falls by 3 · 2, without h_1 it grows
([[6.0, -1.0], [6.0, -5.0]], [True, False])
>>> graph.saliency[0].tolist()  # of 3 h_0 alone
[3.0, 0.0]
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.tracing import TracingPage

Layers = Sequence[Callable[[Tensor], Tensor]]
Each = Sequence[Tensor]  # a tensor for each of h_0 to h_L


@dataclass(frozen=True)
class Config:
    z: float = 2.0  # standard errors above 0 from which on a mean effect is significant
    share: float = 0.1  # of the layer's largest mean effect, from which on a unit is kept

    def __post_init__(self) -> None:
        require(self.z >= 0, "z >= 0", z=self.z)
        require(0 <= self.share <= 1, "0 <= share <= 1", share=self.share)


@dataclass(frozen=True)
class Graph:
    """Of layers 1 to L - 1: effects [B, U] by example, kept [U], edges [U, U of the next layer]; saliency as x.

    edges are mean effects, 0 where either end is not kept; the last ones lead to the logits [U, C].
    """

    effects: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    edges: tuple[Tensor, ...]
    saliency: Tensor


def states(layers: Layers, x: Tensor) -> list[Tensor]:
    """h_0 to h_L."""
    return list(accumulate(layers, lambda h, layer: layer(h), initial=x))


def channels(kept: Tensor, like: Tensor) -> Tensor:
    """Booleans [U] in the place of dimension 1."""
    return kept.view(1, -1, *[1] * (like.dim() - 2))


def through(layers: Layers, clean: Each, changed: Tensor, at: int, kept: Each) -> Tensor:
    """The last state [N, C] when h_at is `changed` [N, U, ...], N a multiple of B, and only kept [l] pass it on."""
    for n in range(at, len(layers)):
        out = layers[n](changed)
        still = clean[n + 1].repeat(len(out) // len(clean[0]), *[1] * (out.dim() - 1))
        changed = torch.where(channels(kept[n + 1], out), out, still)
    return changed


def without_each(h: Tensor, units: Tensor) -> Tensor:
    """[units · B, U, ...]: the state as often as there are units, each time with one of them at zero."""
    off = F.one_hot(units, h.shape[1]).bool()  # [units, U]
    off = off[:, None].unflatten(-1, (-1, *[1] * (h.dim() - 2)))
    return h.masked_fill(off, 0).flatten(0, 1)


def path_effects(layers: Layers, clean: Each, at: int, label: int, kept: Each, units: Tensor) -> Tensor:
    """[B, units] by how much the logit falls when a unit of h_at is zero; kept [U] of every layer."""
    logits = through(layers, clean, without_each(clean[at], units), at, kept)
    return clean[-1][:, label, None] - logits[:, label].view(len(units), -1).T


def significant(effects: Tensor, cfg: Config) -> Tensor:
    """[U] of effects [B, U]."""
    mean = effects.mean(0)
    error = effects.std(0) / len(effects) ** 0.5
    return (mean > 0) & (mean >= cfg.z * error) & (mean >= cfg.share * mean.max())


@torch.no_grad()
def measure(layers: Layers, x: Tensor, label: int, cfg: Config | None = None) -> Graph:
    """The graph of one class. layers take [N, ...] and give [N, U, ...], the last one logits; x [B, ...], B >= 2."""
    require(len(x) >= 2 and len(layers) >= 2, "two examples and two layers, or more", x=x, layers=len(layers))
    cfg = cfg or Config()
    clean = states(layers, x)
    require(0 <= label < clean[-1].shape[1], "a class of the logits", label=label, logits=clean[-1])
    units, effects, edges = [torch.arange(h.shape[1], device=x.device) for h in clean], [], []
    kept = [u == label if h is clean[-1] else u < 0 for u, h in zip(units, clean, strict=True)]
    for at in range(len(layers) - 1, 0, -1):
        effects.insert(0, path_effects(layers, clean, at, label, kept, units[at]))
        kept[at] = significant(effects[0], cfg)
        edges.insert(0, edges_of(layers, clean, at, label, kept))
    return Graph(tuple(effects), tuple(kept[1:-1]), tuple(edges), saliency(layers, clean, label, kept))


def edges_of(layers: Layers, clean: Each, at: int, label: int, kept: Each) -> Tensor:
    """[U, U'] mean effects of kept units through one kept unit of the next layer each."""
    found = clean[-1].new_zeros(len(kept[at]), len(kept[at + 1]))
    units, only = kept[at].nonzero().flatten(), list(kept)
    for v in kept[at + 1].nonzero().flatten().tolist() if len(units) else ():
        only[at + 1] = torch.arange(found.shape[1], device=found.device) == v
        found[units, v] = path_effects(layers, clean, at, label, only, units).mean(0)
    return found


def saliency(layers: Layers, clean: Each, label: int, kept: Each) -> Tensor:
    """As x: the gradient of the logit by the input where units that are not kept are constants."""
    with torch.enable_grad():
        x = h = clean[0].detach().requires_grad_()
        for layer, keep in zip(layers, kept[1:], strict=True):
            out = layer(h)
            h = torch.where(channels(keep, out), out, out.detach())
        return torch.autograd.grad(h[:, label].sum(), x)[0]


@dataclass
class Plain:
    """The definition, one example and one unit at a time."""

    layers: Layers
    clean: list[Tensor]  # h_0 to h_L
    label: int
    cfg: Config
    keep: dict[int, set[int]]  # of each layer that has been walked through

    def logit(self, b: int, at: int, h: Tensor, only: set[int] | None = None) -> float:
        """Of example b when h_at is h and kept units (of the next layer these) pass it on."""
        for n in range(at + 1, len(self.clean)):
            out, h = self.layers[n - 1](h[None])[0], self.clean[n][b].clone()
            for u in self.keep[n] if only is None or n > at + 1 else only:
                h[u] = out[u]
        return float(h[self.label])

    def effects(self, at: int, u: int, only: set[int] | None = None) -> list[float]:
        """By example."""
        off = [row.index_fill(0, torch.tensor(u), 0) for row in self.clean[at]]
        logits = [float(row[self.label]) for row in self.clean[-1]]
        return [y - self.logit(b, at, h, only) for b, (y, h) in enumerate(zip(logits, off, strict=True))]

    def chosen(self, table: list[list[float]]) -> set[int]:
        """The units of effects by unit and example that are kept."""
        means, n = [fmean(row) for row in table], len(table[0])
        least = [max(self.cfg.z * stdev(row) / n**0.5, self.cfg.share * max(means)) for row in table]
        return {u for u, mean in enumerate(means) if mean > 0 and mean >= least[u]}

    def slope(self, b: int, i: int, step: float = 3e-5) -> float:
        """Of the logit by one number of the input, by central differences of two widths."""
        nudge = torch.zeros_like(self.clean[0][b])
        nudge.view(-1)[i] = step
        one, two, back, far = (self.logit(b, 0, self.clean[0][b] + k * nudge) for k in (1, 2, -1, -2))
        return (8 * (one - back) - (two - far)) / (12 * step)


def reference(layers: Layers, x: Tensor, label: int, cfg: Config | None = None) -> Graph:
    """The walk by the definition, each intervention by itself."""
    clean, effects, kept, edges = [*accumulate(layers, lambda h, f: f(h), initial=x.double())], [], [], []
    plain = Plain(layers, clean, label, cfg or Config(), {len(layers): {label}})
    for at in reversed(range(1, len(layers))):
        table = [plain.effects(at, u) for u in range(clean[at].shape[1])]
        plain.keep[at] = plain.chosen(table)
        effects.insert(0, torch.tensor(table, dtype=torch.float64).T)
        kept.insert(0, torch.tensor([u in plain.keep[at] for u in range(len(table))]))
        edges.insert(0, torch.zeros(len(table), clean[at + 1].shape[1], dtype=torch.float64))
        for u, v in product(plain.keep[at], plain.keep[at + 1]):
            edges[0][u, v] = fmean(plain.effects(at, u, {v}))
    slopes = [[plain.slope(b, i) for i in range(row.numel())] for b, row in enumerate(x)]
    return Graph(tuple(effects), tuple(kept), tuple(edges), x.new_tensor(slopes).double().view_as(x))


def cases(seed: int) -> Iterable[tuple]:
    """Dense layers, bent and straight, one unit wide; filters with places; twin units; a walk that ends at once."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def dense(*widths: int, bend: Callable[[Tensor], Tensor] = torch.relu) -> Layers:
        weights = [random(a, b) for a, b in pairwise(widths)]
        last = weights[-1] + 0.5  # most units speak for a class
        return [*(lambda h, w=w: bend(h @ w) for w in weights[:-1]), lambda h: h @ last]

    def top(layers: Layers, x: Tensor, *cfg: Config) -> tuple:
        return layers, x, int(states(layers, x)[-1].mean(0).argmax()), *cfg

    start = random(1, 4)  # examples that are alike, so that effects are significant
    yield top(dense(4, 7, 2), start + 0.1 * random(2, 4))
    yield top(dense(4, 6, 7, 5, 3), start + 0.3 * random(6, 4), Config(z=1.0, share=0.2))
    yield top(dense(4, 6, 5, 1, 3, bend=torch.tanh), start + 0.3 * random(9, 4), Config(z=0.0, share=0.0))
    yield [lambda h: h, lambda h: -h.square().sum(1, keepdim=True)], random(3, 2), 0
    filters, twice = random(3, 2, 2, 2), torch.tensor([0, 1, 2, 2])
    convolve = [lambda h: F.conv2d(h, filters).relu()[:, twice], lambda h: h.mean((2, 3)), *dense(4, 5, 3)]
    images = random(1, 2, 4, 3) + 0.3 * random(5, 2, 4, 3)
    yield from (top(convolve, images, Config(1.0, share)) for share in (0.0, 0.3))


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="Causal path explanation",
        paper="Causal Analysis for Robust Interpretability of Neural Networks",
        year=2023,
        idea="walk back from a class logit, intervene on each unit along paths of units already kept, keep what counts",
        cost="a forward for each unit and example, and one for each edge",
        needs=("the network as a list of layers",),
        lineage=("path patching",),
        caveat="no code was found, and of the paper only its abstract was read. Ours are the measure of an effect "
        "(mean fall of the logit, over examples), zero for a unit that is intervened on, significance (standard "
        "errors, and a share of the layer's largest), that only causes in favour of the class are kept, and the rule "
        "that the walk ends where a layer keeps none. Layers must form a chain: a residual connection has to lie "
        "within one of them",
    ),
)
