"""What a cell's passes are worth: quality by the task's metric, with its interval, and fidelity to full attention."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.bench.passes import Pass
from regard.tasks import Sample

DRAWS = 1000
PLACES = 8  # of the parts of a scored text whose likelihoods are told apart


def quality(
    metric: str, samples: Sequence[Sample], runs: list[Pass], full: list[Pass], tokenizer: Any
) -> dict:
    """Score in [0, 1] with a bootstrap interval, its samples, and what only some metrics have.

    exact   the share of answers, of all turns, that are generated exactly; `by_turn` where there are several
    recall  the share of wanted texts that stand in what was generated
    nll     perplexity of full attention over the method's; `nll_by_place`, in parts of the scored text
    """
    logits = rows_of(runs)
    vocabulary, best = logits[0].shape[-1], torch.stack([row.argmax(-1) for row in logits]).cpu()
    if metric == "recall":
        said = [generated(row, tokenizer) for row in best.tolist()]
        scores = np.array([recall(text, s.wanted) for text, s in zip(said, samples, strict=True)])
        facts: dict[str, Any] = {"nll": None}
        return (
            summary(scores, np.mean)
            | facts
            | shown(samples, scores, said, tokenizer, metric)
            | chance(samples)
        )
    answer = torch.tensor([list(chain.from_iterable(s.answers)) for s in samples])
    nll, base = (nlls(r, answer) for r in (runs, full))
    counts = counted(samples, answer)
    said = [told(*facts, tokenizer) for facts in zip(samples, best, answer, counts, strict=True)]
    facts = {"nll": float(nll[counts].mean()) if counts.any() else None}
    if metric == "exact":
        turns = exact_turns((best == answer) | ~counts, samples[0])
        for i, sample in enumerate(samples):
            if sample.choices:
                said[i] = tokenizer.decode([likeliest(sample, logits[i])])
            turns[i] = judged(sample, logits[i], said[i], turns[i])
        scores = turns.mean(-1)
        facts |= {"by_turn": turns.mean(0).tolist()} if turns.shape[1] > 1 else {}
        return (
            summary(scores, np.mean)
            | facts
            | shown(samples, scores, said, tokenizer, metric)
            | chance(samples)
        )
    worth = (base - nll).mean(-1)
    facts |= {"nll_by_place": by_place(nll), "chance": foretold(base, vocabulary)}
    spread = summary(worth.numpy(), lambda drawn: float(np.exp(drawn.mean())))
    return spread | facts | shown(samples, worth.exp().numpy(), said, tokenizer, metric)


def counted(samples: Sequence[Sample], answer: Tensor) -> Tensor:
    """[samples, T] which tokens of the answers are answers, and do not only fill up."""
    sizes = torch.tensor([0 if s.pattern else s.counted or answer.shape[1] for s in samples])
    return torch.arange(answer.shape[1]) < sizes[:, None]


def told(sample: Sample, best: Tensor, answer: Tensor, counts: Tensor, tokenizer: Any) -> str:
    """What was generated, as a reader sees it: all of it where that is searched, else up to its first fault."""
    if sample.pattern:
        return generated(best.tolist(), tokenizer)
    return generated_text(best[counts], answer[counts], tokenizer)


def judged(sample: Sample, logits: Tensor, text: str, exact: np.ndarray) -> Any:
    """1 where an answer is right: found in the text, the likeliest of the choices, or generated exactly."""
    if sample.pattern:
        return float(re.search(sample.pattern, text) is not None)
    return float(likeliest(sample, logits) == sample.answer[0]) if sample.choices else exact


def likeliest(sample: Sample, logits: Tensor) -> int:
    """The first token of the choice that the model prefers, of logits [T, V]."""
    return sample.choices[int(logits[0, list(sample.choices)].argmax())]


def summary(scores: np.ndarray, value: Callable[[np.ndarray], Any]) -> dict:
    draws = np.random.default_rng(0).integers(0, len(scores), (DRAWS, len(scores)))
    low, high = np.quantile([value(scores[pick]) for pick in draws], (0.025, 0.975))
    return dict(quality=float(value(scores)), quality_low=float(low), quality_high=float(high))


def shown(
    samples: Sequence[Sample], scores: np.ndarray, said: list[str], tokenizer: Any, metric: str
) -> dict:
    """The samples as the report tells them."""
    rows = []
    for sample, score, text in zip(samples, scores, said, strict=True):
        expected = ", ".join(w.strip() for w in sample.wanted)
        if metric != "recall":
            answers = [sample.answer[: sample.counted or None], *sample.answers[1:]]
            expected = sample.pattern or " | ".join(map(tokenizer.decode, answers))
        depth = sample.depth if len(sample.needed) == 1 else None  # several facts have no one place
        rows.append(dict(depth=depth, score=float(score), answer=expected, generated=text))
    return {"samples": rows}


def chance(samples: Sequence[Sample]) -> dict:
    """How often a guess is right."""
    return {"chance": float(np.mean([s.chance for s in samples]))}


def foretold(base: Tensor, vocabulary: int) -> float:
    """The score of guessing a text: full attention's perplexity over the vocabulary's size."""
    return min(1.0, math.exp(float(base.mean()) - math.log(vocabulary)))


def nlls(runs: list[Pass], answer: Tensor) -> Tensor:
    """[samples, T] negative log-likelihood of each token of the answers."""
    rows = zip(rows_of(runs), answer[..., None], strict=True)
    return torch.cat([-row.double().cpu().log_softmax(-1).gather(-1, said).mT for row, said in rows])


def exact_turns(right: Tensor, sample: Sample) -> np.ndarray:
    """[samples, turns] 1 where every token of a turn's answer is right, from [samples, T]."""
    parts = right.split([len(answer) for answer in sample.answers], dim=1)
    return torch.stack([part.all(-1) for part in parts], 1).double().numpy()


