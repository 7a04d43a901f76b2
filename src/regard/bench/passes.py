"""One pass of a model over a batch of samples: the context, the question, the answers, turn by turn."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from regard.attaching.attachment import attach
from regard.bench.prefill import leaves_unread
from regard.ops.clock import clocked
from regard.tasks import Sample


@dataclass
class Pass:
    """One pass of a model over a batch: logits at the answers' positions, times, bytes."""

    logits: Tensor  # [B, T, V], the answers of all turns behind each other
    prefill: float
    steps: list[float]
    held: int
    kept: int
    read: float
    parts: dict[str, float] = field(default_factory=dict)  # seconds of the prefill by what they went to
    selection: list[dict] = field(default_factory=list)  # what was read in it, by layer


def run(model: Any, batch: Sequence[Sample], method: Any, weigh: bool = False, tokenizer: Any = None) -> Pass:
    """A pass under a method; None: the model as it is, with its own attention and its own cache, windows included.

    `weigh`: measure the share of attention mass that a method captures which leaves keys of the prompt unread.

    The context is prefilled (all but the last token of the prompts, where they name none), then what counts as
    written by the model token by token, the rest of the question at once, its last token and the answer one token
    at a time; so with each turn that follows.

    The logits that predict answer[t] come from a decode step in every case, so that a method which acts on
    decoding alone is seen in each of them. Feeding the right answer gives the same exact-match score as free
    greedy generation: an answer is generated exactly if and only if every step's best token is the right one.
    Where samples say what is `wanted`, the model is fed what it generates.
    """
    around = nullcontext() if method is None else attach(model, method, tokenizer=tokenizer)
    with torch.inference_mode(), around as attached:
        return Reading(model, attached, attached if leaves_unread(method) else None).through(batch, weigh)


@dataclass
class Reading:
    """A model that reads a batch, and what is noted of its steps."""

    model: Any
    attached: attach | None
    chooses: attach | None  # the same, where it leaves keys of a prompt unread
    cache: Cache | None = None
    logits: list[Tensor] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)

    def through(self, batch: Sequence[Sample], weigh: bool) -> Pass:
        first, prompt = batch[0], self.ids([s.prompt for s in batch])
        context = first.context or prompt.shape[1] - 1 - first.written
        if self.chooses is not None:
            self.chooses.selection(mass=weigh)
        start = now(self.model.device)
        with clocked() as parts:
            self.cache = self.model(prompt[:, :context], use_cache=True, logits_to_keep=1).past_key_values
        prefill = now(self.model.device) - start
        chosen = [] if self.chooses is None else self.chooses.selection()
        for t in range(context, context + first.written):
            self.step(prompt[:, t : t + 1])
        self.ask(prompt[:, context + first.written :], self.ids([s.answer for s in batch]), first.free)
        for i in range(len(first.turns)):
            before = self.ids([[s.answers[i][-1], *s.turns[i].question] for s in batch])
            self.ask(before, self.ids([s.turns[i].answer for s in batch]))
        held = kept = own_bytes(self.cache)
        if self.attached is not None:
            held, kept = self.attached.bytes_held(), self.attached.bytes_stored()
        logits = torch.stack(self.logits, 1)
        return Pass(logits, prefill, self.steps, held, kept, float(np.mean(self.reads)), parts, chosen)

    def ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)

    def ask(self, question: Tensor, answer: Tensor, freely: bool = False) -> None:
        """Feed a question whose last token and the answer make steps of their own; keep the logits of the answer."""
        if question.shape[1] > 1:
            self.model(question[:, :-1], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        token = question[:, -1:]
        for t in range(answer.shape[1]):
            self.logits.append(self.step(token))
            token = self.logits[-1].argmax(-1, keepdim=True) if freely else answer[:, t : t + 1]

    def step(self, token: Tensor) -> Tensor:
        """The logits [B, V] after one token for each row."""
        start = now(self.model.device)
        out = self.model(token, past_key_values=self.cache, use_cache=True)
        self.steps.append(now(self.model.device) - start)
        self.reads.append(own_bytes(self.cache) if self.attached is None else self.attached.bytes_read())
        return out.logits[:, -1].float()


def own_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in a cache of the model's own; a sliding layer's are those of its window."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
