"""Characters of the held-out text for claims that train small language models: what to train on, what to hold out."""

import torch
from torch import Tensor

from regard.tasks import held_out

STRETCH = 10_000  # characters of which the last tenth is held out


def characters() -> tuple[int, Tensor, Tensor]:
    """(how many characters there are, ids to train on, ids held out)."""
    text = held_out().text
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[c] for c in text])[: len(text) // STRETCH * STRETCH].view(-1, STRETCH)
    kept = STRETCH * 9 // 10
    return len(known), ids[:, :kept].flatten(), ids[:, kept:].flatten()


def windows(ids: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels [len(starts), context]: the characters from each start on, and those that follow them."""
    cut = ids[starts[:, None] + torch.arange(context + 1)]
    return cut[:, :-1], cut[:, 1:]


def drawn(
    ids: Tensor, count: int, batch: int, context: int, g: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """`count` batches from random starts."""
    ends = len(ids) - context
    return [windows(ids, torch.randint(ends, (batch,), generator=g), context) for _ in range(count)]


def in_order(ids: Tensor, batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """All of the text once, in batches."""
    x, y = windows(ids, torch.arange(0, len(ids) - context, context), context)
    return list(zip(x.split(batch), y.split(batch), strict=True))
