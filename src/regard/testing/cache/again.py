"""A text that is asked to go on with a pass of its own, which is not stored: what a second reading of it computes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.testing.cache.oracle import hide
from regard.testing.cache.script import ReadRecord, Tape, alone, real


def feeds_until(feeds: list[dict], forward: int) -> Tensor:
    """[B, seen] the token ids fed so far."""
    return torch.cat([feed["input_ids"] for feed in feeds[: forward + 1]], 1)


def again(model: Any, tape: Tape, row: int, forward: int, ids: list[int]) -> list[Tensor]:
    """By layer the scores of a pass of these ids behind the text of a row, over what is stored then: Text.again."""
    feeds, found = tape.feeds[: forward + 1], dict[int, Tensor]()
    reads = [cut for f in range(len(feeds)) if (cut := reads_of_row(tape, row, f)) is not None]
    m, n = len(ids), int(feeds[-1]["attention_mask"][row].sum())
    fed = dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, n + m, dtype=torch.long),
               position_ids=torch.arange(n, n + m)[None])  # fmt: skip
    more = {i: replace(r, alive=F.pad(r.alive, (0, m), value=True)) for i, r in reads[-1].items()}

    def note(layer: int, quantity: str, x: Tensor, seen: Tensor) -> Tensor:
        if quantity == "scores":
            found[layer] = x[0].masked_fill(~seen[0], -torch.inf)
        return x

    hide(model, [*alone(feeds, row), fed], [*reads, more], change=note)
    return [found[layer] for layer in sorted(found)]


def reads_of_row(tape: Tape, row: int, forward: int) -> dict[int, ReadRecord] | None:
    """What a row reads in a forward, its padding cut out; None: the forward feeds it nothing."""
    mask = tape.feeds[forward]["attention_mask"][row].bool()
    if not bool(real(tape.feeds, forward)[row].any()):
        return None
    tables = {i: read.alive for i, read in tape.reads[forward].items()}
    return {i: ReadRecord(x[min(row, len(x) - 1)][None, :, mask]) for i, x in tables.items() if x is not None}
