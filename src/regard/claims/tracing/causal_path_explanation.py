"""Causal path explanation's claim, on a digits CNN: units by intervention beside units by gradient x activation.

Units are the filters of three convolutions and the neurons of a layer before the logits. For each class they are
ranked on the training images of that class that are classified right, layer by layer:

    intervention    mean effect along kept paths, the page
    gradient        mean of gradient x activation of the class logit, summed over places
    alone           mean fall of the logit when the unit is set to zero, whatever it passes through: no walk, no graph
    random          a permutation
    together        each next unit the one whose loss beside the units before it costs most, on 20 images: no ranking
                    by single units, but about the most that any ranking could win

What a ranking is worth is the fall of the class logit on test images of the class when the first quarter of a layer's
units are set to zero together, on average over classes and layers; a drop ratio is a mean fall over that by gradient.

Stability is the rank correlation (Spearman, tied units share their mean rank) of an image's own scores, by unit of a
layer, between the image and the image with normal noise of 0.2 of the pixels' range added, on average over layers,
images and three draws; for interventions in the graph of the class as found on clean training images. The logit is
that of the true class on either side. How many units are ablated and how much noise there is was set beforehand; the
shares and noises beside these are reported, and so is the same network with tanh in the place of ReLU: with ReLU
gradient x activation is exact as long as no unit switches, with tanh it is not. Everything was written and looked at
on another network (seed 1) and the images of "choice" first; nothing was set by it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.claims.digits import accuracy, digits, network
from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured
from regard.methods.tracing import causal_path_explanation as page
from regard.ops.ranks import rank_correlation

SHARE, SHARES = 0.25, (0.125, 0.5)
NOISE, NOISES, DRAWS = 0.2, (0.1, 0.4), 3
FEW = 20  # images of a class on which units are looked for together
EVERY = 4  # of the images of a class, that are asked for their own scores
Scores = list[Tensor]  # [B, U] of each layer between input and logits


class Class:
    """One class of a network: its graph, and the scores of any image of it."""

    def __init__(self, model: nn.Sequential, label: int) -> None:
        self.layers, self.label = list(model), label
        self.graph = page.measure(self.layers, self.images("train"), label)

    def images(self, part: str) -> Tensor:
        """Those of the class that the network gets right."""
        images, labels = digits()[part]
        images = images[labels == self.label]
        return images[page.states(self.layers, images)[-1].argmax(1) == self.label]

    def intervention(self, images: Tensor) -> Scores:
        return self.effects(images, self.graph.kept)

    def alone(self, images: Tensor) -> Scores:
        return self.effects(images, [torch.ones_like(keep) for keep in self.graph.kept])

    def effects(self, images: Tensor, kept: Sequence[Tensor]) -> Scores:
        """Of all units, what leaves them passing through these alone."""
        clean = page.states(self.layers, images)
        units = [torch.arange(h.shape[1]) for h in clean]
        every = [units[0] < 0, *kept, units[-1] == self.label]
        between = range(1, len(self.layers))
        return [page.path_effects(self.layers, clean, at, self.label, every, units[at]) for at in between]

    def gradient(self, images: Tensor) -> Scores:
        """Gradient x activation, summed over places."""
        between = page.states(self.layers, images.clone().requires_grad_())
        slopes = torch.autograd.grad(between[-1][:, self.label].sum(), between[1:-1])
        return [
            (slope * h.detach()).flatten(2).sum(2) if h.dim() > 2 else slope * h.detach()
            for slope, h in zip(slopes, between[1:-1], strict=True)
        ]

    def random(self, images: Tensor) -> Scores:
        g = generator(self.label)
        return [torch.rand(len(images), len(keep), generator=g) for keep in self.graph.kept]

    def fall(self, images: Tensor, at: int, units: Tensor) -> float:
        """Of the class logit when these units of h_at are zero together."""
        clean = page.states(self.layers, images)
        h = clean[at].index_fill(1, units, 0)
        for layer in self.layers[at:]:
            h = layer(h)
        return (clean[-1] - h)[:, self.label].mean().item()


WAYS: dict[str, Callable[[Class, Tensor], Scores]] = {
    "intervention": Class.intervention,
    "gradient": Class.gradient,
    "alone": Class.alone,
    "random": Class.random,
}


def first_units(one: Class, way: str, at: int, count: int) -> Tensor:
    """[count] units of the layer's ranking on training images."""
    if way == "together":
        return together(one, at, count)
    scores = WAYS[way](one, one.images("train"))[at - 1].mean(0)
    return scores.argsort(descending=True, stable=True)[:count]


def together(one: Class, at: int, count: int) -> Tensor:
    """[count] units, each the one whose loss beside that of the units before it costs the logit most."""
    clean = page.states(one.layers, one.images("train")[:FEW])
    units, first, h = torch.arange(clean[at].shape[1]), [], clean[at]
    for _ in range(count):
        out = page.without_each(h, units)
        for layer in one.layers[at:]:
            out = layer(out)
        logit = out[:, one.label].view(len(units), -1).mean(1)
        first.append(int(logit.index_fill(0, torch.tensor(first, dtype=torch.long), torch.inf).argmin()))
        h = h.index_fill(1, torch.tensor(first), 0)
    return torch.tensor(first)


