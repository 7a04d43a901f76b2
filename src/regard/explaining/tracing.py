"""`regard.trace(model, "retrieval_heads", groups)`: what heads do while a model answers, by a tracing page."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from regard import catalog
from regard.attaching.attachment import attach
from regard.core import Edit, Method, Observer, Unsupported, require
from regard.core.deprecation import moved
from regard.kinds.tracing import Answers, TracingPage

BATCH_TOKENS = 16384  # tokens of prompts read at once: bounds the memory, never changes the result

OLD = {"Read": "regard.explaining.tracing:ReadPrompts", "Retrieval": "regard.explaining.tracing:HeadScores"}
__getattr__ = moved(__name__, OLD)


class Question(Protocol):
    """A prompt with its answer: a sample of a task (regard.tasks) has these."""

    prompt: list[int]
    answer: list[int]
    evidence: tuple[int, int]  # first and past-the-last position of the needed fact


@dataclass(frozen=True)
class ReadPrompts:
    """Prompts of one length, all but their last token in the cache."""

    samples: Sequence[Question]
    ids: Tensor  # [B, n]
    cache: Cache

    @property
    def answers(self) -> Tensor:
        return torch.tensor([s.answer for s in self.samples], device=self.ids.device)


@dataclass(frozen=True)
class HeadScores:
    """Scores [layers, query heads] in the order of `layers`, and the share of right answers they come from."""

    scores: Tensor
    layers: tuple[int, ...]
    accuracy: float

    def ranked(self) -> list[tuple[int, int]]:
        """(layer, query head), the highest score first."""
        order = self.scores.flatten().argsort(descending=True, stable=True).tolist()
        return [(self.layers[i // self.scores.shape[1]], i % self.scores.shape[1]) for i in order]

    def share(self, threshold: float = 0.1) -> float:
        """The share of heads that score at least this."""
        return (self.scores >= threshold).float().mean().item()


@torch.no_grad()
def read(model: PreTrainedModel, samples: Sequence[Question]) -> ReadPrompts:
    """Read all but the last token of each prompt, without anything attached; prompts of one length."""
    ids = torch.tensor([s.prompt for s in samples], device=model.device)
    require(ids.shape[1] >= 2, "a prompt has two tokens", length=ids.shape[1])
    return ReadPrompts(samples, ids, model.base_model(ids[:, :-1], use_cache=True).past_key_values)


@torch.no_grad()
def answer(
    model: PreTrainedModel, text: ReadPrompts, methods: Iterable[Edit | Observer | Method] = ()
) -> tuple[Tensor, dict]:
    """Greedy answers [B, T] under edits, observers or methods, and the records; the cache of `text` stays as it is."""
    cache, ids, tokens = deepcopy(text.cache), text.ids[:, -1:], []
    with attach(model, list(methods) or None) as attached:
        for _ in range(len(text.samples[0].answer)):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            tokens.append(ids)
    return torch.cat(tokens, 1), attached.records


def accuracy(
    model: PreTrainedModel, texts: Iterable[ReadPrompts], methods: Sequence[Edit | Method] = ()
) -> float:
    """Share of the prompts answered exactly while these edits or methods act on every generated token."""
    right = [(answer(model, t, methods)[0] == t.answers).all(-1) for t in texts]
    return torch.cat(right).float().mean().item()


def read_all(model: PreTrainedModel, groups: Iterable[Sequence[Question]]) -> list[ReadPrompts]:
    """Groups of questions, each of one length, read in batches of bounded size."""
    texts = []
    for samples in groups:
        size = max(1, BATCH_TOKENS // len(samples[0].prompt))
        texts += [read(model, samples[i : i + size]) for i in range(0, len(samples), size)]
    return texts


def trace(model: PreTrainedModel, method: str | Method, groups: Iterable[Sequence[Question]]) -> HeadScores:
    """The scores that a tracing page gives every query head while the model answers; the mean over all questions.

    groups   questions of one length each: `[task("needle").samples(tokenizer, n, 10, seed=0) for n in lengths]`
    """
    return scored(model, read_all(model, groups), method)


def retrieval_heads(model: PreTrainedModel, groups: Iterable[Sequence[Question]]) -> HeadScores:
    """Retrieval scores (methods/tracing/retrieval_heads.py)."""
    return trace(model, "retrieval_heads", groups)


def scored(
    model: PreTrainedModel, texts: Iterable[ReadPrompts], method: str | Method = "retrieval_heads"
) -> HeadScores:
    """The same from prompts that were already read."""
    page = page_of(method)
    observer = page.observer()
    rows, right = [], []
    layers: tuple[int, ...] = ()
    for text in texts:
        emitted, records = answer(model, text, [observer])
        by_layer: dict[int, list[Tensor]] = {}
        for layer, _, statistic in records[observer.name]:
            by_layer.setdefault(layer, []).append(statistic)
        layers, spans = tuple(sorted(by_layer)), [answer_span(s) for s in text.samples]
        answers = Answers(text.ids, emitted, text.answers, tuple(spans))
        rows.append(torch.stack([page.score(by_layer[layer], answers) for layer in layers], 1))
        right.append((emitted == text.answers).all(-1))
    return HeadScores(torch.cat(rows).mean(0), layers, torch.cat(right).float().mean().item())


def page_of(method: str | Method) -> TracingPage:
    """A tracing page that scores heads."""
    page = catalog.from_spec(method, kind="tracing").page
    if page.observer is None or page.score is None:
        raise Unsupported(
            f"{page.card.title} gives no observer and score: it is not measured while a model answers"
        )
    return page


def answer_span(sample: Question) -> tuple[int, int]:
    """Where the answer stands in the evidence: (first, past the last)."""
    first, last = sample.evidence
    for i in range(first, last - len(sample.answer) + 1):
        if sample.prompt[i : i + len(sample.answer)] == sample.answer:
            return i, i + len(sample.answer)
    raise ValueError(
        f"the answer stands in the evidence as the same tokens: {sample.answer} not in {first}..{last}"
    )
