"""DAMRO's claim, on the shipped vision-language model: contrasting the patches of highest class-token attention.

Scenes break the prior that a coloured shape comes with its partner; the model is asked for partners, none of which is
there, and says yes to some (`false yes`). As many questions ask for shapes that are there. Contrasts are those of
training. k and α are chosen on a seed of their own, among a few, by how much DAMRO is below its control there; three
fresh seeds are reported. The control contrasts as many patches drawn at random, another draw for each image.

Whether the tower has what the paper speaks of, patches of high attention that lie in the background, is measured too:
the share of the outliers that lie in cells without a thing, beside the share of all patches that do; the weight of the
highest patch over the mean one; and the norm of outliers' features over the median norm.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.claims.lab import threads
from regard.claims.shipped_vlm import Asked, asked_partners, inputs_of, next_logits, said_yes, shipped
from regard.core import Method
from regard.core.claim import Claim, Measured
from regard.methods.steering import damro as page
from regard.tasks.scenes import GRID, MIXED, Scene, drawn

SEEDS, CHOICE, COUNT = (21, 22, 23), 20, 640
PATCHES, STRENGTHS = (1, 4, 10), (0.5, 2.0)


def questions(seed: int, count: int = COUNT) -> list[Asked]:
    return asked_partners(count, f"damro {seed}", conflict=True, contrast=MIXED)


def damro(cfg: page.Config) -> Method:
    return Method("damro", page.METHOD, cfg)


def random_patches(cfg: page.Config) -> Method:
    g = torch.Generator().manual_seed(0)

    def prepare(runs: Any, at: Any, cfg: page.Config) -> Tensor:
        weights = at.class_attention(cfg.layer)
        return page.outliers(torch.rand(weights.shape[0], 1, weights.shape[2], generator=g), cfg.patches)

    return Method("random_patches", replace(page.METHOD, prepare=prepare), cfg)


def rates(method: Method | None, chosen: Sequence[Asked]) -> tuple[float, float]:
    """(share of yes about what is absent, about what is there)."""
    yes = said_yes(method, chosen)
    absent, there = ([y for y, q in zip(yes, chosen) if q.question.answer == a] for a in ("no", "yes"))
    return sum(absent) / len(absent), sum(there) / len(there)


def best_settings() -> page.Config:
    """Of the settings those with which DAMRO is furthest below its control, on a seed of their own."""
    chosen = questions(CHOICE, COUNT // 2)
    settings = [page.Config(patches=k, strength=a) for k in PATCHES for a in STRENGTHS]
    return max(settings, key=lambda cfg: rates(random_patches(cfg), chosen)[0] - rates(damro(cfg), chosen)[0])


def covered(scene: Scene, side: int) -> Tensor:
    """[side * side] which patches lie in a cell that a thing takes."""
    cells = torch.zeros(GRID, GRID, dtype=torch.bool)
    for thing in scene.things:
        for cell, _ in drawn(thing):
            cells[divmod(cell, GRID)] = True
    times = side // GRID
    return cells.repeat_interleave(times, 0).repeat_interleave(times, 1).flatten()


@torch.no_grad()
def tower(chosen: Sequence[Asked], cfg: page.Config) -> dict[str, float]:
    """What the class token attends to, and how large the features of those patches are."""
    seen: list[Tensor] = []

    def prepare(runs: Any, at: Any, cfg: page.Config) -> Tensor:
        seen.append(at.class_attention(cfg.layer))
        return page.outliers(seen[-1], cfg.patches)

    next_logits(Method("damro", replace(page.METHOD, prepare=prepare), cfg), chosen)
    attention = torch.cat([x.float().mean(1) for x in seen])  # [texts, P]
    model, scenes = shipped().model, [q.scene for q in chosen]
    pixels = inputs_of(scenes, [q.question.text for q in chosen])["pixel_values"]
    vision = getattr(model, "model", model).vision_tower
    states = vision(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer][:, 1:]
    norms = states.norm(dim=-1)
    high = page.outliers(attention[:, None], cfg.patches)
    things = torch.stack([covered(scene, int(attention.shape[1] ** 0.5)) for scene in scenes])
    return {
        "outliers_in_the_background": (~things)[high].float().mean().item(),
        "patches_in_the_background": (~things).float().mean().item(),
        "highest_weight_over_the_mean": (attention.amax(1) / attention.mean(1)).mean().item(),
        "outliers_norm_over_the_median": (norms[high].mean() / norms.median()).item(),
        "highest_norm_over_the_median": (norms.amax(1) / norms.median(1).values).mean().item(),
    }


def measure() -> Measured:
    with threads(1):
        cfg = best_settings()
        numbers: dict[str, Any] = {"patches": cfg.patches, "strength": cfg.strength}
        sets = {seed: questions(seed) for seed in SEEDS}
        methods = {
            "plain": None,
            "damro": damro(cfg),
            "random": random_patches(cfg),
            "default": damro(page.Config()),
        }
        for name, method in methods.items():
            found = [rates(method, chosen) for chosen in sets.values()]
            numbers[f"false_yes_{name}"] = [false for false, _ in found]
            numbers[f"true_yes_{name}"] = [true for _, true in found]
        plain, ours, control = (numbers[f"false_yes_{name}"] for name in ("plain", "damro", "random"))
        some = sets[SEEDS[0]]
        numbers |= tower(some, cfg)
        same = next_logits(damro(page.Config(strength=0.0, cut=0.0)), some[:32]) - next_logits(
            None, some[:32]
        )
        numbers["largest_difference_at_strength_0"] = same.abs().max().item()
    parts = {
        "below random patches": all(a <= c - 0.01 for a, c in zip(ours, control)),
        "random patches below plain": all(c <= p - 0.01 for c, p in zip(control, plain)),
        "plain at strength 0": numbers["largest_difference_at_strength_0"] == 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="damro",
    statement=(
        "contrasting the patches that the class token attends to most lowers yes-answers about absent objects, and "
        "more than contrasting random patches; at α = 0 nothing changes"
    ),
    bound=(
        "rate of false yes: DAMRO <= random patches - 0.01 and random patches <= plain - 0.01 on each of 3 seeds; at "
        "α = 0 and β = 0 logits differ by 0"
    ),
    measure=measure,
    fails=("below random patches", "random patches below plain"),
    contradicted=(
        "this tower has no such patches: of those that its class token attends to most 20 % lie in cells without a "
        "thing, where 78 % of all patches do; they are where the things are. Of k in 1, 4, 10 and α in 0.5, 2 the best "
        "on another seed, k = 1 and α = 2, gives 0.32, 0.35, 0.38 false yes on three seeds, random patches 0.31, 0.35, "
        "0.38, the model alone 0.30, 0.34, 0.38; the code's k = 10 and α = 2 raise it to 0.44, 0.53, 0.52 (true yes "
        "from 0.88, 0.88, 0.90 to 0.92, 0.91, 0.93). α = 0 is the identity"
    ),
)
