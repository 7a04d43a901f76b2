"""Rows of a batch that change places: `check_moved_rows(model, lambda: attach(model, method))`.

Two different prompts, one of them padded, are read together. Then the rows of the cache are put in another order,
chosen or repeated, as beams and samples do, and go on: each as it does alone. Beams of one prompt cannot show it, since
all their rows hold the same.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.core import Method
from regard.testing.cache.checks import windowed
from regard.testing.cache.script import NEAR, alone, full_cache, real, script
from regard.testing.zoo import build

STEPS = (14, 1, 1, 3, 1, 1)
PADS = (0, 5)
# by forward, what is done before it: the cache's function, what it takes, and the place that each row had
Moves = dict[int, tuple[str, Any, list[int]]]
MOVES: dict[str, Moves] = {
    "swapped, then one of them twice": {
        2: ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
        4: ("reorder_cache", torch.tensor([1, 1]), [1, 1]),
    },
    "the padded one twice": {1: ("reorder_cache", torch.tensor([1, 1]), [1, 1])},
    "repeated, then chosen": {
        1: ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        3: ("batch_select_indices", torch.tensor([3, 0]), [3, 0]),
        5: ("batch_select_indices", torch.tensor([0]), [0]),
    },
}


def check_rows_move(method: Method, family: str) -> None:
    """Under a cache method rows that change places go on as each does alone."""
    model, _ = build(family)
    check_moved_rows(model, lambda: attach(model, method), said=f"{method.label} on {family}")


def check_moved_rows(
    model: Any,
    around: Callable[[], AbstractContextManager] = nullcontext,
    *,
    said: str,
    cache: Callable[[Any], Any] = full_cache,
    takes: Iterable[str] = ("input_ids", "attention_mask", "position_ids"),
) -> None:
    """Rows that change places go on as each does alone, in whatever context the model runs.

    around: the context, an attachment. cache: makes the cache of a model. takes: the inputs that the model takes.
    """

    def run(feeds: list[dict], moves: Moves) -> list[list[tuple[int, Tensor]]]:
        outs, kept = [], cache(model)
        rows = list(range(len(feeds[0]["input_ids"])))
        with torch.no_grad(), around():
            for step, feed in enumerate(feeds):
                if step in moves:
                    rows = [rows[place] for place in move(kept, *moves[step])]
                inputs = {name: feed[name][rows] for name in takes}
                outs.append(list(zip(rows, model(**inputs, past_key_values=kept).logits, strict=True)))
        return outs

    for pads, names in scripts(model).items():
        feeds = script(STEPS, pads)
        wanted = [run(alone(feeds, row), {}) for row in range(2)]
        for name in names:
            for step, outs in enumerate(run(feeds, MOVES[name])):
                for place, (row, logits) in enumerate(outs):
                    wrong = float((logits[real(feeds, step)[row]] - wanted[row][step][0][1]).abs().max())
                    assert wrong <= NEAR, (
                        f"{said}, padded by {pads}, rows {name}: at forward {step}, place {place} is {wrong:.1e} away "
                        f"from row {row} alone"
                    )


def scripts(model: Any) -> dict[tuple[int, int], tuple[str, ...]]:
    """Padding of the two rows -> what is done to them; without padding all rows may share one table of slots."""
    # a window of the model's own counts padding, and so tears rows apart by itself
    if windowed(model):
        return {(0, 0): tuple(MOVES)}
    return {PADS: tuple(MOVES), (0, 0): ("repeated, then chosen",)}


def move(cache: Any, name: str, value: Any, places: list[int]) -> list[int]:
    """Change the rows of a cache; the place that each of them had."""
    if all(hasattr(layer, name) for layer in cache.layers):
        getattr(cache, name)(value)
    else:  # transformers neither repeats nor chooses rows of layers that hold states alone
        cache.reorder_cache(torch.tensor(places))
    return places
