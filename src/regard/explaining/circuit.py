"""How much of an answer a set of heads and MLPs carries: faithfulness over size, completeness, and controls.

    f(C) = (m(C) - m(none)) / (m(all) - m(none))       m(C): the clean prompt, all heads and MLPs outside C ablated

    CPR = area under f over the share of nodes in C    how much is recovered by few; of signed or absolute rankings
    CMD = area between f and 1                         how far the circuit is from the model; CPR + CMD >= 1

    completeness = 1 - f(all but C)                    1: nothing is left without the circuit

Ablated nodes get what they had on the corrupted prompt ("resample"), zero, or their mean over the clean prompts: the
numbers differ, so the ablation stands in the row. Controls are heads drawn from the same layers that exclude the
target, and changes of the same norm in random directions at the same heads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.core import Edit, Site, require
from regard.explaining.batches import Begun, Progress, by_cell, texts_of
from regard.explaining.effects import Effects, bootstrap
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.paths import Node
from regard.explaining.runs import Values, capture, forward, heads_at

Ablation = Literal["resample", "zero", "mean"]
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Curve:
    """Faithfulness over the share of nodes that are kept: by pair [pairs, shares], with what was ablated and how."""

    shares: tuple[float, ...]
    change: Tensor  # [pairs, shares] m(C) - m(none)
    span: Tensor  # [pairs] m(all) - m(none)
    rest: Tensor  # [pairs, shares] m(all but C) - m(none)
    ablation: str
    signed: bool
    nodes: int

    @property
    def faithfulness(self) -> Tensor:
        return self.change.mean(0) / self.span.mean()

    @property
    def completeness(self) -> Tensor:
        return 1 - self.rest.mean(0) / self.span.mean()

    @property
    def cpr(self) -> float:
        return area(self.shares, self.faithfulness)

    @property
    def cmd(self) -> float:
        return area(self.shares, (1 - self.faithfulness).abs())

    def to_dict(self) -> dict[str, Any]:
        low, high = bootstrap(self.change, self.span)
        bounds = [None if torch.isnan(x).any() else x.tolist() for x in (low, high)]
        return {
            "share": list(self.shares), "mean": self.faithfulness.tolist(), "low": bounds[0], "high": bounds[1],
            "completeness": self.completeness.tolist(), "cpr": self.cpr, "cmd": self.cmd,
            "ablation": self.ablation, "signed": self.signed, "nodes": self.nodes,
        }  # fmt: skip


def area(x: Sequence[float], y: Tensor) -> float:
    """By trapezoids."""
    return float(torch.trapezoid(y.double(), torch.tensor(x, dtype=torch.float64)))


def nodes_of(effects: dict[str, Effects]) -> list[tuple[Node, float]]:
    """Heads ("z") and MLPs with their mean effects."""
    found = [(Node("z", *c), v) for c, v in by_site(effects["z"])]
    return found + [(Node("mlp", *c), v) for c, v in by_site(effects["mlp"])] if "mlp" in effects else found


def by_site(effects: Effects) -> list[tuple[tuple, float]]:
    mean = effects.mean.flatten().tolist()
    return [(effects.coordinates(i), v) for i, v in enumerate(mean)]


@torch.no_grad()
def faithfulness(
    model: PreTrainedModel,
    pairs: Pairs,
    ranking: Sequence[tuple[Node, float]],
    *,
    shares: Sequence[float] = SHARES,
    ablation: Ablation = "resample",
    signed: bool = True,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Curve:
    """The curve of the nodes of a ranking (`nodes_of`), the best first: by effect if signed, else by its size."""
    require(ablation in ("resample", "zero", "mean"), "ablation is resample, zero or mean", ablation=ablation)
    ok = list(shares) == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    require(ok, "shares ascend from 0 to 1", shares=shares)
    require(len(ranking) > 0, "a ranking has a node", nodes=0)
    pairs = pairs.to(model.device)
    order = [n for n, _ in sorted(ranking, key=lambda x: -x[1] if signed else -abs(x[1]))]
    kept = [frozenset(order[: round(share * len(order))]) for share in shares]
    nobody, all_of = frozenset[Node](), frozenset(order)
    # what several shares come to is asked once
    circuits = list(dict.fromkeys([nobody, all_of, *kept, *(all_of - k for k in kept)]))

    def begin(part: Pairs, group: list[int]) -> Begun:
        given = ablated(model, part, ablation)

        def ask(some: list[int]) -> Tensor:
            return without(model, part, part.clean, [(all_of - circuits[i], given) for i in some])

        none = ask([0])
        return (ask([1]) - none)[:, 0], lambda some: ask([2 + i for i in some]) - none

    found, span = by_cell(pairs, len(circuits) - 2, begin, batch=batch, progress=progress)
    found = torch.cat([torch.zeros_like(span)[:, None], span[:, None], found], 1)
    change = found[:, [circuits.index(k) for k in kept]]
    rest = found[:, [circuits.index(all_of - k) for k in kept]]
    return Curve(tuple(shares), change, span, rest, ablation, signed, len(order))


def without(
    model: PreTrainedModel, pairs: Pairs, base: Batch, off: Sequence[tuple[Iterable[Node], Values]]
) -> Tensor:
    """[B, sets] the metric of the prompts `base` with each set of nodes replaced, in one forward."""
    edits = [
        e for i, (nodes, given) in enumerate(off) for e in ablating(nodes, given, texts_of(i, len(pairs)))
    ]
    logits, _ = forward(model, base.repeated(len(off)), edits)
    return pairs.score(logits).view(len(off), -1).T


def ablated(model: PreTrainedModel, pairs: Pairs, ablation: str) -> Values:
    """What ablated heads and MLPs are given."""
    source = pairs.corrupt if ablation == "resample" else pairs.clean
    _, values = capture(model, source, ("z", "mlp"))
    if ablation == "resample":
        return values
    if ablation == "zero":
        return {q: {n: torch.zeros_like(x) for n, x in by_layer.items()} for q, by_layer in values.items()}
    real = pairs.clean.mask[:, None, :, None].to(pairs.clean.ids.device)
    mean = lambda x: ((x * real).sum((0, 2), keepdim=True) / real.sum()).expand_as(x)  # noqa: E731
    return {q: {n: mean(x) for n, x in by_layer.items()} for q, by_layer in values.items()}


def ablating(nodes: Iterable[Node], given: Values, texts: tuple[int, ...]) -> list[Edit]:
    """One edit a layer and quantity."""
    edits, nodes = [], list(nodes)
    for layer in sorted({n.layer for n in nodes if n.quantity == "z"}):
        heads = tuple(sorted(n.head for n in nodes if n.quantity == "z" and n.layer == layer))  # type: ignore[type-var]
        site = Site("z", layers=layer, heads=heads, tower="text", texts=texts)
        edits.append(Edit(site, "replace", given["z"][layer][:, list(heads)]))  # type: ignore[arg-type]
    for layer in sorted({n.layer for n in nodes if n.quantity == "mlp"}):
        site = Site("mlp", layers=layer, tower="text", texts=texts)
        edits.append(Edit(site, "replace", given["mlp"][layer][:, 0]))
    return edits


# what a set of heads does together, beside its controls

Heads = Sequence[tuple[int, int]]


@torch.no_grad()
def together(
    model: PreTrainedModel,
    pairs: Pairs,
    sets: Sequence[Heads],
    *,
    noise: torch.Generator | None = None,
    draws: int = 1,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """The exact effect of patching each set of heads at once, corrupted prompts given what they had on the clean ones.

    noise   z is changed by as much in random directions instead, token by token: a control, so many draws of each set

    Effects [pairs, set], with noise [pairs, draws x sets].
    """
    pairs, layers = pairs.to(model.device), sorted({n for heads in sets for n, _ in heads})
    cells = [(draw, i) for draw in range(draws) for i in range(len(sets))]

    def begin(part: Pairs, group: list[int]) -> Begun:
        clean_logits, clean = capture(model, part.clean, ["z"], layers)
        base_logits, base = capture(model, part.corrupt, ["z"], layers)
        given = {n: part.donor(x)[0] for n, x in clean["z"].items()}
        drawn = [given if noise is None else shaken(base["z"], given, noise) for _ in range(draws)]
        before = part.score(base_logits)

        def ask(some: list[int]) -> Tensor:
            off = [
                ([Node("z", *h) for h in sets[i]], {"z": drawn[draw]})
                for draw, i in map(cells.__getitem__, some)
            ]
            return without(model, part, part.corrupt, off) - before[:, None]

        return part.score(clean_logits) - before, ask

    values, span = by_cell(pairs, len(cells), begin, batch=batch, progress=progress)
    settings = {"method": "patching together", "direction": "denoise"}
    exact = torch.ones(len(cells), dtype=torch.bool)
    return Effects(values, ("set",), {"set": range(len(cells))}, span, exact, settings)


def shaken(base: dict[int, Tensor], given: dict[int, Tensor], noise: torch.Generator) -> dict[int, Tensor]:
    """By layer what was there, changed by as much as what is given, in a random direction."""
    drawn = {n: torch.randn(x.shape, generator=noise).to(x) for n, x in sorted(given.items())}
    return {n: base[n] + rescaled(drawn[n], x - base[n]) for n, x in given.items()}


def rescaled(x: Tensor, like: Tensor) -> Tensor:
    """x with the norm of `like`, vector by vector."""
    return x * (like.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp(min=1e-12))


def random_heads(model: PreTrainedModel, target: Heads, draws: int = 20, seed: int = 0) -> list[Heads]:
    """Sets with as many heads of each layer as the target has, none of the target's; fewer where a layer is full."""
    g = torch.Generator().manual_seed(seed)
    count, chosen = heads_at("z", model), {*map(tuple, target)}
    sets: list[Heads] = []
    for _ in range(draws):
        drawn: list[tuple[int, int]] = []
        for layer in sorted({n for n, _ in chosen}):
            free = [h for h in range(count) if (layer, h) not in chosen]
            wanted = min(len(free), sum(n == layer for n, _ in chosen))
            drawn += [(layer, free[i]) for i in torch.randperm(len(free), generator=g)[:wanted].tolist()]
        sets.append(drawn)
    rule = "a layer with heads beside the target, from which a control is drawn"
    require(all(sets), rule, target=[*target], heads=count)
    return sets


def random_directions(
    model: PreTrainedModel,
    pairs: Pairs,
    target: Heads,
    draws: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Effects:
    """What changes of the same norm in random directions do at the heads of the target. Effects [pairs, draw]."""
    g = torch.Generator().manual_seed(seed)
    return together(model, pairs, [target], noise=g, draws=draws, progress=progress)
