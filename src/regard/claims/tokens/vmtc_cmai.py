"""CMAI's claim: of the pairs of text and image tokens it takes the half that is not needed.

Digits lie among distractors, the question names a digit's row and column. CMAI hides half of the image tokens from
every row of the question in every layer; the control hides as many in each row and layer, drawn at random. Readers of
three seeds, which see no image of the test part. Reported beside it: the half of highest focus hidden instead
(`opposite`), and what of the asked digit's own pairs with the last word stays.

Settings were written down before anything was measured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.claims.digit_reader import CELLS, SIDE, Edit, Reader, Scene, asked_by_place, reader_of_places
from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured
from regard.methods.steering import cmai as page
from regard.ops.steered import Steered

SEEDS, LAYERS, STEPS, TESTED = (0, 1, 2), 3, 1000, 2000
KEYS = CELLS + 3


def steered(layer: int, scenes: int) -> Steered:
    image = (torch.arange(KEYS) < CELLS).expand(scenes, KEYS)
    return Steered(
        layer, LAYERS, "prefill", rows=torch.arange(KEYS).expand(scenes, KEYS),
        role=lambda name: image, row_role=lambda name: image,
    )  # fmt: skip


def by_page(layer: int, s: Tensor) -> Tensor:
    return page.METHOD.scores(steered(layer, len(s)), s, page.Config(inhibit=0.5))


def by_rank(rank: Callable[[Tensor, Tensor], Tensor]) -> Edit:
    """Of each row's image keys the half that ranks lowest, by (scores of the layer, the page's focus) -> [B, N, n]."""

    def edit(layer: int, s: Tensor) -> Tensor:
        image = (torch.arange(KEYS) < CELLS).expand(len(s), KEYS)
        found = page.measure(s, image, ~image, s.new_zeros(len(s), 0, KEYS), page.Config())
        pairs = image[:, None] & ~image[..., None]
        hidden = page.lowest(rank(s, found.focus), pairs, 0.5)
        return s.masked_fill(hidden[:, None], -torch.inf)

    return edit


def controls(seed: int) -> dict[str, Edit]:
    g = generator(seed)
    return {
        "random": by_rank(lambda s, focus: torch.rand(focus.shape, generator=g)),
        "opposite": by_rank(lambda s, focus: -focus),
    }


@torch.no_grad()
def accuracy(model: Reader, scene: Scene, edit: Edit | None = None) -> float:
    """Percent of right answers."""
    logits = model(model.look(scene.cells), scene.words, edit=edit)
    return 100 * (logits.argmax(1) == scene.answers).double().mean().item()


@torch.no_grad()
def asked_stay(model: Reader, scene: Scene, edit: Edit) -> list[float]:
    """Percent of scenes in which the last word still sees the asked cell, by layer."""
    place, found = SIDE * scene.words[:, 0] + scene.words[:, 1] - SIDE, []

    def watch(layer: int, s: Tensor) -> Tensor:
        s = edit(layer, s)
        asked = s[:, 0, -1].gather(1, place[:, None])
        found.append(100 * (asked > -torch.inf).double().mean().item())
        return s

    model(model.look(scene.cells), scene.words, edit=watch)
    return found


def numbers_of(seed: int) -> dict[str, Any]:
    model = reader_of_places(seed, LAYERS, STEPS)
    scene = asked_by_place("test", TESTED, generator(1000 + seed))
    edits = {"cmai": by_page, **controls(seed)}
    plain = accuracy(model, scene)
    dropped = {f"drop_{name}": plain - accuracy(model, scene, edit) for name, edit in edits.items()}
    stay = {f"asked_{name}": asked_stay(model, scene, edits[name]) for name in ("cmai", "random")}
    return {"accuracy": plain, **dropped, **stay}


def measure() -> Measured:
    with threads(1):
        found = [numbers_of(seed) for seed in SEEDS]
    numbers = {key: [row[key] for row in found] for key in found[0]}
    drop, random = mean(numbers["drop_cmai"]), mean(numbers["drop_random"])
    return Measured(drop <= 2 and random - drop >= 5, {"drop": drop, "random": random, **numbers})


CLAIM = Claim(
    name="vmtc_cmai",
    statement=(
        "on a small reader of digits among distractors, whose question names a digit's place, hiding the half of the "
        "text-image pairs with the lowest focus costs less accuracy than hiding as many at random"
    ),
    bound="accuracy drop <= 2 points and at least 5 points smaller than with random pairs, means over 3 seeds",
    measure=measure,
)
