"""QuoTA's claim, on the shipped vision-language model: tokens go to the frame that the question is about.

A clip is `FRAMES` clear scenes in one prompt, one of them with a digit, and the question is which colour the digit has:
never its usual one, which would be a good guess. The shipped model was trained on one whole image a prompt, and reads
next to nothing off a resized one. So its decoder learns to (tower and projector stay): clips whose frames have any
number of tokens each, evenly shared or not, so that no way to share is what it knows best.

The question is decoupled by hand into what to look for, the digit: "is there a 7 ?". The scorer is a copy of the
shipped model that has learnt to answer it of a single whole frame, with or without that digit; a frame's score is how
likely it says yes. (The shipped model itself tells digits by their usual colours: of those in another one it names
none.) The page shares `BUDGET` of the clip's tokens by these scores (power 2, the paper's), or evenly (power 0). Beside
it: whole clips; the scores moved on by a frame, so that another gets the tokens; how often the frame with the digit has
the highest score; and quotas summed on random scores, sizes and budgets. Scoring reads all tokens of a clip, so that
nothing is saved here.

Settings were looked at on seed 0.
"""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.attaching.attachment import attach
from regard.attaching.reduction import Reduction
from regard.claims.lab import generator, mean, threads
from regard.claims.shipped_vlm import inputs_of, shipped
from regard.core import Method
from regard.core.claim import Claim, Measured
from regard.methods.tokens import quota as page
from regard.tasks.scene_questions import Question, asked_colour
from regard.tasks.scenes import CLEAR, DIGITS, Scene, Scenes
from regard.train.loop import fit, one_cycle

SEEDS, FRAMES, COUNT = (1, 2, 3), 4, 96
BUDGET = 47  # tokens, 18 % of a clip's, the share of the released code
PATCHES, GRID = 64, (8, 8)
STEPS, LOOKS, BATCH, RATE, POOL = 250, 150, 32, 1e-3, 2000
SHARED = (32, 160)  # tokens of a clip in training
SIDES: dict[str, dict[str, Any]] = {"quota": {}, "uniform": {"power": 0.0}, "moved": {}}


@dataclass(frozen=True)
class Clip:
    frames: list[Scene]
    question: Question
    digit: str
    at: int  # the frame that has it


def clips(scenes: Scenes, count: int) -> list[Clip]:
    found: list[Clip] = []
    having: list[Scene] = []
    others: list[Scene] = []
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


# the decoder learns from resized frames


@torch.no_grad()
def features(scenes: list[Scene], batch: int = 250) -> Tensor:
    """[scenes, PATCHES, width] what the decoder is given of each."""
    model, found = shipped().model, []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        pixels = inputs_of(part, ["."] * len(part))["pixel_values"]
        seen = model.model.get_image_features(pixel_values=pixels).pooler_output
        found.append(torch.stack([x.view(PATCHES, -1) for x in seen]))
    return torch.cat(found)


def any_quotas(rng: random.Random) -> list[int]:
    """Evenly shared in three clips of ten, else by random weights."""
    even = rng.random() < 0.3
    weights = [1.0 if even else rng.expovariate(1) for _ in range(FRAMES)]
    sizes = torch.full((FRAMES,), PATCHES)
    return page.quotas(torch.tensor(weights), sizes, rng.randint(*SHARED), page.Config()).tolist()


@dataclass(frozen=True)
class Pool:
    """Clips' frames as the decoder is given them: features [N, PATCHES, width], rows of those with a digit, others."""

    scenes: list[Scene]
    features: Tensor
    having: list[int]
    others: list[int]

    def batch(self, rng: random.Random) -> list[tuple[list[int], int]]:
        """(rows of the frames, which of them has the digit)"""
        found = []
        for _ in range(BATCH):
            rows, at = rng.sample(self.others, FRAMES - 1), rng.randrange(FRAMES)
            rows.insert(at, rng.choice(self.having))
            found.append((rows, at))
        return found


@cache
def pool(seed: int) -> Pool:
    scenes = Scenes(f"quota pool {seed}", conflict=True, contrast=CLEAR).many(POOL)
    having = [i for i, scene in enumerate(scenes) if scene.of("digit")]
    others = [i for i, scene in enumerate(scenes) if not scene.of("digit")]
    return Pool(scenes, features(scenes), having, others)


def prompt(
    model: Any, given: Pool, drawn: list[tuple[list[int], int]], shares: list[int]
) -> tuple[dict, Tensor]:
    """Embedded clips whose frames have so many tokens, at the positions where they are in a whole clip, and answers."""
    ids, table = shipped().processor.tokenizer.convert_tokens_to_ids, model.get_input_embeddings()
    parts = [table(torch.full((len(drawn), 1), ids("<s>")))]
    places = [torch.zeros(1, dtype=torch.long)]
    for f, share in enumerate(shares):
        keep, weights = page.layout(share, GRID)
        parts.append(weights.float() @ given.features[[rows[f] for rows, _ in drawn]])
        places.append(1 + PATCHES * f + keep)
    digits = [given.scenes[rows[at]].of("digit")[0] for rows, at in drawn]
    words = torch.tensor([ids(f"what colour is the {d.name} ?".split()) for d in digits])
    parts.append(table(words))
    places.append(1 + PATCHES * FRAMES + torch.arange(words.shape[1]))
    inputs = {"inputs_embeds": torch.cat(parts, 1), "position_ids": torch.cat(places).expand(len(drawn), -1)}
    return inputs, torch.tensor([ids(d.colour) for d in digits])


