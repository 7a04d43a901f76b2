"""PrimeComposer's claim, in a trained diffusion transformer, over all steps in which it composes.

A scene of two digits is the background, one of its empty quarters the region, a digit of a third class the object.
The caption names all three and two stop words. At each step a side pass runs over the noised background with the
object pasted in; its self-attention scores go into the early steps, the object's word is kept to the region, and
outside the region the noised background is put back. What is measured is read in every layer of every step.

Controls: the word's weight outside where it may go anywhere, and how far the background is off where it is not put
back. How near the region comes to the object with and without the side pass is reported and decides nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.claims import toy_diffusion as toy
from regard.claims.digits import digits
from regard.claims.lab import generator, threads
from regard.core.claim import Claim, Measured
from regard.methods.steering import prime_composer as page

SCENES, STEPS, SEED = 32, 20, 3


@dataclass
class Task:
    """Patches of the background and of it with the object pasted in [B, P, d], the region [B, P], words, noises."""

    background: Tensor
    pasted: Tensor
    region: Tensor
    words: Tensor
    noise: Tensor
    start: Tensor

    @property
    def subject(self) -> Tensor:
        """[B, W]: the object's word."""
        return torch.arange(self.words.shape[1]).expand_as(self.words) == 0


def task(seed: int = SEED) -> Task:
    g = generator(seed)
    scene = toy.scenes(SCENES, g, "test", scraps=2)
    images, labels = digits()["test"]
    taken = torch.zeros(SCENES, 4, dtype=torch.bool)
    half = toy.SIDE // 2
    taken.scatter_(1, scene.corners[..., 0] // half * 2 + scene.corners[..., 1] // half, True)
    free = (~taken).int().argmax(1)
    corner = torch.stack([free // 2, free % 2], dim=-1)[:, None] * half
    drawn = torch.randint(len(images), (SCENES, 32), generator=g)
    new = (labels[drawn][..., None] != scene.digits[:, None]).all(-1).int().argmax(1, keepdim=True)
    chosen = drawn.gather(1, new)[:, 0]
    blank = torch.zeros_like(scene.images)
    region = toy.pasted(blank, torch.ones(SCENES, 1, half, half), corner) > 0
    object_there = toy.pasted(blank, images[chosen, 0][:, None], corner)
    both = torch.where(region, object_there, scene.images)
    stops = torch.tensor(toy.STOP[:2]).expand(SCENES, -1)
    words = torch.cat([labels[chosen][:, None], scene.digits, stops], dim=1)
    clean, pasted = (2 * toy.patches_of(picture) - 1 for picture in (scene.images, both))
    noise, start = (torch.randn(clean.shape, generator=g) for _ in "12")
    return Task(clean, pasted, toy.patches_of(region.float()).amax(-1) > 0, words, noise, start)


@dataclass
class Watched:
    """The largest, over layers and steps."""

    outside: float = 0.0  # weight of the subject's word at a patch outside
    mean_outside: list[float] = field(default_factory=list)
    row_sum: float = 0.0  # |sum of a row - 1|, of self- and of cross-attention
    background: float = 0.0  # |x_t - noised background| outside the region
    calls: int = 0


def composed(
    model: toy.ToyDiffusion, given: Task, cfg: page.Config, blend: bool = True
) -> tuple[Tensor, Watched]:
    """What the sampler draws in the end [B, P, d], and what was seen on the way."""
    seen, now = Watched(), {"memory": page.Composing(0.0)}
    roles = {"region": given.region}
    inner = toy.steering(page.METHOD, cfg, roles, {"subject": given.subject}, lambda: now["memory"])

    def edit(layer: int, kind: str, scores: Tensor | None, weights: Tensor | None) -> Tensor:
        result = inner(layer, kind, scores, weights)
        if weights is not None:
            seen.calls += 1
            seen.row_sum = max(seen.row_sum, (result.double().sum(-1) - 1).abs().max().item())
            if kind == "cross":
                out = result.transpose(1, 2)[~given.region][..., 0]  # the subject is the first word
                seen.outside = max(seen.outside, out.max().item())
                seen.mean_outside.append(out.mean().item())
        return result

    def prepare(step: int, t: float) -> None:
        record = toy.Record()
        if step / STEPS < cfg.early:
            at = toy.noised(given.pasted, given.noise, t)
            model(at, torch.full((len(at),), t), given.words, record)
        prior = {layer: s for (layer, kind), s in record.scores.items() if kind == "self"}
        now["memory"] = page.Composing(step / STEPS, prior)

    def after(step: int, t: float, x: Tensor) -> Tensor:
        behind = toy.noised(given.background, given.noise, t)
        x = page.blended(x, behind, given.region) if blend else x
        seen.background = max(seen.background, (x - behind)[~given.region].abs().max().item())
        prepare(step + 1, t)
        return x

    prepare(0, 1.0)
    start = torch.where(given.region[..., None], given.start, given.noise)
    return toy.sample(model, given.words, start, STEPS, edit, after), seen


def off_the_object(x: Tensor, given: Task) -> float:
    """Mean squared difference in the region, in units where black and white are 2 apart."""
    return (x - given.pasted)[given.region].square().mean().item()


@torch.no_grad()
def measure() -> Measured:
    with threads(1):
        model, given = toy.trained(0), task()
        run: Callable[..., tuple[Tensor, Watched]] = lambda cfg, **how: composed(model, given, cfg, **how)  # noqa: E731
        drawn, seen = run(page.Config())
        alone, _ = run(page.Config(early=0.0))
        _, free = run(page.Config(constrain=False), blend=False)
    numbers: dict[str, Any] = {
        "outside_weight": seen.outside,
        "row_sum_off_1": seen.row_sum,
        "background_diff": seen.background,
        "attention_calls": seen.calls,
        "outside_weight_unconstrained": max(free.mean_outside),
        "background_diff_unblended": free.background,
        "off_the_object": off_the_object(drawn, given),
        "off_the_object_without_side_pass": off_the_object(alone, given),
        "off_the_object_background": off_the_object(given.background, given),
    }
    parts = {
        "outside": seen.outside == 0,
        "row sums": seen.row_sum < 1e-6,
        "background": seen.background == 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="prime_composer",
    statement=(
        "with region-constrained cross-attention the subject's words have no weight outside the region and rows still "
        "add up to 1, and outside the region every step leaves the noised background as it is"
    ),
    bound=(
        "over all layers, heads and steps: weight outside = 0, |row sum - 1| < 1e-6, difference of the background = 0"
    ),
    measure=measure,
)
