"""Thought anchors of a user's own model: which sentences of a text later ones attend to, and which they depend on.

    sentences = [(1, 9), (9, 21), ...]                  first and past-the-last token of each
    found = anchors(model, ids, sentences)
    found.receivers, found.anchors, found.effects       heads (layer, head); [S - 4]; [S, S]: row changed by column

The page is methods/tracing/thought_anchors.py. Receiver heads of one text are those of that text; for heads of a
model ask `receiver_heads` over several and hand them on. Nothing here holds the weights of a text in full: it is read
sentence by sentence on a cache, and what is kept of a layer is a number per head and pair of sentences.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from regard.attaching.attachment import attach
from regard.methods.tracing import thought_anchors as page

Heads = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Anchors:
    """receivers: (layer, head); kurtosis [L, H], NaN: none; vertical [L, H, S - 4]; anchors [S - 4]; effects [S, S]."""

    receivers: Heads
    kurtosis: Tensor
    vertical: Tensor
    anchors: Tensor
    effects: Tensor


def anchors(
    model: PreTrainedModel,
    ids: Tensor,
    sentences: page.Spans,
    cfg: page.Config | None = None,
    heads: Heads | None = None,
) -> Anchors:
    """Of one text [N] of ids; `heads` are receivers found elsewhere, None: those of this text."""
    cfg = cfg or page.Config()
    vertical = page.vertical_scores(sentence_attention(model, ids, sentences), cfg)
    kurtosis = page.kurtosis(vertical)
    chosen = page.receivers(kurtosis[None], cfg) if heads is None else heads
    looked = torch.stack([vertical[layer, head] for layer, head in chosen] or [vertical[0, 0] * torch.nan])
    return Anchors(chosen, kurtosis, vertical, looked.mean(0), suppression(model, ids, sentences, cfg))


def receiver_heads(
    model: PreTrainedModel, texts: Iterable[tuple[Tensor, page.Spans]], cfg: page.Config | None = None
) -> list[tuple[int, int]]:
    """(layer, head) of the highest mean kurtosis over texts (ids, sentences)."""
    cfg = cfg or page.Config()
    scores = [page.vertical_scores(sentence_attention(model, *text), cfg) for text in texts]
    return page.receivers(torch.stack([page.kurtosis(v) for v in scores]), cfg)


@torch.no_grad()
def sentence_attention(model: PreTrainedModel, ids: Tensor, sentences: page.Spans) -> Tensor:
    """[L, H, S, S] mean attention from the tokens of each sentence to those of each other, of ids [N]."""
    page.check_sentences(sentences, len(ids))
    ids, cache, read, rows = ids.to(model.device)[None], DynamicCache(config=model.config), 0, []
    observer = page.sentence_mass(sentences)
    with attach(model, observer) as attached:
        for first, past in sentences:
            model(ids[:, read:past], past_key_values=cache, use_cache=True)
            records = attached.records[observer.name]
            by_layer = [mass for _, _, mass in sorted(records, key=lambda record: record[0])]
            rows.append(torch.cat(by_layer)[:, :, first - read :].mean(2))  # [L, H, S]
            records.clear()
            read = past
    widths = torch.tensor([past - first for first, past in sentences], device=ids.device)
    return torch.stack(rows, 2) / widths


@torch.no_grad()
def suppression(
    model: PreTrainedModel, ids: Tensor, sentences: page.Spans, cfg: page.Config | None = None
) -> Tensor:
    """[S, S] effect on each sentence (row) of hiding each (column), a forward for every column; ids [N]."""
    page.check_sentences(sentences, len(ids))
    cfg, ids, columns = cfg or page.Config(), ids.to(model.device)[None], []
    base = model(ids, use_cache=False).logits[0]
    for span in sentences:
        with attach(model, page.suppress(span, ids.shape[1])):
            hidden = model(ids, use_cache=False).logits[0]
        columns.append(page.effects(base, hidden, sentences, cfg))
    return torch.stack(columns, 1)
