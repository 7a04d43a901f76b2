"""Attribution patching: the effect of every site at once, from one forward on each prompt and one backward.

    effect(s) ≈ (a_s(clean) - a_s(corrupt)) · ∂m/∂a_s            at the corrupted prompt; exact where m is linear

With `steps` gradients are averaged along the line between the embeddings of both prompts (integrated gradients). An
attention that is saturated hides what its query or key would do: the gradient through its softmax vanishes. With
`qk=True` the softmax is not linearised (AtP*): z is computed with the clean query, and only what follows is linear,

    effect(q) ≈ (z(q clean, k, v) - z) · ∂m/∂z

which needs the fused kernel once more for each layer and no matrix of N x N. Effects are added up as gradients arrive,
so that of the backward pass nothing is held beyond what it holds itself.

AtP*: An efficient and scalable method for localizing LLM behaviour to components, 2024.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.core import Observer, Site, require
from regard.core.edit import HEADED
from regard.explaining.batches import Progress, in_groups, refuse_constant, texts_at_once
from regard.explaining.effects import Effects
from regard.explaining.grid import grid_of
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.patching import Direction, patch
from regard.explaining.runs import Values, by_head, capture, embedded, embeddings, forward, frozen, observers
from regard.ops.machine import trim_memory

Sums = dict[str, dict[int, Tensor]]  # quantity -> layer -> [B, H, N]


def attribute(
    model: PreTrainedModel,
    pairs: Pairs,
    quantities: Sequence[str] = ("z", "mlp"),
    *,
    steps: int = 0,
    qk: bool = False,
    by_token: bool = False,
    direction: Direction = "denoise",
    batch: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Effects]:
    """The estimated effect of every site of these quantities, by quantity; `exact` is False everywhere.

    steps      points of integrated gradients between the embeddings of both prompts; 0: the gradient at the run itself
    qk         queries and keys without the linearised softmax; only for "q" and "k"
    by_token   tokens are an axis, counted from the end of each prompt (-1 the last); all prompts are equally long

    Raises as `patch` does.
    """
    require(steps >= 0, "steps of integrated gradients, or 0", steps=steps)
    sign = 1.0
    if direction == "noise":
        pairs, sign = pairs.swapped(), -1.0
    pairs = pairs.to(model.device)
    if by_token:
        lengths = sorted({*pairs.corrupt.lengths.tolist()})
        require(len(lengths) == 1, "effects by token are of prompts that are equally long", tokens=lengths)
    parts: dict[str, list[Tensor]] = {q: [] for q in quantities}
    spans = []
    groups = in_groups(len(pairs), texts_at_once(pairs, batch))
    for done, group in enumerate(groups):
        span, sums = attributed(model, pairs.at(group), quantities, steps, qk)
        spans.append(span)
        for q in quantities:
            found = torch.stack([sums[q][layer] for layer in sorted(sums[q])], 1)  # [B, layers, H, N]
            parts[q].append(found if by_token else found.sum(-1))
        trim_memory()
        if progress is not None:
            progress(done + 1, len(groups))
    span = torch.cat(spans) * sign
    refuse_constant(span)
    how = {"direction": direction, "method": "attribution", "steps": steps, "qk": qk}
    return {q: gathered(model, q, torch.cat(parts[q]).double().cpu() * sign, span, how) for q in quantities}


def gathered(model: PreTrainedModel, quantity: str, x: Tensor, span: Tensor, how: dict) -> Effects:
    """Effects from sums [pairs, layers, H, (tokens)]."""
    grid = grid_of(model, quantity)
    x = x if quantity in HEADED else x[:, :, 0]
    by_token = x.dim() > 1 + len(grid.dims)
    dims, coords = grid.dims, dict(grid.coords)
    if by_token:
        dims, coords = (*dims, "token"), {**coords, "token": range(-x.shape[-1], 0)}
    exact = torch.zeros(x.shape[1:], dtype=torch.bool)
    return Effects(x, dims, coords, span, exact, {"quantity": quantity, **how})


def attributed(
    model: PreTrainedModel, pairs: Pairs, quantities: Sequence[str], steps: int, qk: bool
) -> tuple[Tensor, Sums]:
    """([B] clean - corrupt, the sums) of one group of pairs."""
    corrected = [q for q in quantities if qk and q in ("q", "k")]
    logits, donors = capture(model, pairs.clean, quantities)
    usable = None
    for q in quantities:
        for layer, x in donors[q].items():
            donors[q][layer], usable = pairs.donor(x)
    clean = pairs.score(logits)
    base = capture(model, pairs.corrupt, quantities)[1] if steps else None
    total: Sums = {q: {} for q in quantities}
    corrupt = None
    for given, weight in line_between(model, pairs, steps):
        backward = Backward(pairs, donors, base, weight, corrected, total)
        scores = backward.run(model, pairs.corrupt, given, quantities)
        corrupt = scores if given is None else corrupt
    if corrupt is None:
        corrupt = pairs.score(forward_only(model, pairs.corrupt))
    if usable is not None:
        total = {q: {n: x * usable[:, None] for n, x in by_layer.items()} for q, by_layer in total.items()}
    return (clean - corrupt).double().cpu(), total


def line_between(model: PreTrainedModel, pairs: Pairs, steps: int) -> list[tuple[Tensor | None, float]]:
    """Embeddings at the middle of each of `steps` parts of the way from the corrupted to the clean prompt, and weights.

    Without steps the corrupted prompt itself: None.
    """
    if not steps:
        return [(None, 1.0)]
    start, end = (embeddings(model, b) for b in (pairs.corrupt, pairs.clean))
    require(start.shape == end.shape, "integrated gradients run between prompts of one length")
    return [(start + (i + 0.5) / steps * (end - start), 1 / steps) for i in range(steps)]


@torch.no_grad()
def forward_only(model: PreTrainedModel, batch: Batch) -> Tensor:
    return forward(model, batch)[0]


@dataclass
class Backward:
    """One forward and backward: `total` grows by (donor - value) · gradient, summed over widths, as gradients come."""

    pairs: Pairs
    donors: Values
    base: Values | None  # values of the corrupted prompt, where the run is elsewhere on the line
    weight: float
    corrected: Sequence[str]
    total: Sums

    def run(
        self, model: PreTrainedModel, batch: Batch, given: Tensor | None, quantities: Sequence[str]
    ) -> Tensor:
        """[B] the metric, detached."""
        linear = [q for q in quantities if q not in self.corrected]
        live = [*linear, *(["z"] if self.corrected and "z" not in linear else [])]
        ifs = [
            Observer("z_if", Site(q, layers=layer, tower="text"), name=f"if {q} {layer}", given=x)
            for q in self.corrected
            for layer, x in self.donors[q].items()
        ]
        with torch.enable_grad(), frozen(model), embedded(model, given) as leaf:
            logits, attached = forward(model, batch, [*observers(live, live=True), *ifs])
            for q in linear:
                for layer, _, x in attached.records[q]:
                    x.register_hook(self.linear(q, layer, by_head(q, x.detach())))
            for q in self.corrected:
                for layer, _, z in attached.records["z"]:
                    ((_, _, other),) = attached.records[f"if {q} {layer}"]
                    z.register_hook(self.beyond(q, layer, other - z.detach()))
            scores = self.pairs.score(logits)
            scores.sum().backward(inputs=leaf)
        return scores.detach()

    def linear(self, q: str, layer: int, x: Tensor) -> Callable[[Tensor], None]:
        old = x if self.base is None else self.base[q][layer]

        def hook(gradient: Tensor) -> None:
            change = self.donors[q][layer] - old
            self.add(q, layer, torch.einsum("bhne,bhne->bhn", change, by_head(q, gradient)))

        return hook

    def beyond(self, q: str, layer: int, change: Tensor) -> Callable[[Tensor], None]:
        """The effect of a query or a key through the z that it makes; keys of a group of heads together."""

        def hook(gradient: Tensor) -> None:
            effect = torch.einsum("bhne,bhne->bhn", change, gradient)
            heads = self.donors[q][layer].shape[1]
            self.add(q, layer, effect.unflatten(1, (heads, -1)).sum(2))

        return hook

    def add(self, q: str, layer: int, x: Tensor) -> None:
        known = self.total[q].get(layer)
        self.total[q][layer] = self.weight * x if known is None else known + self.weight * x


def screen(
    model: PreTrainedModel,
    pairs: Pairs,
    quantity: str = "z",
    *,
    verify: int = 20,
    steps: int = 0,
    **patching: object,
) -> Effects:
    """Effects of all sites, those of the largest `verify` measured exactly and the rest estimated by gradients."""
    direction = patching.get("direction", "denoise")
    estimated = attribute(model, pairs, [quantity], steps=steps, direction=direction)[quantity]  # type: ignore[arg-type]
    exact = patch(model, pairs, quantity, sites=estimated.top(verify), **patching)  # type: ignore[arg-type]
    both = estimated.with_exact(exact)
    return replace(
        both, settings={**both.settings, "method": "attribution, the largest exactly", "verified": verify}
    )
