"""IR-Diffusion's claim, in the layers of a trained diffusion transformer, at all times of its sampler.

Isolation: scenes of two digits are drawn with every self-attention isolated, the quarters of the two being the
subjects. In each layer of each step one subject's tokens are replaced by others, drawn at random and as large, and
the other's output of that attention is compared. Controls: the same without isolation, and what a change of one
subject in x_t does to the other behind all layers, isolated in each, where the background carries it over.

Reposition: a reference picture shows a digit in another quarter than the target does, both noised, each with noise of
its own, to each time of the sampler. Queries of the target attend to the reference's keys, before and after the
subject's queries and keys are moved to the middle of the grid, before they are turned by their places. Counted is the
weight of an inked token of the digit on the same token of the reference. Controls: keys moved to another box than
queries, and a model that is not trained.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.claims import toy_diffusion as toy
from regard.claims.digits import digits
from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured
from regard.methods.steering import ir_diffusion as page

SCENES, STEPS, SEED = 24, 20, 3
HALF = toy.GRID[0] // 2
QUARTERS = [(y, x, HALF, HALF) for y in (0, HALF) for x in (0, HALF)]
COMMON, ASIDE = (HALF // 2, HALF // 2, HALF, HALF), (0, HALF // 2, HALF, HALF)


def quarter_masks(scene: toy.Scenes) -> Tensor:
    """[B, 2, P] bool: the patches of each digit's quarter."""
    corner = scene.corners[:, :, None] // toy.PATCH
    inside = (toy.places() >= corner) & (toy.places() < corner + HALF)
    return inside.all(-1)


# isolation


def leaks(model: toy.ToyDiffusion, isolated: bool) -> dict[str, float]:
    """The largest change of one subject's output, over layers, steps and which of the two is changed."""
    g = generator(SEED)
    scene = toy.scenes(SCENES, g, "test")
    masks = quarter_masks(scene)
    roles = {f"subject_{i}": masks[:, i] for i in range(2)}
    edit = toy.steering(page.METHOD, page.Config(subjects=2 if isolated else 1), roles, {})
    seen = {"in_a_layer": 0.0, "behind_all_layers": 0.0}

    def watch(x: Tensor, t: float) -> None:
        at = torch.full((len(x),), t)
        for own in range(2):
            other = masks[:, 1 - own, :, None]
            h = model.embedded(x, at)
            for i in range(toy.LAYERS):
                given = model.norms[3 * i](h)
                drawn = torch.randn(given.shape, generator=g) * given.std()
                changed = torch.where(other, drawn, given)
                pair = (model.looks[i](y, y, edit=edit)[masks[:, own]] for y in (given, changed))
                seen["in_a_layer"] = max(seen["in_a_layer"], difference(*pair))
                h = model.layer(i, h, scene.words, edit)
            moved = torch.where(other, torch.randn(x.shape, generator=g), x)
            ends = (model(y, at, scene.words, edit)[masks[:, own]] for y in (x, moved))
            seen["behind_all_layers"] = max(seen["behind_all_layers"], difference(*ends))

    def after(step: int, t: float, x: Tensor) -> Tensor:
        if t > 0:
            watch(x, t)
        return x

    start = torch.randn(SCENES, toy.PATCHES, toy.PATCH**2, generator=g)
    watch(start, 1.0)
    toy.sample(model, scene.words, start, STEPS, edit, after)
    return seen


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# reposition


class Pair(NamedTuple):
    """Patches [B, P, d] of the target and of the reference, boxes of the digit, its inked tokens of a box [B, 16]."""

    target: Tensor
    reference: Tensor
    words: Tensor
    target_box: page.Box
    reference_box: page.Box
    ink: Tensor


def pairs(target: int, reference: int, g: torch.Generator) -> Pair:
    """A digit of the test images in these quarters of two pictures, each with clutter of its own."""
    images, labels = digits()["test"]
    chosen = torch.randint(len(images), (SCENES,), generator=g)
    drawn = []
    for quarter in (target, reference):
        corner = torch.tensor(QUARTERS[quarter][:2]).expand(SCENES, 1, 2) * toy.PATCH
        scraps = images[torch.randint(len(images), (SCENES, 4), generator=g), 0][..., :4, 2:6]
        places = torch.randint(0, toy.SIDE - 3, (SCENES, 4, 2), generator=g)
        canvas = toy.pasted(torch.zeros(SCENES, toy.SIDE, toy.SIDE), scraps, places)
        drawn.append(2 * toy.patches_of(toy.pasted(canvas, images[chosen, 0][:, None], corner)) - 1)
    ink = images[chosen, 0].unfold(1, 2, 2).unfold(2, 2, 2).mean((-2, -1)).flatten(1) > 0.1
    words = torch.stack([labels[chosen], torch.full((SCENES,), toy.STOP[0])], dim=1)
    return Pair(drawn[0], drawn[1], words, QUARTERS[target], QUARTERS[reference], ink)


