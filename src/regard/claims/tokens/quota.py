"""QuoTA's claim, on the shipped vision-language model: tokens go to the frame that the question is about.

A clip is `FRAMES` clear scenes in one prompt, one of them with a digit, and the question is which colour the digit has:
never its usual one, which would be a good guess. The question is decoupled by hand into what to look for, the digit; a
frame's score is how likely the model, shown it alone and asked what digit there is, says that one. The page shares
`BUDGET` of the clip's tokens by these scores (power 2, the paper's), or evenly (power 0).

The model was trained on one image a prompt: whole clips, reported, say how well it reads several. Beside it: the
scores moved on by a frame, so that another gets the tokens; how often the frame with the digit has the highest score;
and quotas summed on random scores, sizes and budgets. Scoring reads all tokens of a clip, so that nothing is saved.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.attaching.reduction import Reduction
from regard.claims.lab import generator, mean, threads
from regard.claims.shipped_vlm import Asked, next_logits, shipped
from regard.core import Claim, Measured, Method
from regard.methods.tokens import quota as page
from regard.tasks.scene_questions import Question, asked_colour
from regard.tasks.scenes import CLEAR, Scene, Scenes

SEEDS, FRAMES, COUNT = (1, 2, 3), 4, 96
BUDGET = 47  # tokens, 18 % of a clip's, the share of the released code
LOOK = "what digit is there ?"
SIDES: dict[str, dict[str, Any]] = {"quota": {}, "uniform": {"power": 0.0}, "moved": {}}


@dataclass(frozen=True)
class Clip:
    frames: list[Scene]
    question: Question
    digit: str
    at: int  # the frame that has it


def clips(seed: int, count: int = COUNT) -> list[Clip]:
    scenes = Scenes(f"quota {seed}", conflict=True, contrast=CLEAR)
    found, having, others = [], [], []
    while len(found) < count:
        scene = scenes.draw()
        (having if scene.of("digit") else others).append(scene)
        if having and len(others) >= FRAMES - 1:
            own, at = having.pop(), scenes.rng.randrange(FRAMES)
            frames = [others.pop() for _ in range(FRAMES - 1)]
            frames.insert(at, own)
            question = asked_colour(own, scenes.rng)
            assert question is not None
            found.append(Clip(frames, question, own.of("digit")[0].name, at))
    return found


def relevance(given: list[Clip]) -> Tensor:
    """[clips, FRAMES] how likely each frame, alone, is said to have the digit."""
    alone = [Asked(frame, Question("digit", LOOK, clip.digit)) for clip in given for frame in clip.frames]
    logits = next_logits(None, alone).view(len(given), FRAMES, -1)
    ids = shipped().processor.tokenizer.convert_tokens_to_ids([clip.digit for clip in given])
    return torch.stack([page.affirmative(x, i) for x, i in zip(logits, ids, strict=True)])


@torch.no_grad()
def answered(clip: Clip, cfg: page.Config | None) -> tuple[bool, list[int]]:
    """Whether the answer is right, and how many visual tokens each layer saw."""
    model, processor = shipped().model, shipped().processor
    text = " ".join([processor.image_token] * FRAMES + [clip.question.text])
    inputs = dict(
        processor(text=[text], images=[f.pixels() for f in clip.frames], return_tensors="pt", padding=True)
    )
    reduction = Reduction(Method("quota", page.METHOD, cfg or page.Config(keep=1.0)))
    with attach(model, reduction):
        best = model(**inputs, logits_to_keep=1).logits[0, -1].argmax().item()
    return processor.tokenizer.convert_ids_to_tokens(best) == clip.question.answer, reduction.kept[0]


def judged(given: list[Clip], scores: Tensor, **settings: Any) -> tuple[float, int]:
    """Percent right, and the largest distance of the visual tokens that a layer saw from the budget."""
    right, off = [], 0
    for clip, row in zip(given, scores.tolist(), strict=True):
        answer, seen = answered(clip, page.Config(keep=BUDGET, relevance=tuple(row), **settings))
        right.append(answer)
        off = max(off, *(abs(n - BUDGET) for n in seen))
    return 100 * mean(right), off


def farthest_sum(tries: int, seed: int = 0) -> int:
    """Largest |Σ quotas - budget| over random frames, scores and budgets, and how many leave their bounds."""
    g, worst = generator(seed), 0
    for _ in range(tries):
        frames, minimum, power = (int(torch.randint(1, high, (), generator=g)) for high in (40, 4, 4))
        tokens = torch.randint(minimum, 200, (frames,), generator=g)
        budget = int(torch.randint(minimum * frames, int(tokens.sum()) + 1, (), generator=g))
        cfg = page.Config(minimum=minimum, power=float(power))
        found = page.quotas(torch.rand(frames, generator=g), tokens, budget, cfg)
        out = int(((found > tokens) | (found < minimum)).sum())
        worst = max(worst, abs(int(found.sum()) - budget), out)
    return worst


def run(seed: int) -> dict[str, float]:
    given = clips(seed)
    scores, numbers = relevance(given), {}
    numbers["whole"] = 100 * mean(answered(clip, None)[0] for clip in given)
    for name, settings in SIDES.items():
        used = scores.roll(1, 1) if name == "moved" else scores
        numbers[name], numbers[f"sum_off_{name}"] = judged(given, used, **settings)
    numbers["frame_found"] = 100 * mean(
        row.argmax().item() == clip.at for row, clip in zip(scores, given, strict=True)
    )
    return numbers


def measure() -> Measured:
    with threads(1):
        runs = [run(seed) for seed in SEEDS]
    numbers: dict[str, Any] = {key: [found[key] for found in runs] for key in runs[0]}
    gains = [a - b for a, b in zip(numbers["quota"], numbers["uniform"], strict=True)]
    off = max(farthest_sum(200), *(x for name in SIDES for x in numbers[f"sum_off_{name}"]))
    numbers |= {"sum_off": off, "gain": mean(gains), "gains": gains}
    return Measured(off == 0 and mean(gains) >= 5, numbers)


CLAIM = Claim(
    name="quota",
    statement=(
        "quotas sum exactly to the budget, and on clips of scenes budgets weighted by the question answer 'what colour "
        "is the 7' better than uniform budgets of equal size"
    ),
    bound="sum exact; accuracy >= uniform + 5 points, means of three seeds of 96 clips",
    measure=measure,
)
