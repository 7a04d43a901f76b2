"""QuoTA's claim: of frames that share a budget, a digit's colour is read better where its frame gets more of it.

A clip has 4 frames of 16 cells: 6 coloured digits and 10 distractors in each; the digit that is asked for is in one
frame alone. The reader learned "which colour was the 7" on clips of which half the frames were cut to any size, so
that it knows short frames, and "is there a 7" on single whole frames. With the second question, which is the first
decoupled by hand, it scores the frames; the page shares 24 of the clip's 64 tokens by these scores, or evenly (power
0).

Quotas are also summed on random scores, sizes and budgets. Reported beside it: the scores moved on by a frame (so
that another frame gets the tokens), whole clips, and how often the frame that holds the digit gets the highest score.
Scoring reads all 64 tokens of a clip, so that nothing is saved here. Settings were written down before anything was
measured.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.claims.digit_reader import (
    BATCH,
    CELLS,
    DIGITS,
    NOTHING,
    SIDE,
    Reader,
    Scene,
    cells,
    disordered,
    learned,
    sighted,
    single,
)
from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured
from regard.methods.tokens import quota as page
from regard.ops.images import ImageView, Reduced

SEEDS, FRAMES, BUDGET, STEPS, TESTED = (0, 1, 2), 4, 24, 700, 1000
COLOURS = torch.tensor([[1.0, 0.1, 0.1], [0.1, 0.9, 0.1], [0.2, 0.3, 1.0], [0.95, 0.9, 0.1]])
COLOUR, THERE, YES, NO = 10, 11, 4, 5  # words after the digits; answers after the colours
SETTINGS = {"quota": {}, "uniform": {"power": 0.0}, "moved": {}, "whole": {"keep": 1.0}}


def clips(part: str, count: int, frames: int, g: torch.Generator, there: bool) -> tuple[Scene, Tensor]:
    """Clips [B, frames · 16, 192] and the cell of the digit asked for; `there`: half ask for one that is not there."""
    total = frames * CELLS
    pixels, labels = cells(part, (count, total), g)
    digit = torch.rand(count, frames, CELLS, generator=g).argsort(2).flatten(1) < DIGITS
    place = torch.where(digit, torch.rand(count, total, generator=g), 0).argmax(1)
    asked = labels.gather(1, place[:, None])[:, 0]
    missing = (torch.rand(count, generator=g) < 0.5) & there
    same = labels == asked[:, None]
    keeps = (torch.arange(total) == place[:, None]) & ~missing[:, None]
    # what else looks like the digit asked for becomes a distractor, and so does that digit where it is to be missing
    shown = digit & (~same | keeps)
    pixels = pixels.where(shown[..., None], disordered(pixels, g))
    colour = torch.randint(0, len(COLOURS), labels.shape, generator=g)
    painted = (pixels[..., None] * COLOURS[colour][:, :, None]).flatten(2)
    answers = torch.where(missing, NO, YES) if there else colour.gather(1, place[:, None])[:, 0]
    words = torch.stack([asked, torch.full_like(asked, THERE if there else COLOUR)], dim=1)
    return Scene(painted, words, answers), place


@cache
def cuts() -> tuple[Tensor, Tensor]:
    """Of quotas 0 .. 16: which cells new tokens stand at [17, 16], and weights [17, 16, 16], padded with zeros."""
    at, weights = torch.zeros(CELLS + 1, CELLS, dtype=torch.long), torch.zeros(CELLS + 1, CELLS, CELLS)
    for quota in range(1, CELLS + 1):
        keep, mix = page.layout(quota, (SIDE, SIDE))
        at[quota, :quota], weights[quota, :quota] = keep, mix.float()
    return at, weights


def cut(tokens: Tensor, quotas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, F · 16, w] of frames cut to quotas [B, F]; their places and which are there, both [B, F · 16]."""
    at, weights = cuts()
    frames = tokens.unflatten(1, (-1, CELLS))
    places = at[quotas] + CELLS * torch.arange(frames.shape[1])[:, None]
    seen = torch.arange(CELLS) < quotas[..., None]
    return (weights[quotas] @ frames).flatten(1, 2), places.flatten(1), seen.flatten(1)


def answer(model: Reader, scene: Scene, quotas: Tensor) -> Tensor:
    tokens, places, seen = cut(model.look(scene.cells), quotas)
    return model(tokens, scene.words, places=places, seen=seen)


