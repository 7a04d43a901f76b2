"""What claims on language models share: text streams, decode steps seen by a spy, exact-match accuracy.

`model` is a name of ours, "lm" where none is given. Questions are text that the model goes on with, without the marks
of a chat: so SmolLM2 finds 24 of 24 needles (8 each of 256, 512 and 1,024 tokens), and 20 where it is asked in a chat.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.bench.cell import Cell
from regard.bench.measuring import Bench, Pass, batches
from regard.catalog import task
from regard.core import Card, Method
from regard.kinds.cache import CachePage
from regard.models.shipped import load_shipped
from regard.ops import View
from regard.tasks import Sample, held_out


@cache
def loaded(model: str) -> Bench:
    return Bench(*load_shipped(model))


def shipped(model: str = "lm") -> Bench:
    """A model of ours and its tokenizer, loaded once."""
    return loaded(model)


@cache
def in_float64(model: str = "lm") -> Bench:
    """A copy in which another order of the same sum moves no digit that counts; norms still go down to float32."""
    bench = shipped(model)
    return Bench(deepcopy(bench.model).double(), bench.tokenizer)


def stream(tokens: int, model: str = "lm") -> Tensor:
    """[tokens] ids of held-out text after the tokenizer's first token."""
    bench = shipped(model)
    ids = held_out().ids(bench.tokenizer)
    assert len(ids) >= tokens - 1, f"held-out text has {len(ids)} tokens, {tokens} are needed"
    return torch.tensor([bench.tokenizer.bos_token_id, *ids[: tokens - 1]])


def samples(name: str, length: int, count: int, seed: int = 0, model: str = "lm") -> list[Sample]:
    return task(name).samples(shipped(model).tokenizer, length, count, seed)


def runs(chosen: list[Sample], method: Any, model: str | Bench = "lm") -> list[Pass]:
    length, bench = len(chosen[0].prompt), shipped(model) if isinstance(model, str) else model
    return [bench.run(b, method) for b in batches(chosen, Cell("full", "needle", length))]


def accuracy(chosen: list[Sample], method: Any, model: str = "lm") -> float:
    """Share of answers that greedy generation gives exactly."""
    best = torch.cat([r.logits for r in runs(chosen, method, model)]).argmax(-1)
    return float((best == torch.tensor([s.answer for s in chosen])).all(-1).double().mean())


@dataclass(frozen=True)
class Nothing:
    budget: float = 1.0


def spy(callback: Callable[[View], None]) -> Method:
    """A cache method that changes nothing and shows every decode step of every layer to `callback`."""

    def observe(view: View, cfg: Nothing) -> None:
        if view.phase == "decode":
            callback(view)

    card = Card(title="spy", paper="none", year=2026, idea="look at every view")
    return Method(
        "spy", CachePage(config=Nothing, card=card, observe=observe, budget=lambda cfg: 1.0), Nothing()
    )


def watch(
    callback: Callable[[View], None], length: int, steps: int, rows: int = 4, model: str = "lm"
) -> None:
    """Show `callback` the decode steps of full attention over held-out text and over needles, half and half."""
    reader = shipped(model).model
    for name in ("perplexity", "needle"):
        chosen = samples(name, length, rows, seed=11, model=model)
        for sample in chosen:
            tokens = torch.tensor([sample.prompt + sample.answer])[:, : length + steps]
            start = length - 1
            with torch.inference_mode(), attach(reader, spy(callback)):
                cache = reader(tokens[:, :start], use_cache=True).past_key_values
                for t in range(start, tokens.shape[1]):
                    reader(tokens[:, t : t + 1], past_key_values=cache)
