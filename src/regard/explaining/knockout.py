"""Attention knockout: what the metric loses when some queries do not see some tokens, in a window of layers.

    s(i, j) = -inf for queries i and keys j, in layers l .. l + w - 1         the mass goes to what is left

Which layers carry what to the last token: hidden from it too early or too late, a source token costs nothing.
The windows of a scan slide over the layers ("Dissecting Recall of Factual Associations in Auto-Regressive Language
Models", 2023). Spans are token numbers; an image's or a document's tokens are hidden by their role with a single Edit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.core import Edit, Site, require
from regard.explaining.batches import Begun, Progress, by_cell, texts_of
from regard.explaining.effects import Effects
from regard.explaining.pairs import Pairs
from regard.explaining.runs import forward, layers_of

Span = tuple[int, int]  # first and past-the-last token


@torch.no_grad()
def knockout(
    model: PreTrainedModel,
    pairs: Pairs,
    spans: Sequence[Span],
    *,
    rows: int | Sequence[int] | None = -1,
    window: int = 3,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """The share of m_clean - m_corrupt that the clean prompts lose for each window of layers and span.

    spans    (first, past the last) tokens that are hidden, counted from the start of each prompt
    rows     queries that do not see them (-1: the last token); None: all
    window   layers in which they are hidden

    Effects [pairs, layer (the first of the window), span]. Raises ValueError for spans outside a prompt, and as `patch`
    does for a metric that is constant.
    """
    shortest, layers = int(pairs.clean.lengths.min()), layers_of(model)
    ok = len(spans) > 0 and all(0 <= a < b <= shortest for a, b in spans)
    require(ok, "spans are of tokens that every prompt has", spans=[*spans], tokens=shortest)
    require(1 <= window <= len(layers), "a window of the model's layers", window=window, layers=len(layers))
    pairs, starts = pairs.to(model.device), layers[: len(layers) - window + 1]
    cells = [(start, i) for start in range(len(starts)) for i in range(len(spans))]

    def begin(part: Pairs, group: list[int]) -> Begun:
        before, after = (part.score(forward(model, side)[0]) for side in (part.clean, part.corrupt))
        hidden = [(tuple(layers[start:][:window]), spans[i]) for start, i in cells]
        return before - after, lambda some: lost(model, part, before, [hidden[c] for c in some], rows)

    values, span = by_cell(pairs, len(cells), begin, batch=batch, progress=progress)
    coords = {"layer": starts, "span": [*spans]}
    shape = (len(starts), len(spans))
    settings = {"method": "knockout", "direction": "noise", "window": window, "rows": rows}
    exact = torch.ones(shape, dtype=torch.bool)
    return Effects(values.view(len(pairs), *shape), ("layer", "span"), coords, span, exact, settings)


def lost(
    model: PreTrainedModel, pairs: Pairs, before: Tensor, hidden: Sequence[tuple[tuple[int, ...], Span]],
    rows: int | Sequence[int] | None,
) -> Tensor:  # fmt: skip
    """[pairs, cells] m_clean - m with these spans hidden in these layers."""
    edits, named = [], rows if rows is None or isinstance(rows, int) else tuple(rows)
    for i, (layers, (first, past)) in enumerate(hidden):
        texts = texts_of(i, len(pairs))
        keys = tuple(range(first, past))
        site = Site("scores", layers=layers, rows=named, keys=keys, tower="text", texts=texts)
        # a layer with a window may not see them at all: then there is nothing to lose
        edits.append(Edit(site, "block", required=False))
    logits, _ = forward(model, pairs.clean.repeated(len(hidden)), edits)
    change = before.repeat(len(hidden)) - pairs.score(logits)
    return change.view(len(hidden), len(pairs)).T
