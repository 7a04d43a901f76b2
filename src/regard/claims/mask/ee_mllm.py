"""EE-MLLM's claim on a toy: what do image tokens give up when they no longer read each other?

The toy (claims/toy_vlm.py) is trained from scratch under each mask, as the paper trains its model: 8 patches of a
colour, a shape and a value, and a question of a colour and a shape. The answer lies in one patch, so that no patch
has to know another; where patches have to be compared with each other this claim says nothing.
"""

import torch

from regard.claims.lab import generator, mean
from regard.claims.toy_vlm import ToyVLM, accuracy, learn, lookup, one_turn
from regard.core.claim import Claim, Measured
from regard.core.mask import Mask, causal
from regard.methods.masks import ee_mllm as page

KINDS, HEIGHT, WIDTH, VALUES, SEEDS = 3, 2, 4, 4, (0, 1, 2)
STEPS, RATE = 600, 3e-3
PATCHES = HEIGHT * WIDTH
ROLES = one_turn(HEIGHT, WIDTH, question=2)
SIDES = {"full": causal(), "composite": page.build(page.Config())}
draw = lookup(KINDS, PATCHES, VALUES)


def toy(mask: Mask, seed: int) -> ToyVLM:
    seen = mask.dense(ROLES.length, roles=ROLES)
    model = ToyVLM([KINDS, KINDS, VALUES], 2 * KINDS, seen, seed=seed)
    return learn(model, draw, STEPS, seed, RATE)


@torch.no_grad()
def leaks(model: ToyVLM) -> tuple[float, float]:
    """(largest change of another patch, smallest of the text, in any layer) when the value of one patch changes."""
    scene = draw(64, generator(7))
    plain, others, text = model.states(scene), 0.0, []
    for patch in range(PATCHES):
        patches = scene.patches.clone()
        patches[:, patch, 2] = (patches[:, patch, 2] + 1) % VALUES
        change = (model.states(scene._replace(patches=patches)) - plain).abs().amax((1, 3))  # [layers, N]
        rest = [p for p in range(PATCHES) if p != patch]
        others = max(others, float(change[:, rest].max()))
        text.append(float(change[:, PATCHES:].amax(1).min()))
    return others, min(text)


def measure() -> Measured:
    right: dict[str, list[float]] = {name: [] for name in SIDES}
    leaked: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for seed in SEEDS:
        for name, mask in SIDES.items():
            model = toy(mask, seed)
            right[name].append(accuracy(model, draw))
            leaked[name].append(leaks(model))
    scores = {}
    for name, mask in SIDES.items():
        seen = mask.dense(ROLES.length, roles=ROLES)[0, 0, :PATCHES]
        seen[torch.arange(PATCHES), torch.arange(PATCHES)] = False  # alone, a token needs no score
        scores[name] = int(seen.sum())
    lost = mean(right["full"]) - mean(right["composite"])
    others, text = zip(*leaked["composite"])
    numbers = {f"accuracy_{name}": values for name, values in right.items()} | {"points_lost": lost}
    numbers |= {f"scores_of_image_queries_{name}": count for name, count in scores.items()}
    numbers |= {"leak_composite": list(others), "leak_full": [leak for leak, _ in leaked["full"]]}
    numbers |= {"smallest_change_of_text": list(text)}
    parts = {
        "leaks": max(others) == 0,
        "text": min(text) > 1e-4,
        "scores": scores["composite"] == 0,
        "accuracy": lost <= 2,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="ee_mllm",
    statement=(
        "under composite attention a changed image token changes no other one in any layer, but it changes the text, "
        "and no score is left for image queries; a toy VLM trained so answers as well as with full attention"
    ),
    bound=(
        "visual leak == 0; text change > 1e-4; accuracy of the trained toy within 2 points of full (causal) attention, "
        "mean of three seeds"
    ),
    measure=measure,
)
