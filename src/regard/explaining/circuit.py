"""How much of an answer a set of heads and MLPs carries: faithfulness over size, completeness, and controls.

    f(C) = (m(C) - m(none)) / (m(all) - m(none))       m(C): the clean prompt, all heads and MLPs outside C ablated

    CPR = area under f over the share of nodes in C    how much is recovered by few; of signed or absolute rankings
    CMD = area between f and 1                         how far the circuit is from the model; CPR + CMD >= 1

    completeness = 1 - f(all but C)                    1: nothing is left without the circuit

Ablated nodes get what they had on the corrupted prompt ("resample"), zero, or their mean over the clean prompts: the
numbers differ, so the ablation stands in the row. Controls are heads drawn from the same layers that exclude the
target, and changes of the same norm in random directions at the same heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.core import Edit, Site, require
from regard.explaining.effects import Effects, bootstrap
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.patching import in_groups, refuse_constant, split, texts_at_once
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
    without: Tensor  # [pairs, shares] m(all but C) - m(none)
    ablation: str
    signed: bool
    nodes: int

    @property
    def faithfulness(self) -> Tensor:
        return self.change.mean(0) / self.span.mean()

    @property
    def completeness(self) -> Tensor:
        return 1 - self.without.mean(0) / self.span.mean()

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
) -> Curve:
    """The curve of the nodes of a ranking (`nodes_of`), the best first: by effect if signed, else by its size."""
    require(ablation in ("resample", "zero", "mean"), "ablation is resample, zero or mean", ablation=ablation)
    ok = list(shares) == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    require(ok, "shares ascend from 0 to 1", shares=shares)
    pairs = pairs.to(model.device)
    order = [n for n, _ in sorted(ranking, key=lambda x: -x[1] if signed else -abs(x[1]))]
    kept = [set(order[: round(share * len(order))]) for share in shares]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    step = texts_at_once(pairs, batch)
    for group in in_groups(len(pairs), step):
        parts.append(curve_of(model, pairs.at(group), order, kept, ablation, step))
    change, without, span = (torch.cat(x).double().cpu() for x in zip(*parts, strict=True))
    refuse_constant(span)
    return Curve(tuple(shares), change, span, without, ablation, signed, len(order))


def curve_of(
    model: PreTrainedModel,
    pairs: Pairs,
    nodes: Sequence[Node],
    kept: Sequence[set[Node]],
    ablation: str,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(m(C) - m(none), m(all but C) - m(none) [B, shares], m(all) - m(none) [B]); `step` texts in a forward."""
    given = ablated(model, pairs, ablation)
    every = [*kept, *({*nodes} - k for k in kept), set(), {*nodes}]
    off = [[n for n in nodes if n not in circuit] for circuit in every]
    scores = variants(model, pairs, pairs.clean, [(nodes_off, given) for nodes_off in off], step)
    with_c, without = scores[:, : len(kept)], scores[:, len(kept) : 2 * len(kept)]
    none, all_of = scores[:, -2:].unbind(1)
    return with_c - none[:, None], without - none[:, None], all_of - none


def variants(
    model: PreTrainedModel, pairs: Pairs, base: Batch, off: Sequence[tuple[Sequence[Node], Values]], step: int
) -> Tensor:
    """[B, variants] the metric of the prompts `base` with each set of nodes replaced by what it is given."""
    found = []
    for some in split(list(range(len(off))), max(1, step // len(pairs))):
        edits = []
        for i, number in enumerate(some):
            texts = tuple(range(i * len(pairs), (i + 1) * len(pairs)))
            edits += ablating(*off[number], texts)
        logits, _ = forward(model, base.repeated(len(some)), edits)
        found.append(pairs.score(logits).view(len(some), -1))
    return torch.cat(found).T


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


def ablating(nodes: Sequence[Node], given: Values, texts: tuple[int, ...]) -> list[Edit]:
    """One edit a layer and quantity."""
    edits = []
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
    batch: int | None = None,
) -> Effects:
    """The exact effect of patching each set of heads at once, corrupted prompts given what they had on the clean ones.

    noise   z is changed by as much in a random direction instead, token by token: a control. Effects [pairs, set]
    """
    pairs, step = pairs.to(model.device), texts_at_once(pairs, batch)
    parts, spans = [], []
    for group in in_groups(len(pairs), step):
        part = pairs.at(group)
        clean_logits, clean = capture(model, part.clean, ["z"])
        base_logits, base = capture(model, part.corrupt, ["z"])
        given = {n: part.donor(x)[0] for n, x in clean["z"].items()}
        if noise is not None:
            drawn = {n: torch.randn(x.shape, generator=noise).to(x) for n, x in sorted(given.items())}
            given = {n: base["z"][n] + rescaled(drawn[n], x - base["z"][n]) for n, x in given.items()}
        nodes = [[Node("z", n, h) for n, h in heads] for heads in sets]
        before = part.score(base_logits)
        after = variants(model, part, part.corrupt, [(n, {"z": given}) for n in nodes], step)
        parts.append(after - before[:, None])
        spans.append(part.score(clean_logits) - before)
    values, span = torch.cat(parts).double().cpu(), torch.cat(spans).double().cpu()
    refuse_constant(span)
    settings = {"method": "patching together", "direction": "denoise"}
    exact = torch.ones(len(sets), dtype=torch.bool)
    return Effects(values, ("set",), {"set": range(len(sets))}, span, exact, settings)


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
    model: PreTrainedModel, pairs: Pairs, target: Heads, draws: int = 8, seed: int = 0
) -> Effects:
    """What changes of the same norm in random directions do at the heads of the target. Effects [pairs, draw]."""
    g = torch.Generator().manual_seed(seed)
    found = [together(model, pairs, [target], noise=g) for _ in range(draws)]
    values = torch.cat([f.values for f in found], 1)
    exact = torch.ones(draws, dtype=torch.bool)
    return replace(found[0], values=values, coords={"set": range(draws)}, exact=exact)
