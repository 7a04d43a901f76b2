"""Laws of what answers are worth by a task's own metric: right ones 1, wrong ones 0, half of them a half.

A right answer is what the page says, written by somebody who knows only that: it has room in what is generated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from regard.bench.passes import Pass
from regard.bench.pictures import SCORES, Answers
from regard.bench.quality import quality
from regard.core import Method
from regard.tasks import Sample
from regard.tasks.base import encode
from regard.tasks.pictures import PictureQuestion
from regard.tasks.ruler import listing
from regard.testing.tokenizers import WordTokenizer, samples

NEAR = 1e-4


def check_scores(method: Method) -> None:
    """On four samples: all right, all wrong, the first two right, and a part of each answer where it has parts."""
    tokenizer, metric = WordTokenizer(), method.page.metric
    drawn = samples(method, 512, 4, 0, tokenizer)
    if metric == "nll":
        return hold_likelihood(method.label, drawn, tokenizer)
    right = [right_answer(s, tokenizer) for s in drawn]
    wrong = [[0] * len(ids) for ids in right]
    parts = max(len(drawn[0].answers), len(drawn[0].wanted))
    some = [right_answer(s, tokenizer, 1) for s in drawn]
    for said, worth in ((right, 1.0), (wrong, 0.0), (right[:2] + wrong[2:], 0.5), (some, 1 / parts)):
        found = quality(metric, drawn, [sure(said, tokenizer)], [sure(right, tokenizer)], tokenizer)
        assert abs(found["quality"] - worth) < NEAR, (
            f"{method.label}: {found['quality']} where {worth} is right"
        )
        assert found["quality_low"] <= found["quality"] <= found["quality_high"]
    return None


def right_answer(sample: Sample, tokenizer: Any, parts: int | None = None) -> list[int]:
    """The ids of a right answer, or of its first parts and then of none, as many as are generated."""
    count = sum(map(len, sample.answers))
    if sample.wanted:
        said = encode(tokenizer, f" {listing([w.strip() for w in sample.wanted[:parts]])}.")
    else:
        said = [i for answer in sample.answers[:parts] for i in answer]
    return (said + [0] * count)[:count]


def sure(said: Sequence[Sequence[int]], tokenizer: Any, probability: float = 1 - 1e-6) -> Pass:
    """A pass that gives each of these tokens this probability, and the rest to the first token of the vocabulary."""
    ids = torch.tensor(said)
    odds = torch.full((*ids.shape, len(tokenizer)), 1e-12)
    odds[..., 0] = 1 - probability
    return Pass(odds.scatter(-1, ids[..., None], probability).log(), 0.0, [0.0], 0, 0, 0.0)


def hold_likelihood(label: str, drawn: Sequence[Sample], tokenizer: Any) -> None:
    """Half of full attention's probability for each token is worth a half, twice of it two."""
    answers = [s.answer for s in drawn]
    full, half = (sure(answers, tokenizer, p) for p in (0.5, 0.25))
    for ours, base, worth in ((full, full, 1.0), (half, full, 0.5), (full, half, 2.0)):
        found = quality("nll", drawn, [ours], [base], tokenizer)["quality"]
        assert abs(found - worth) < NEAR, f"{label}: {found} where {worth} is right"


# Answers about images


def check_pictures(method: Method) -> None:
    """Questions on as many images as asked; a seed fixes them, another gives others."""
    first, again, other = (method.page.pictures(method.config, 6, seed) for seed in (0, 0, 1))
    assert len({q.image for q in first}) == 6, f"{method.label}: questions on 6 images"
    assert all(q.text for q in first), f"{method.label}: a question without a text"
    pixels = [[q.picture.tobytes() for q in drawn] for drawn in (first, again, other)]
    said = [[(q.text, q.answer, q.objects) for q in drawn] for drawn in (first, again, other)]
    assert (pixels[0], said[0]) == (pixels[1], said[1]), (
        f"{method.label}: one seed gives two sets of questions"
    )
    assert pixels[0] != pixels[2], f"{method.label}: the seed is not used"
    alike = sum(a == b for a, b in zip(pixels[0], pixels[0][1:]))
    assert alike <= len(first) - 6, f"{method.label}: two images are the same"


def check_picture_scores(method: Method) -> None:
    """Images of which all, none or the first half is answered right."""
    questions, metric = method.page.pictures(method.config, 4, 0), method.page.metric
    images = list(dict.fromkeys(q.image for q in questions))
    answer = ANSWERS[metric](questions)
    for right, worth in ((images, 1.0), ([], 0.0), (images[:2], 0.5)):
        said = Answers(*map(list, zip(*(answer(q, q.image in right) for q in questions), strict=True)))
        found = SCORES[metric](questions, said, said)["quality"]
        assert abs(found - worth) < NEAR, f"{method.label}: {found} where {worth} is right"


Answer = Callable[
    [PictureQuestion, bool], tuple[str, float]
]  # (question, right) -> what is said, and its margin


def yes_or_no(questions: Sequence[PictureQuestion]) -> Answer:
    return lambda q, right: ("Yes.", 1.0) if (q.answer.lower() == "yes") == right else ("No.", -1.0)


def captions(questions: Sequence[PictureQuestion]) -> Answer:
    known = sorted({name for q in questions for name in q.objects})

    def answer(question: PictureQuestion, right: bool) -> tuple[str, float]:
        named = next(name for name in known if (name in question.objects) == right)
        return f"There is a {named}.", 0.0

    return answer


def whole(questions: Sequence[PictureQuestion]) -> Answer:
    return lambda q, right: (f"{q.answer.upper()}." if right else f"not {q.answer}", 0.0)


ANSWERS: dict[str, Callable[[Sequence[PictureQuestion]], Answer]] = {
    "yes_no": yes_or_no, "chair": captions, "said": whole,
}  # fmt: skip
