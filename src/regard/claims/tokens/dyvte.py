"""DyVTE's claim: image tokens can leave a small reader before its last layers, by routers, but not after the first.

Digits lie among distractors; the question names a digit's row and column and asks for the digit or, a quarter of the
time, for the row that it has just named, which needs no image. Routers learn on images that the reader was not
trained on (the part `choice`), as the page says: an answer without image tokens in later layers is as good, or is
not. Every text is decided by the page's `after`, layer by layer, on the part `test`. Saved is the share of pairs of
image token and layer that are not computed.

Reported beside it: exits forced after each layer, and how much each of the two kinds of question saves. Settings were
written down before anything was measured.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.claims.digit_reader import CELLS, SIDE, Exit, Reader, Scene, asked_by_place, reader_of_places
from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured
from regard.methods.tokens import dyvte as page
from regard.ops.images import LayerView

SEEDS, LAYERS, STEPS, TEXT = (0, 1, 2), 5, 1000, 0.25
LABELLED, TESTED, TRAINING = 4096, 1000, dict(hidden=256, epochs=30, rate=1e-3)
WORDS = torch.tensor([False] * CELLS + [True] * 3)


def decided(cfg: page.Config) -> Exit:
    """The page, asked about every text alone."""

    def leave(layer: int, x: Tensor, seen: Tensor) -> Tensor:
        left = seen.clone()
        for i in range(len(x)):
            keep = page.METHOD.after(view_of(layer, x[i], seen[i]), cfg)
            if keep is not None:
                left[i, :CELLS] = False
                left[i, keep] = True
        return left

    return leave


def view_of(layer: int, states: Tensor, seen: Tensor) -> LayerView:
    return LayerView(
        layer, LAYERS, seen[:CELLS].nonzero().flatten(), torch.zeros(CELLS), states[seen], ~WORDS[seen],
        WORDS[seen], *[lambda *rows: torch.empty(0)] * 3,
    )  # fmt: skip


@torch.no_grad()
def logits_of(model: Reader, scene: Scene, leave: Exit | None = None) -> Tensor:
    return model(model.look(scene.cells), scene.words, leave=leave)


def routers_of(model: Reader, seed: int) -> tuple[page.Router, ...]:
    """A router for each layer, from scenes of images that are neither trained nor judged on."""
    scene, pairs = asked_by_place("choice", LABELLED, generator(2000 + seed), TEXT), []

    def read(layer: int, x: Tensor, seen: Tensor) -> Tensor:
        pairs.append(torch.stack([page.pair_of(row, WORDS) for row in x]))
        return seen

    whole, routers = logits_of(model, scene, read), []
    for layer in range(LAYERS):
        without = logits_of(model, scene, forced(layer))
        same = (without.argmax(1) == whole.argmax(1)).float()
        losses = (F.cross_entropy(x, scene.answers, reduction="none") for x in (without, whole))
        routers.append(page.trained(pairs[layer], page.label(same, *losses), seed=seed, **TRAINING))
    return tuple(routers)


def forced(layer: int) -> Exit:
    """All image tokens leave after this layer."""
    return lambda number, x, seen: seen & WORDS if number == layer else seen


def judged(model: Reader, scene: Scene, leave: Exit | None) -> tuple[float, Tensor]:
    """Percent right, and of each text the layers that saw image tokens."""
    layers = torch.ones(len(scene.words))

    def watched(layer: int, x: Tensor, seen: Tensor) -> Tensor:
        seen = seen if leave is None else leave(layer, x, seen)
        if layer + 1 < LAYERS:
            layers.add_(seen[:, :CELLS].any(1))
        return seen

    right = logits_of(model, scene, watched).argmax(1) == scene.answers
    return 100 * right.double().mean().item(), layers


def numbers_of(seed: int) -> dict[str, Any]:
    model = reader_of_places(seed, LAYERS, STEPS, TEXT)
    routers = routers_of(model, seed)
    scene = asked_by_place("test", TESTED, generator(1000 + seed), TEXT)
    plain, _ = judged(model, scene, None)
    accuracy, layers = judged(model, scene, decided(page.Config(routers)))
    saved = 100 * (1 - layers / LAYERS)
    named = scene.words[:, 2] == 2 * SIDE + 1
    disabled = logits_of(model, scene, decided(page.Config(()))) - logits_of(model, scene)
    return {
        "accuracy": plain,
        "drop": plain - accuracy,
        "saved": saved.mean().item(),
        "saved_of_digits": saved[~named].mean().item(),
        "saved_of_texts": saved[named].mean().item(),
        "drop_forced": [plain - judged(model, scene, decided(page.Config(exit=n)))[0] for n in range(LAYERS)],
        "disabled": disabled.abs().max().item(),
    }


def measure() -> Measured:
    with threads(1):
        found = [numbers_of(seed) for seed in SEEDS]
    numbers = {key: [row[key] for row in found] for key in found[0]}
    saved, drop = mean(numbers["saved"]), mean(numbers["drop"])
    first = mean(forced[0] for forced in numbers["drop_forced"])
    holds = saved >= 30 and drop <= 1 and first >= 10 and max(numbers["disabled"]) == 0
    return Measured(holds, {"mean_saved": saved, "mean_drop": drop, "mean_drop_first": first, **numbers})


CLAIM = Claim(
    name="dyvte",
    statement=(
        "routers let the image tokens leave a small trained reader before its last layers at nearly unchanged "
        "accuracy; after the first layer they cannot leave"
    ),
    bound=(
        ">= 30 % of image tokens times layers saved at <= 1 point of accuracy; exit forced after layer 0 costs >= 10 "
        "points; without routers the logits are the same to the last bit; means over 3 seeds"
    ),
    measure=measure,
)
