"""FCCT and IRI: which layers' outputs restore the answer of a corrupted run, and those outputs put in again later.

    RR_l = (p(patched at l) - p(corrupt)) / (p(clean) - p(corrupt))        p: probability of the right answer
    ã_l = a_l + λ Σ_{k < l, k a source} RR_k a_k,  then  ã_l ← ã_l · |a_l| / |ã_l|        l a target

A site (layer, component, tokens) of the corrupted run gets what it had in the clean run; RR_l is the share of the
answer that this brings back. p are means over the pairs, numerator and denominator apart, so that pairs which hardly
differ do not count most. Sources are the 3 and targets the 10 layers of highest RR at the last token, for attention's
output and the FFN's separately; λ is 0.26 and 0.16 on LLaVA-1.5.

>>> import torch
>>> clean, corrupt = torch.tensor([0.9, 0.7]), torch.tensor([0.1, 0.3])  # mean span 0.6
>>> patched = torch.tensor([[0.7, 0.1], [0.3, 0.3]])  # layer 0 brings back 0.3 of 0.6
>>> outputs = torch.tensor([[[4.0, 0.0]], [[0.0, 1.0]]])  # [L, B, width]
>>> found = measure(clean, corrupt, patched, outputs, Config(sources=1, targets=2, strength=0.5))
>>> found.sources, found.targets, [round(r, 4) for r in found.recovery.tolist()]
((0,), (0, 1), [0.5, 0.0])
>>> found.outputs[1, 0]  # (0, 1) + 0.5 · 0.5 · (4, 0) = (1, 1), as long as (0, 1)
tensor([0.7071, 0.7071])
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, Edit, Site, require
from regard.kinds.tracing import TracingPage

COMPONENTS = ("out", "mlp")


@dataclass(frozen=True)
class Config:
    sources: int = 3  # layers of highest recovery that are put in again; all, where a model has fewer
    targets: int = 10  # layers of highest recovery that take them
    strength: float = 0.26  # λ; the paper's for attention's outputs, of FFNs 0.16

    def __post_init__(self) -> None:
        require(self.sources >= 1, "a source or more", sources=self.sources)
        require(self.targets >= 1, "a target or more", targets=self.targets)
        require(self.strength >= 0, "strength >= 0", strength=self.strength)


@dataclass(frozen=True)
class Injection:
    """recovery [L]; source and target layers, ascending; outputs [L, B, width], those of targets changed."""

    recovery: Tensor
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    outputs: Tensor


def recovery(clean: Tensor, corrupt: Tensor, patched: Tensor) -> Tensor:
    """[*sites] of the probabilities clean, corrupt [P] and patched [P, *sites] of P pairs."""
    ok = clean.shape == corrupt.shape == patched.shape[:1] and len(clean) > 0
    shapes = (tuple(clean.shape), tuple(corrupt.shape), tuple(patched.shape))
    require(ok, "a clean, a corrupted and the patched probabilities of each pair", shapes=shapes)
    span = clean.mean() - corrupt.mean()
    require(bool(span.abs() > 1e-6), "the corruption moves the mean probability", moved=float(span))
    return (patched.mean(0) - corrupt.mean()) / span


def best(rates: Tensor, count: int) -> tuple[int, ...]:
    """The layers of the highest rates, of equal ones the earlier; ascending."""
    return tuple(sorted(rates.argsort(descending=True, stable=True)[:count].tolist()))


def injected(own: Tensor, earlier: Tensor, rates: Tensor, strength: float) -> Tensor:
    """[B, width] a target's own output [B, width] with those of earlier sources [S, B, width] at their rates [S]."""
    mixed = own + strength * torch.einsum("s,sbw->bw", rates.to(own.dtype), earlier)
    long = mixed.norm(dim=-1, keepdim=True)
    # a sum of exactly zero has no direction and stays zero
    return mixed * (own.norm(dim=-1, keepdim=True) / long.where(long > 0, 1))


def measure(
    clean: Tensor, corrupt: Tensor, patched: Tensor, outputs: Tensor, cfg: Config | None = None
) -> Injection:
    """Recovery of each layer of one component, and its outputs at the last token after injection.

    clean, corrupt [P] and patched [P, L] probabilities of pairs; outputs [L, B, width] of other texts.
    """
    cfg, rates = cfg or Config(), recovery(clean, corrupt, patched)
    ok = rates.dim() == 1 and outputs.dim() == 3 and len(outputs) == len(rates)
    require(ok, "outputs [L, B, width] of as many layers", outputs=tuple(outputs.shape), rates=rates.shape)
    sources, targets = best(rates, cfg.sources), best(rates, cfg.targets)
    changed = outputs.clone()
    for layer in targets:
        before = [k for k in sources if k < layer]
        changed[layer] = injected(outputs[layer], outputs[before], rates[before], cfg.strength)
    return Injection(rates, sources, targets, changed)