def inputs_of(model: toy.ToyDiffusion, x: Tensor, t: float, words: Tensor) -> list[Tensor]:
    """What each self-attention reads."""
    h, found = model.embedded(x, torch.full((len(x),), t)), []
    for i in range(toy.LAYERS):
        found.append(model.norms[3 * i](h))
        h = model.layer(i, h, words)
    return found


def tokens_of(box: page.Box) -> Tensor:
    """The numbers of a box's tokens, in raster order."""
    top, left, rows, columns = box
    grid = torch.arange(toy.PATCHES).view(toy.GRID)
    return grid[top : top + rows, left : left + columns].flatten()


def matched(q: Tensor, k: Tensor, at_q: page.Box, at_k: page.Box, ink: Tensor) -> float:
    """The mean weight of a box's inked token on the same one of the other; q, k [B, H, P, D] before they are turned."""
    q, k = (toy.Mixer.placed(x, toy.places()) for x in (q, k))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    own = weights[:, :, tokens_of(at_q), tokens_of(at_k)]  # [B, H, 16]
    return own.transpose(1, 2)[ink].mean().item()


def attention_of(model: toy.ToyDiffusion, pair: Pair, t: float, g: torch.Generator) -> list[list[float]]:
    """Of each layer: the weight on the matching token before, after, and with keys put elsewhere than queries."""
    noise = [torch.randn(pair.target.shape, generator=g) for _ in "12"]
    seen = [
        inputs_of(model, toy.noised(x, e, t), t, pair.words)
        for x, e in zip((pair.target, pair.reference), noise, strict=True)
    ]
    found = []
    for i, (h, ref) in enumerate(zip(*seen, strict=True)):
        look = model.looks[i]
        assert isinstance(look, toy.Mixer)
        q, k, *_ = look.qkv(h, ref)
        there = page.moved(q, toy.GRID, pair.target_box, COMMON)
        sides = [matched(q, k, pair.target_box, pair.reference_box, pair.ink)]
        for common in (COMMON, ASIDE):
            keys = page.moved(k, toy.GRID, pair.reference_box, common)
            sides.append(matched(there, keys, COMMON, common, pair.ink))
        found.append(sides)
    return found


def repositioned(model: toy.ToyDiffusion) -> dict[str, Any]:
    g = generator(SEED + 1)
    times = torch.linspace(1, 0, STEPS + 1)[:-1].tolist()
    given = [pairs(target, reference, g) for target, reference in ((0, 3), (1, 0), (2, 1), (3, 2))]
    seen = torch.tensor([[attention_of(model, pair, t, g) for pair in given] for t in times])  # [T, 4, L, 3]
    before, after, aside = seen.mean((0, 1, 2)).tolist()
    by_layer, by_time = (seen.mean(axes) for axes in ((0, 1), (1, 2)))
    return {
        "matched_before": before,
        "matched_after": after,
        "matched_keys_aside": aside,
        "ratio": after / before,
        "ratio_by_layer": (by_layer[:, 1] / by_layer[:, 0]).tolist(),
        "ratio_by_time": (by_time[:, 1] / by_time[:, 0]).tolist(),
    }


@torch.no_grad()
def measure() -> Measured:
    with threads(1):
        model = toy.trained(0)
        isolated, free = leaks(model, True), leaks(model, False)
        found = repositioned(model)
        untrained = repositioned(toy.ToyDiffusion(0))
    numbers = {f"isolated_{name}": value for name, value in isolated.items()}
    numbers |= {f"free_{name}": value for name, value in free.items()}
    numbers |= found | {
        "untrained_ratio": untrained["ratio"],
        "earlier_half_ratio": mean(found["ratio_by_time"][:10]),
    }
    return Measured.by({"isolation": isolated["in_a_layer"] == 0, "ratio": found["ratio"] >= 2}, numbers)


CLAIM = Claim(
    name="ir_diffusion",
    statement=(
        "in an isolated self-attention nothing of one subject reaches another, and where attention prefers near tokens "
        "moving a subject and its reference to one place raises the weight on the matching token of the reference"
    ),
    bound=(
        "over all layers and steps: change of a subject's output = 0 when the other's tokens change; mean weight on "
        "the matching token after repositioning >= 2 x before"
    ),
    measure=measure,
)