def by_place(nll: Tensor) -> list[list[float]]:
    """[first token, mean negative log-likelihood] of up to eight parts of the scored text, from its start on."""
    parts = nll.tensor_split(min(PLACES, nll.shape[1]), dim=1)
    starts = np.cumsum([0] + [part.shape[1] for part in parts[:-1]])
    return [[int(start), round(float(part.mean()), 4)] for start, part in zip(starts, parts)]


def generated(ids: list[int], tokenizer: Any) -> str:
    """What was generated, up to the token that ends a text."""
    end = getattr(tokenizer, "eos_token_id", None)
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)


def recall(text: str, wanted: Sequence[str]) -> float:
    """The share of the wanted texts that stand in a text, whatever the case of their letters.

    >>> recall("They are 4821 and Paris.", ["4821", "1177", "paris"])
    0.6666666666666666
    """
    return sum(w.strip().lower() in text.lower() for w in wanted) / len(wanted)


def generated_text(best: Tensor, answer: Tensor, tokenizer: Any) -> str:
    """What greedy generation says up to its first departure from the answer."""
    wrong = (best != answer).nonzero()
    stop = int(wrong[0]) + 1 if len(wrong) else len(best)
    return tokenizer.decode(best[:stop].tolist()) + ("…" if stop < len(best) else "")


def fidelity(samples: Sequence[Sample], runs: list[Pass], full: list[Pass]) -> dict:
    """Agreement of the next token with full attention, and KL(full || method) with its interval over samples.

    Where the model is fed what it generates, the steps of a sample count until both have said something else.
    """
    apart = [divergence(*pair) for pair in zip(rows_of(runs), rows_of(full), strict=True)]
    same, kls = (torch.stack(x) for x in zip(*apart, strict=True))
    counts = torch.stack([steps_counted(sample, row) for sample, row in zip(samples, same, strict=True)])
    each = (kls * counts).sum(-1) / counts.sum(-1)
    kl = each.numpy()
    draws = np.random.default_rng(0).integers(0, len(kl), (DRAWS, len(kl)))
    low, high = np.quantile(kl[draws].mean(1), (0.025, 0.975))
    agree = (same * counts).sum() / counts.sum()
    return dict(agreement=float(agree), kl=float(kl.mean()), kl_low=float(low), kl_high=float(high))


def divergence(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Whether both say the same at each step, 1 or 0, and KL(theirs || ours) there, of one sample's logits [T, V]."""
    ours, theirs = (x.double().log_softmax(-1) for x in (ours, theirs))
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().cpu()
    return same, (theirs.exp() * (theirs - ours)).sum(-1).cpu()


def rows_of(runs: list[Pass]) -> list[Tensor]:
    """The logits [T, V] of each sample. All samples at once, in float64, would be what a worker holds most of."""
    return [row for run in runs for row in run.logits]


def steps_counted(sample: Sample, same: Tensor) -> Tensor:
    """[T] 1 at the steps of a sample that are compared, from whether both said the same at each."""
    counts = torch.ones_like(same)
    if sample.free:
        counts[1:] = same.cumprod(-1)[:-1]
    elif sample.counted:
        counts[sample.counted :] = 0
    return counts