def falls(classes: list[Class], way: str, share: float, part: str) -> list[float]:
    """By layer, mean over classes: the fall by the first units of the ranking."""
    widths = [len(keep) for keep in classes[0].graph.kept]
    return [
        mean(
            one.fall(one.images(part), at, first_units(one, way, at, round(share * width))) for one in classes
        )
        for at, width in enumerate(widths, 1)
    ]


def stability(classes: list[Class], way: str, noise: float, part: str) -> list[float]:
    """By layer: rank correlation of clean and noisy images."""
    by_layer: list[list[Tensor]] = [[] for _ in classes[0].graph.kept]
    for one in classes:
        images = one.images(part)[::EVERY]
        clean, g = WAYS[way](one, images), generator(one.label)
        for _ in range(DRAWS):
            noisy = images + noise * torch.randn(images.shape, generator=g)
            for at, scores in enumerate(WAYS[way](one, noisy)):
                by_layer[at].append(rank_correlation(clean[at], scores))
    return [torch.cat(found).nanmean().item() for found in by_layer]


def drops(classes: list[Class], share: float, part: str, ways: Iterable[str]) -> dict[str, Any]:
    """Falls by layer and way, and drop ratios."""
    found = {way: falls(classes, way, share, part) for way in ways}
    ratios = {f"ratio_{way}": mean(fall) / mean(found["gradient"]) for way, fall in found.items()}
    return {f"fall_{way}": fall for way, fall in found.items()} | ratios


def steadiness(classes: list[Class], noise: float, part: str) -> dict[str, Any]:
    """Rank correlations by layer and way, and by how much that of interventions is higher on average."""
    found = {way: stability(classes, way, noise, part) for way in ("intervention", "gradient", "alone")}
    higher = mean(found["intervention"]) - mean(found["gradient"])
    return {f"spearman_{way}": by_layer for way, by_layer in found.items()} | {"steadier": higher}


def compared(model: nn.Sequential, part: str) -> dict[str, Any]:
    """What decides on one network, judged on this part."""
    classes = [Class(model, label) for label in range(10)]
    kept = [
        torch.stack(layer).sum(1).double().mean().item() for layer in zip(*(c.graph.kept for c in classes))
    ]
    numbers: dict[str, Any] = {"accuracy": accuracy(model, part), "kept_by_layer": kept}
    return numbers | drops(classes, SHARE, part, [*WAYS, "together"]) | steadiness(classes, NOISE, part)


def beside(model: nn.Sequential, part: str) -> dict[str, Any]:
    """The two numbers of the bound with more and fewer units, more and less noise."""
    classes = [Class(model, label) for label in range(10)]
    two = ("intervention", "gradient")
    numbers = {
        f"ratio_at_{share}": drops(classes, share, part, two)["ratio_intervention"] for share in SHARES
    }
    return numbers | {
        f"steadier_at_{noise}": steadiness(classes, noise, part)["steadier"] for noise in NOISES
    }


def measure() -> Measured:
    with threads(1):
        numbers = compared(network(0), "test")
        bent = {f"{key}_tanh": value for key, value in compared(network(0, nn.Tanh), "test").items()}
        others = beside(network(0), "test")
    parts = {
        "the network is right": numbers["accuracy"] >= 95,
        "larger drop": numbers["ratio_intervention"] >= 1.1,
        "steadier": numbers["steadier"] >= 0.05,
    }
    return Measured.by(parts, numbers | bent | others)


CLAIM = Claim(
    name="causal_path_explanation",
    statement=(
        "ablating the top units found by intervention lowers the class logit more than ablating as many by gradient x "
        "activation, and the ranking is more stable under input noise"
    ),
    bound=(
        "logit-drop ratio >= 1.1 on a digits CNN, a quarter of the units of each layer; Spearman of clean and noisy "
        "rankings (noise 0.2) higher by >= 0.05 (the network is right on >= 95 % of test images)"
    ),
    measure=measure,
    fails=("larger drop", "steadier"),
    contradicted=(
        "rankings are steadier in every layer before the last, but by 0.036 on average, and units found along paths "
        "cost the logit less than those by gradient x activation (0.88 of the fall). With ReLU that product is nearly "
        "the effect of a unit alone (0.99), and no choice of units would do: units looked for together reach 1.03. "
        "Walking takes away what a unit does through units that are not kept. An eighth or a half of the units, "
        "causes against the class kept too, rankings by single images, a head on flattened maps and a CNN of seven "
        "layers were tried on another network and other images: ratios from 0.88 to 1.00. With tanh, where gradients "
        "mislead, the ratio is 1.01 (together: 1.08) and rankings are steadier by 0.106"
    ),
)
