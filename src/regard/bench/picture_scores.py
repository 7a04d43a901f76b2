"""What answers about images are worth: by task, with intervals over images, in pairs with the base and a control."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from regard.tasks.chair_scores import Counts, chair, counts, mentions, without_last
from regard.tasks.pictures import PictureQuestion
from regard.tasks.yes_no import RULES, yes_no_scores

DRAWS = 1000
SEED = 0


def draws_of(images: Sequence[str]) -> list[np.ndarray]:
    """Indices of questions, drawn image by image with replacement, the same for every method."""
    names = list(dict.fromkeys(images))
    own = {name: [i for i, other in enumerate(images) if other == name] for name in names}
    rng = np.random.default_rng(SEED)
    picks = rng.integers(0, len(names), (DRAWS, len(names)))
    lists = [np.array(own[name]) for name in names]
    return [np.concatenate([lists[i] for i in row]) for row in picks]


def interval(images: Sequence[str], statistic: Callable[[np.ndarray], float]) -> list[float]:
    """[low, high] of 95 % of the draws of a statistic of question indices."""
    found = [statistic(index) for index in draws_of(images)]
    return [float(np.percentile(found, q)) for q in (2.5, 97.5)]


def paired(
    images: Sequence[str], ours: Sequence[float], theirs: Sequence[float]
) -> tuple[float, list[float]]:
    """The mean difference, and its interval over images."""
    gap = np.asarray(ours, float) - np.asarray(theirs, float)
    return float(gap.mean()), interval(images, lambda index: float(gap[index].mean()))


def scored(images: Sequence[str], ours: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Quality with its interval, and the gain over the base in pairs."""
    x = np.asarray(ours, float)
    gain, ends = paired(images, ours, base)
    return {
        "quality": float(x.mean()), "quality_interval": interval(images, lambda index: float(x[index].mean())),
        "gain": gain, "gain_interval": ends,
        "samples": [{"image": i, "score": float(s)} for i, s in zip(images, ours, strict=True)],
    }  # fmt: skip


def biased(margins: Sequence[float], yes: int) -> np.ndarray:
    """[n] bool: what the base says when a constant is added to its margins until it says yes so often."""
    order = np.argsort(-np.asarray(margins), kind="stable")
    said = np.zeros(len(margins), dtype=bool)
    said[order[:yes]] = True
    return said


def yes_no_facts(questions: Sequence[PictureQuestion], ours: Any, base: Any) -> dict[str, Any]:
    """By the first token's probability; the same answers read by four rules; and the control of equal bias."""
    images, truth = [q.image for q in questions], [q.answer.strip().lower() for q in questions]
    right = np.array([t == "yes" for t in truth])
    said, plain = (np.array(a.margins) > 0 for a in (ours, base))
    control = biased(base.margins, int(said.sum()))
    over, ends = paired(images, said == right, control == right)
    first = yes_no_scores(["yes" if s else "no" for s in said], truth)
    rules = {
        name: yes_no_scores([rule(text, t) for text, t in zip(ours.said, truth, strict=True)], truth)
        for name, rule in RULES.items()
    }
    groups = sorted({q.group for q in questions if q.group})
    by_group = {
        g: float(np.mean([(s == r) for s, r, q in zip(said, right, questions) if q.group == g]))
        for g in groups
    }
    return {
        **scored(images, said == right, plain == right), "yes_ratio": first["yes_ratio"], "f1": first["f1"],
        "over_control": over, "over_control_interval": ends, "works": ends[0] > 0,
        "rules": {"first token": first, **rules}, "by_group": by_group, "n": len(questions),
    }  # fmt: skip


def vocabulary(questions: Sequence[PictureQuestion]) -> list[str]:
    """All objects that the annotations of these images name."""
    return sorted({name for q in questions for name in q.objects})


def chair_facts(questions: Sequence[PictureQuestion], ours: Any, base: Any) -> dict[str, Any]:
    images, objects = [q.image for q in questions], vocabulary(questions)
    kept = counted(questions, ours.said, objects)
    dropped = counted(questions, [without_last(text) for text in ours.said], objects)
    plain = counted(questions, base.said, objects)
    control = cut(questions, base.said, objects, sum(c.named for c in kept))
    ends = difference(images, kept, control)
    facts = chair(kept)
    gain = chair(plain)["chair_i"] - facts["chair_i"]
    return {
        **facts, "last_sentence": "keep", "dropped": chair(dropped), "quality": 1 - facts["chair_i"],
        "quality_interval": [1 - x for x in interval(images, lambda i: share(kept, i))][::-1],
        "gain": gain, "gain_interval": [-x for x in difference(images, kept, plain)][::-1],
        "over_control": chair(control)["chair_i"] - facts["chair_i"], "over_control_interval": [-x for x in ends][::-1],
        "works": ends[1] < 0, "control": chair(control),
        "samples": [{"image": i, "false": c.false, "named": c.named} for i, c in zip(images, kept, strict=True)],
    }  # fmt: skip


def counted(
    questions: Sequence[PictureQuestion], said: Sequence[str], objects: Sequence[str]
) -> list[Counts]:
    return [counts(text, q.objects, objects) for q, text in zip(questions, said, strict=True)]


def cut(
    questions: Sequence[PictureQuestion], said: Sequence[str], objects: Sequence[str], wanted: int
) -> list[Counts]:
    """Captions of which only the first mentions are kept, at most so many in each, `wanted` in all where there are."""
    named = [mentions(text, objects) for text in said]
    most = max((len(n) for n in named), default=0)
    limit = next((k for k in range(most + 1) if sum(min(len(n), k) for n in named) >= wanted), most)
    spare = sum(min(len(n), limit) for n in named) - wanted
    found = []
    for question, names in zip(questions, named, strict=True):
        kept = names[:limit]
        if spare > 0 and len(names) >= limit and limit:
            kept, spare = names[: limit - 1], spare - 1
        found.append(counts(" , ".join(kept), question.objects, objects))
    return found


def share(found: Sequence[Counts], index: np.ndarray) -> float:
    false, named = np.array([c.false for c in found]), np.array([c.named for c in found])
    return float(false[index].sum() / max(named[index].sum(), 1))


def difference(images: Sequence[str], ours: Sequence[Counts], theirs: Sequence[Counts]) -> list[float]:
    """The interval of CHAIR_I of ours less that of theirs, over the same images."""
    return interval(images, lambda index: share(ours, index) - share(theirs, index))


def said_facts(questions: Sequence[PictureQuestion], ours: Any, base: Any) -> dict[str, Any]:
    """The whole answer, whatever its case and the full stop behind it."""
    images = [q.image for q in questions]
    right = [[same(text, q.answer) for q, text in zip(questions, a.said, strict=True)] for a in (ours, base)]
    facts = scored(images, *right)
    return {**facts, "works": facts["gain_interval"][0] > 0, "n": len(questions)}


def same(text: str, answer: str) -> bool:
    plain = [t.lower().strip().rstrip(".").strip() for t in (text, answer)]
    return plain[0] == plain[1]
