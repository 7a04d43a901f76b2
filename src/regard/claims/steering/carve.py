"""CARVE's claim: the contrast takes out what any instruction attends to, in the mathematics and in the shipped model.

First the theorem: maps that are noise times meaning, contrasted with the noise alone at λ = 0, give the meaning. Then
the shipped model is asked for the digit of a scene, among coloured shapes and words, and for its colour. Attention of
the answer's word to the image is contrasted with that of the first word of a description. Both maps, contrasted and as
they are, are fused over the same layers; AUC is how often a token of the digit's cell ranks above another one.

Layers and λ were chosen on scenes of another seed, where the contrast is most above the map as it is.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.claims.lab import auroc, difference, generator, mean, threads
from regard.claims.shipped_vlm import Asked, asked, correct, inputs_of, shipped
from regard.core import Observer, Site
from regard.core.claim import Claim, Measured
from regard.methods.steering import carve as page
from regard.tasks.scene_questions import DESCRIBE
from regard.tasks.scenes import GRID, Scene

KINDS, EACH, BATCH = ("digit", "colour"), 128, 32
SETTINGS = page.Config(general=DESCRIBE, depth=(0.7, 0.9), lam=1e-8)


def factorised(seed: int) -> float:
    """Largest error of the contrast on [3, 4, 64] maps that are noise times meaning."""
    noise, meaning = torch.rand(2, 3, 4, 64, generator=generator(seed), dtype=torch.float64) + 0.01
    noise = noise / noise.sum(-1, keepdim=True)
    meaning = meaning / (noise * meaning).sum(-1, keepdim=True)
    return difference(page.contrast(noise * meaning, noise, 0.0), meaning)


@torch.no_grad()
def attention(scenes: Sequence[Scene], text: str) -> Tensor:
    """[scenes, 1, layers, P] from the first word of the answer to the image's tokens, mean over heads."""
    model, found = shipped().model, []
    observer = Observer("last_row", Site("weights", tower="text", phase="prefill"), name="row")
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        inputs = inputs_of(part, [text] * len(part))
        with attach(model, observer) as attached:
            model(**inputs, logits_to_keep=1)
        rows = [
            x.mean(1)[:, 1 : 1 + 4 * GRID**2]
            for _, _, x in sorted(attached.records["row"], key=lambda r: r[0])
        ]
        found.append(torch.stack(rows, 1)[:, None])
    return torch.cat(found)


def maps(questions: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    """Of the questions and of the description of their scenes."""
    asked_for = torch.cat([attention([q.scene], q.question.text) for q in questions])
    return asked_for, attention([q.scene for q in questions], DESCRIBE)


def target(scene: Scene) -> Tensor:
    """[P] the four tokens of the digit's cell."""
    row, column = divmod(scene.of("digit")[0].cell, GRID)
    found = torch.zeros(2 * GRID, 2 * GRID, dtype=torch.bool)
    found[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = True
    return found.flatten()


def found_by(
    questions: Sequence[Asked], own: Tensor, general: Tensor, cfg: page.Config
) -> dict[str, list[float]]:
    """AUC of each question by the contrast, by its map as it is, and by the description's alone."""
    even = torch.ones_like(general)
    sides = {"contrast": (own, general), "question": (own, even), "general": (general, even)}
    return {
        name: [auroc(page.fuse(x, y, cfg), target(q.scene)) for q, x, y in zip(questions, a, b, strict=True)]
        for name, (a, b) in sides.items()
    }


@torch.no_grad()
def refined_answers(questions: Sequence[Asked], own: Tensor, general: Tensor) -> float:
    """Share of right first words on refined pictures alone."""
    model, processor, hits = shipped().model, shipped().processor, []
    for q, x, y in zip(questions, own, general, strict=True):
        inputs = inputs_of([q.scene], [q.question.text])
        focus = page.measure(x, y, inputs["pixel_values"][0], (2 * GRID, 2 * GRID), SETTINGS)
        best = (
            model(**{**inputs, "pixel_values": focus.pixels[None]}, logits_to_keep=1).logits[0, -1].argmax()
        )
        hits.append(processor.tokenizer.convert_ids_to_tokens(int(best)) == q.question.answer)
    return mean(hits)


def measure() -> Measured:
    with threads(2):
        numbers: dict = {"farthest_from_the_meaning": max(factorised(seed) for seed in range(10))}
        questions = [q for kind in KINDS for q in asked(kind, EACH, f"carve {kind}")]
        own, general = maps(questions)
        found = found_by(questions, own, general, SETTINGS)
        gains = torch.tensor(found["contrast"]) - torch.tensor(found["question"])
        gain = gains.mean().item()
        by_layer = [
            found_by(questions, own[:, :, n : n + 1], general[:, :, n : n + 1], SETTINGS)
            for n in range(own.shape[2])
        ]
        numbers |= {f"auc_{name}": mean(values) for name, values in found.items()}
        numbers |= {"gain": gain, "standard_error": gains.std().item() / sqrt(len(gains))}
        numbers |= {f"auc_{name}_by_layer": [mean(layer[name]) for layer in by_layer] for name in found}
        numbers |= {
            "accuracy": mean(correct(None, questions)),
            "accuracy_on_refined_pictures": refined_answers(questions, own, general),
        }
    parts = {
        "the meaning on factorised maps": numbers["farthest_from_the_meaning"] < 1e-5,
        "contrast over the question": gain >= 0.05,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="carve",
    statement=(
        "where a question's attention is noise times meaning and a general instruction's the noise, their contrast is "
        "the meaning; on a small vision-language model it finds the digit that is asked for better than the question's "
        "attention alone"
    ),
    bound="max abs error < 1e-5 at λ = 0 on factorised maps; mean AUC of the contrast >= that of A_q + 0.05",
    measure=measure,
    fails=("contrast over the question",),
    contradicted=(
        "the theorem holds to the last bit. On the shipped model the contrast is above the question's own attention by "
        "0.038 (standard error 0.007) in the layer that was chosen, 0.850 to 0.812, and below it where that is best "
        "(0.855 to 0.865, layer 3): this model's questions attend to the digit as they are. What a description's first "
        "word attends to is no noise here but what the caption names first, so that the digit is less in it than "
        "elsewhere (AUC 0.28). On scenes of another seed no layer, none of 3 to 5 together, no λ of 1e-8 to 0.05, no "
        "contrast of things from 0.9 to 0.2 gains 0.05 on both kinds of questions. Asked of refined pictures alone the "
        "model, which knows things of one size, falls from 93 to 70 %"
    ),
)
