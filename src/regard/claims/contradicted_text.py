"""Texts whose context contradicts what the shipped language model has learnt, and its next token under a method.

    <s> passage c more of the text, two line breaks, passage  ->  b by the weights, c by the context

Passages are of held-out text, b is how they go on there, and the model alone is sure of it: p(b) >= 0.5, though b does
not stand in the passage. c is a token of held-out text instead, p(c) < 0.001, that stands nowhere else in the prompt.
The statement of c, from after <s> to the line breaks, has the role "context".
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.claims.shipped_lm import shipped
from regard.tasks.corpus import encode, held_out

PASSAGE, MORE = 24, 8  # tokens
SURE, UNLIKELY = 0.5, 1e-3
TRIED = 256  # passages at a time


@dataclass(frozen=True)
class Contradicted:
    """ids [P, N] of prompts; what the context states [P], what the weights say [P]; first and past-the-last of it."""

    ids: Tensor
    stated: Tensor
    prior: Tensor
    context: tuple[int, int]

    @property
    def roles(self) -> dict[str, Callable[[Tensor], Tensor]]:
        first, last = self.context

        def stands(ids: Tensor) -> Tensor:
            at = torch.arange(ids.shape[1])
            return ((at >= first) & (at < last)).expand(ids.shape)

        return {"context": stands}

    @property
    def alone(self) -> Tensor:
        """[P, 25] the prompts without their context."""
        return torch.cat([self.ids[:, :1], self.ids[:, -PASSAGE:]], 1)

    def log_odds(self, logp: Tensor) -> Tensor:
        """[P] of what the context states against what the weights say."""
        return self.said(logp) - logp.gather(1, self.prior[:, None])[:, 0]

    def said(self, logp: Tensor) -> Tensor:
        return logp.gather(1, self.stated[:, None])[:, 0]


def contradicted(count: int, seed: int) -> Contradicted:
    bench, rng = shipped(), random.Random(f"contradicted {seed}")
    text, end = held_out().ids(bench.tokenizer), encode(bench.tokenizer, "\n\n")
    prompts: list[list[int]] = []
    stated, prior = [], []
    while len(prompts) < count:
        starts = [rng.randrange(len(text) - PASSAGE - 1 - MORE) for _ in range(TRIED)]
        passages = [text[s : s + PASSAGE] for s in starts]
        first = bench.tokenizer.bos_token_id
        likely = next_logp(None, torch.tensor([[first, *p] for p in passages])).exp()
        for s, passage, p in zip(starts, passages, likely, strict=True):
            b, *more = text[s + PASSAGE : s + PASSAGE + 1 + MORE]
            if p[b] < SURE or b in passage or b in more:
                continue
            c = rng.choice(text)
            while p[c] >= UNLIKELY or c in (*passage, *more, *end):
                c = rng.choice(text)
            prompts.append([first, *passage, c, *more, *end, *passage])
            stated.append(c)
            prior.append(b)
    ids, length = torch.tensor(prompts[:count]), 1 + PASSAGE + 1 + MORE
    return Contradicted(ids, torch.tensor(stated[:count]), torch.tensor(prior[:count]), (1, length))


@torch.no_grad()
def next_logp(method: Any, ids: Tensor, roles: dict | None = None) -> Tensor:
    """[P, V] log probabilities of the next token under a method, or of the model as it is."""
    model = shipped().model
    with nullcontext() if method is None else attach(model, method, roles=roles):
        return model(input_ids=ids, logits_to_keep=1).logits[:, -1].log_softmax(-1)