def edits(found: Injection, component: str = "out", phase: str = "prefill") -> tuple[Edit, ...]:
    """What puts the injected outputs at the last token of each target that has a source before it."""
    require(component in COMPONENTS, f"component is one of {COMPONENTS}", component=component)
    where: dict[str, Any] = dict(rows=-1, phase=phase, tower="text")
    taking = [layer for layer in found.targets if found.sources[0] < layer]
    return tuple(
        Edit(Site(component, layers=n, **where), "replace", found.outputs[n][:, None]) for n in taking
    )


def reference(
    clean: Tensor, corrupt: Tensor, patched: Tensor, outputs: Tensor, cfg: Config | None = None
) -> Injection:
    """By the definition: sums over pairs, the best layer taken out one by one, vectors number by number."""
    cfg, (p, c) = cfg or Config(), (clean.tolist(), corrupt.tolist())
    total = math.fsum(a - b for a, b in zip(p, c, strict=True))
    rates = [math.fsum(x - b for x, b in zip(layer, c, strict=True)) / total for layer in patched.T.tolist()]
    given, result = outputs.tolist(), outputs.double().tolist()
    sources, targets = (highest(rates, count) for count in (cfg.sources, cfg.targets))
    for layer in targets:
        for b, own in enumerate(given[layer]):
            mixed = list(own)
            for k in (k for k in sources if k < layer):
                mixed = [m + cfg.strength * rates[k] * x for m, x in zip(mixed, given[k][b], strict=True)]
            size = math.hypot(*mixed)
            result[layer][b] = [m * math.hypot(*own) / size if size else 0.0 for m in mixed]
    wide = torch.float64
    return Injection(torch.tensor(rates, dtype=wide), sources, targets, torch.tensor(result, dtype=wide))


def highest(rates: Sequence[float], count: int) -> tuple[int, ...]:
    left, taken = list(range(len(rates))), []
    while left and len(taken) < count:
        taken.append(max(left, key=lambda layer: rates[layer]))  # the first of equal ones
        left.remove(taken[-1])
    return tuple(sorted(taken))


def cases(seed: int) -> Iterable[tuple]:
    """Pairs that differ much and hardly; layers fewer than asked for, in ties, below zero; a zero output; λ = 0."""
    g = torch.Generator().manual_seed(seed)

    def drawn(pairs: int, layers: int, batch: int, width: int, dtype: torch.dtype = torch.float64) -> list:
        clean = 0.5 + torch.rand(pairs, generator=g, dtype=dtype) / 2
        corrupt, patched = (torch.rand(*s, generator=g, dtype=dtype) / 2 for s in ((pairs,), (pairs, layers)))
        return [clean, corrupt, 1.6 * patched, torch.randn(layers, batch, width, generator=g, dtype=dtype)]

    yield *drawn(7, 16, 3, 5), Config(strength=2.0)
    yield *drawn(5, 4, 2, 3, torch.float32), Config(sources=2, targets=2)
    yield tuple(drawn(1, 1, 1, 1))
    yield *drawn(3, 6, 2, 4), Config(strength=0.0)
    clean, corrupt, patched, outputs = drawn(4, 6, 2, 3)
    yield clean, corrupt, patched[:, [0, 1, 0, 1, 0, 1]], outputs, Config(sources=2, targets=3)
    outputs[3, 0] = 0
    yield clean, corrupt, patched - 0.5, outputs, Config(sources=6, targets=6, strength=1.0)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="FCCT and IRI",
        paper="Causal Tracing of Object Representations in Large Vision Language Models: Mechanistic Interpretability "
        "and Hallucination Mitigation",
        year=2025,
        idea="patch one component at one layer into a corrupted run; put what restores most in again at later layers",
        cost="a forward for each pair and site; injecting adds nothing to a forward",
        needs=("decoder-lm", "clean and corrupted prompts"),
        lineage=("causal tracing",),
        neutral={"strength": 0.0},
        caveat="no code was found: λ, the numbers of sources and targets and the scaling are those of the paper's "
        "text. A source gives what its sublayer put out, not what it was changed to, where it is a target as well; "
        "outputs are of one run without changes, where the paper changes as it goes, so that later outputs answer "
        "to earlier changes. Rates may be negative, and then subtract. The paper corrupts images by noise and looks "
        "at seven groups of tokens; groups are the caller's, and those of the claim on pictures",
    ),
)