def learnt(seed: int) -> Any:
    """The shipped model with a decoder that has learnt from resized frames."""
    model, given = deepcopy(shipped().model), pool(seed)

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"quota {seed} {step}")
        inputs, answers = prompt(model, given, given.batch(rng), any_quotas(rng))
        return F.cross_entropy(model(**inputs, logits_to_keep=1).logits[:, -1], answers)

    return with_decoder(model, loss_at, STEPS)


@cache
def scorer() -> Any:
    """The shipped model with a decoder that says whether a digit is there: on half of the frames, it is."""
    model, given = deepcopy(shipped().model), pool(0)
    ids = shipped().processor.tokenizer.convert_tokens_to_ids
    table = model.get_input_embeddings()

    def loss_at(step: int) -> Tensor:
        rng, rows, names = random.Random(f"quota scorer {step}"), [], []
        for n in range(BATCH):
            # without it: half of the frames have another digit, half have none
            rows.append(rng.choice(given.others if n % 4 == 3 else given.having))
            there = [d.name for d in given.scenes[rows[-1]].of("digit")]
            names.append(there[0] if n % 2 == 0 else rng.choice([d for d in DIGITS if d not in there]))
        words = torch.tensor([ids(look_for(name).split()) for name in names])
        begin = table(torch.full((BATCH, 1), ids("<s>")))
        inputs = torch.cat([begin, given.features[rows], table(words)], 1)
        answers = torch.tensor(ids(["yes", "no"] * (BATCH // 2)))
        return F.cross_entropy(model(inputs_embeds=inputs, logits_to_keep=1).logits[:, -1], answers)

    return with_decoder(model, loss_at, LOOKS)


def with_decoder(model: Any, loss_at: Callable[[int], Tensor], steps: int) -> Any:
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    fit(torch.optim.AdamW(trained, RATE, weight_decay=0.01), loss_at, steps, schedule=one_cycle())
    return model.eval().requires_grad_(False)


def look_for(digit: str) -> str:
    return f"is there a {digit} ?"


# what is asked


def relevance(given: list[Clip]) -> Tensor:
    """[clips, FRAMES] how likely each frame, alone, is said to have the digit."""
    model, found, yes = scorer(), [], shipped().processor.tokenizer.convert_tokens_to_ids("yes")
    for clip in given:
        inputs = inputs_of(clip.frames, [look_for(clip.digit)] * FRAMES)
        with torch.no_grad():
            found.append(page.affirmative(model(**inputs, logits_to_keep=1).logits[:, -1], yes))
    return torch.stack(found)


@torch.no_grad()
def answered(model: Any, clip: Clip, cfg: page.Config) -> tuple[bool, list[int]]:
    """Whether the answer is right, and how many visual tokens each layer saw."""
    processor = shipped().processor
    text = " ".join([processor.image_token] * FRAMES + [clip.question.text])
    images = [frame.pixels() for frame in clip.frames]
    inputs = dict(processor(text=[text], images=images, return_tensors="pt", padding=True))
    reduction = Reduction(Method("quota", page.METHOD, cfg))
    with attach(model, reduction):
        best = model(**inputs, logits_to_keep=1).logits[0, -1].argmax().item()
    return processor.tokenizer.convert_ids_to_tokens(best) == clip.question.answer, reduction.kept[0]


def judged(model: Any, given: list[Clip], scores: Tensor, **settings: Any) -> tuple[float, int]:
    """Percent right, and the largest distance of the visual tokens that a layer saw from the budget."""
    right, off = [], 0
    for clip, row in zip(given, scores.tolist(), strict=True):
        answer, seen = answered(model, clip, page.Config(keep=BUDGET, relevance=tuple(row), **settings))
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
    given = clips(Scenes(f"quota {seed}", conflict=True, contrast=CLEAR), COUNT)
    model, scores, numbers = learnt(seed), relevance(given), {}
    numbers["whole"] = 100 * mean(answered(model, clip, page.Config(keep=1.0))[0] for clip in given)
    for name, settings in SIDES.items():
        used = scores.roll(1, 1) if name == "moved" else scores
        numbers[name], numbers[f"sum_off_{name}"] = judged(model, given, used, **settings)
    found = [row.argmax().item() == clip.at for row, clip in zip(scores, given, strict=True)]
    return numbers | {"frame_found": 100 * mean(found)}


def measure() -> Measured:
    with threads(1):
        runs = [run(seed) for seed in SEEDS]
    numbers: dict[str, Any] = {key: [found[key] for found in runs] for key in runs[0]}
    gains = [a - b for a, b in zip(numbers["quota"], numbers["uniform"], strict=True)]
    off = max(farthest_sum(200), *(x for name in SIDES for x in numbers[f"sum_off_{name}"]))
    numbers |= {"sum_off": off, "gain": mean(gains), "gains": gains}
    parts = {"sums exact": off == 0, "over uniform": mean(gains) >= 5}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="quota",
    statement=(
        "quotas sum exactly to the budget, and on clips of scenes budgets weighted by the question answer 'what colour "
        "is the 7' better than uniform budgets of equal size"
    ),
    bound="sum exact; accuracy >= uniform + 5 points, means of three seeds of 96 clips",
    measure=measure,
)