def reader_of_clips(seed: int) -> Reader:
    def loss_at(g: torch.Generator) -> Tensor:
        clip, _ = clips("train", BATCH, FRAMES, g, there=False)
        frame, _ = clips("train", BATCH, 1, g, there=True)
        quotas = torch.randint(1, CELLS + 1, (BATCH, FRAMES), generator=g)
        quotas = quotas.where(torch.rand(quotas.shape, generator=g) < 0.5, CELLS)
        found = F.cross_entropy(answer(model, clip, quotas), clip.answers)
        return found + F.cross_entropy(answer(model, frame, torch.full((BATCH, 1), CELLS)), frame.answers)

    def draw(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        pixels, kind = single(g)
        colour = torch.randint(0, len(COLOURS), kind.shape, generator=g)
        return (pixels[..., None] * COLOURS[colour][:, None]).flatten(1), kind, colour

    model = Reader(3 * 64, FRAMES * CELLS, 2, 12, 6, 2, seed)
    return learned(sighted(model, draw, [NOTHING + 1, len(COLOURS)], seed), loss_at, STEPS, seed)


@torch.no_grad()
def relevance(model: Reader, scene: Scene) -> Tensor:
    """[B, F] how likely the reader says yes to "is there a 7" of each frame."""
    frames = scene.cells.unflatten(1, (FRAMES, CELLS)).flatten(0, 1)
    words = torch.stack([scene.words[:, 0], torch.full_like(scene.words[:, 0], THERE)], dim=1)
    logits = model(model.look(frames), words.repeat_interleave(FRAMES, 0))
    return page.affirmative(logits, YES).view(-1, FRAMES)


def reduced(tokens: Tensor, scores: Tensor, cfg: page.Config) -> list[Reduced]:
    """What the page leaves of a clip's tokens [F · 16, w]."""
    frames = tokens.split(CELLS)
    views = [
        ImageView(x, (SIDE, SIDE), number=i, of=FRAMES, relevance=score)
        for i, (x, score) in enumerate(zip(frames, scores.tolist(), strict=True))
    ]
    return page.METHOD.before(views, cfg)


@torch.no_grad()
def judged(model: Reader, scene: Scene, scores: Tensor, cfg: page.Config) -> tuple[float, list[int]]:
    """Percent right, and how many tokens each clip is left with."""
    tokens, counts = model.look(scene.cells), []
    left, places = torch.zeros_like(tokens), torch.zeros(tokens.shape[:2], dtype=torch.long)
    for b in range(len(tokens)):
        found = reduced(tokens[b], scores[b], cfg)
        features = [
            x[r.keep] if r.features is None else r.features for x, r in zip(tokens[b].split(CELLS), found)
        ]
        counts.append(sum(len(x) for x in features))
        left[b, : counts[-1]] = torch.cat(features)
        places[b, : counts[-1]] = torch.cat([CELLS * i + r.keep for i, r in enumerate(found)])
    seen = torch.arange(tokens.shape[1]) < torch.tensor(counts)[:, None]
    right = model(left, scene.words, places=places, seen=seen).argmax(1) == scene.answers
    return 100 * right.double().mean().item(), counts


def farthest_sum(tries: int, seed: int = 0) -> int:
    """Largest |Σ quotas - budget| over random frames, scores and budgets."""
    g, worst = generator(seed), 0
    for _ in range(tries):
        frames, minimum, power = (int(torch.randint(1, high, (), generator=g)) for high in (40, 4, 4))
        tokens = torch.randint(minimum, 200, (frames,), generator=g)
        budget = int(torch.randint(minimum * frames, int(tokens.sum()) + 1, (), generator=g))
        cfg = page.Config(minimum=minimum, power=float(power))
        found = page.quotas(torch.rand(frames, generator=g), tokens, budget, cfg)
        worst = max(
            worst, abs(int(found.sum()) - budget), int((found > tokens).sum()), int((found < minimum).sum())
        )
    return worst


def numbers_of(seed: int) -> dict[str, float]:
    model = reader_of_clips(seed)
    scene, place = clips("test", TESTED, FRAMES, generator(1000 + seed), there=False)
    scores, numbers = relevance(model, scene), {}
    for name, settings in SETTINGS.items():
        cfg = page.Config(**{"keep": BUDGET, **settings})
        numbers[name], counts = judged(model, scene, scores.roll(1, 1) if name == "moved" else scores, cfg)
        wanted = FRAMES * CELLS if name == "whole" else BUDGET
        numbers[f"sum_off_{name}"] = max(abs(count - wanted) for count in counts)
    found = scores.argmax(1) == place // CELLS
    return {**numbers, "frame_found": 100 * found.double().mean().item()}


def measure() -> Measured:
    with threads(1):
        found = [numbers_of(seed) for seed in SEEDS]
    numbers = {key: [row[key] for row in found] for key in found[0]}
    gains = [a - b for a, b in zip(numbers["quota"], numbers["uniform"], strict=True)]
    off = max(farthest_sum(200), *(x for name in SETTINGS for x in numbers[f"sum_off_{name}"]))
    return Measured(
        off == 0 and mean(gains) >= 5, {"sum_off": off, "gain": mean(gains), "gains": gains, **numbers}
    )


CLAIM = Claim(
    name="quota",
    statement=(
        "quotas sum exactly to the budget, and on clips of handwritten digits budgets weighted by the question answer "
        "'which colour was the 7' better than uniform budgets of equal size"
    ),
    bound="sum exact; accuracy >= uniform + 5 points, means over 3 seeds",
    measure=measure,
)
