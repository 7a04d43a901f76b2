"""What claims on the shipped vision-language model share: scenes with questions, answers and captions under a method.

A method is whatever `attach` takes, or None for the model as it is. Answers are greedy.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.models.shipped import load_shipped
from regard.tasks.scene_questions import ASKED, DESCRIBE, Question, exists
from regard.tasks.scenes import CLEAR, PAIRS, Scene, Scenes, partner

LONGEST = {"describe": 32, "word": 4, "where": 3}  # tokens of an answer, its end included; of other kinds 2


@dataclass(frozen=True)
class Shipped:
    model: Any
    processor: Any


@cache
def shipped() -> Shipped:
    """The model in float32, in eval mode, and its processor; loaded once."""
    return Shipped(*load_shipped("vlm"))


@dataclass(frozen=True)
class Asked:
    scene: Scene
    question: Question


def asked(kind: str, count: int, seed: int | str, **how: Any) -> list[Asked]:
    """So many questions of a kind on scenes of their own; `how` is that of Scenes (conflict, contrast)."""
    scenes, found = Scenes(seed, **{"contrast": CLEAR, **how}), []
    while len(found) < count:
        scene = scenes.draw()
        question = ASKED[kind](scene, scenes.rng)
        if question is not None:
            found.append(Asked(scene, question))
    return found


def asked_partners(count: int, seed: int | str, **how: Any) -> list[Asked]:
    """Whether the partner of what is there is there too; on conflicting scenes it never is. Half ask for what is."""
    scenes, found = Scenes(seed, **{"contrast": CLEAR, **how}), []
    rng = random.Random(f"partners {seed}")
    for i in range(count):
        scene = scenes.draw()
        one = rng.choice(scene.shapes)
        pair = one if i % 2 else partner(one)
        found.append(Asked(scene, exists(pair, pair in scene.shapes)))
    return found


def inputs_of(
    scenes: Sequence[Scene], texts: Sequence[str], change: Callable[[Any], Any] | None = None
) -> dict:
    """What the processor makes of scenes and texts, padded on the left; `change` acts on pixels [32, 32, 3] first."""
    pictures = [scene.pixels() if change is None else change(scene.pixels()) for scene in scenes]
    processor = shipped().processor
    prompts = [f"{processor.image_token} {text}" for text in texts]
    return dict(processor(text=prompts, images=pictures, return_tensors="pt", padding=True))


@torch.no_grad()
def generated(method: Any, scenes: Sequence[Scene], texts: Sequence[str], tokens: int, batch: int = 32,
              **settings: Any) -> list[str]:  # fmt: skip
    """What the model says, greedily, of each scene when it is asked each text."""
    model, processor = shipped().model, shipped().processor
    said: list[str] = []
    for start in range(0, len(scenes), batch):
        part = slice(start, start + batch)
        inputs = inputs_of(scenes[part], texts[part])
        with nullcontext() if method is None else attach(model, method):
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **settings)
        new = ids[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return said


def correct(method: Any, questions: Sequence[Asked], batch: int = 32) -> list[bool]:
    """Whether each whole answer is right."""
    tokens = max(LONGEST.get(q.question.kind, 2) for q in questions)
    said = generated(
        method, [q.scene for q in questions], [q.question.text for q in questions], tokens, batch
    )
    return [text == q.question.answer for text, q in zip(said, questions, strict=True)]


def accuracy(method: Any, questions: Sequence[Asked], batch: int = 32) -> float:
    right = correct(method, questions, batch)
    return sum(right) / len(right)


@torch.no_grad()
def next_logits(method: Any, questions: Sequence[Asked], batch: int = 32) -> Tensor:
    """[questions, V] logits of the first token of the answer."""
    model, found = shipped().model, []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        inputs = inputs_of([q.scene for q in part], [q.question.text for q in part])
        with nullcontext() if method is None else attach(model, method):
            found.append(model(**inputs, logits_to_keep=1).logits[:, -1].float())
    return torch.cat(found)


def said_yes(method: Any, questions: Sequence[Asked], batch: int = 32) -> list[bool]:
    """Whether "yes" is more likely than "no" as the first token."""
    yes, no = shipped().processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    logits = next_logits(method, questions, batch)
    return (logits[:, yes] > logits[:, no]).tolist()


def captions(method: Any, scenes: Sequence[Scene], batch: int = 32, **settings: Any) -> list[str]:
    return generated(method, scenes, [DESCRIBE] * len(scenes), LONGEST["describe"], batch, **settings)


def named(caption: str) -> list[tuple[str, str]]:
    """Coloured shapes of a caption, as often as they are named."""
    words = caption.split()
    return [pair for pair in pairwise(words) if pair in PAIRS]


def chair_counts(caption: str, scene: Scene) -> tuple[int, int, int, int]:
    """(named but absent, named, present and named at least once, present) coloured shapes."""
    there, said = {*scene.shapes}, named(caption)
    return sum(p not in there for p in said), len(said), len(there & {*said}), len(there)


def chair(spoken: Sequence[str], scenes: Sequence[Scene]) -> tuple[float, float]:
    """(CHAIR_I: share of mentions that are of what is absent; recall)."""
    false, said, found, there = (sum(x) for x in zip(*map(chair_counts, spoken, scenes)))
    return false / max(said, 1), found / max(there, 1)


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """torch's generator from a seed, afterwards where it stood."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
