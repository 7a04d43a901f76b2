"""Which tokens of the prompt carried the answer: several ways to say it, each held against removal.

    attention        weights of the last token in the heads that matter, added up
    attention·norm   the same, each weight times the length of what the head writes for that token, |v W_O|
    gradient         (embedding - mean embedding) · ∂m/∂embedding
    removal          what the metric loses without a part of the prompt
    surrogate        a sparse line (scikit-learn's Lasso) fitted to removals of random halves
    random, last     controls: a random order, the attention of the last layer averaged over heads

A part is a token of a short prompt and a span of a long one. It is removed as if it had never been fed: the others keep
their positions, and a window reaches past what is gone; beside an image it is hidden from every query. What a way is
worth is what the metric loses without the k parts that it names first, and the rank correlation of its sums with the
metric over removals that no way has seen (linear datamodelling score).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.anatomy import anatomy
from regard.core import Edit, Observer, Site, Unsupported, require
from regard.explaining.batches import TOKENS, Progress
from regard.explaining.effects import bootstrap, finite
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.runs import embedded, forward, frozen, heads_at, layers_of
from regard.ops.attribution import (
    asked,
    linear_datamodelling_score,
    occlusion,
    removal_masks,
    removal_surrogate,
)

Span = tuple[int, int]  # first and past-the-last token
MOST = 64  # parts of a prompt


@dataclass(frozen=True)
class Carried:
    """Scores of one way over the parts and tokens of a prompt, and what they are worth."""

    method: str
    parts: Tensor  # [parts]
    tokens: Tensor  # [N]
    drop: dict[str, list]  # k, mean
    lds: dict[str, float] | None
    control: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "scores": self.tokens.tolist(), "drop": self.drop, "lds": self.lds,
                "control": self.control}  # fmt: skip


def parts_of(text: Sequence[str], most: int = MOST, keep: int = 0) -> list[Span]:
    """Spans of tokens: each alone where there are few; else lines and sentences, joined until there are `most`.

    The first `keep` tokens (a mark of the beginning) are of no part.
    """
    require(most >= 1, "one part or more", most=most)
    n = len(text)
    if n - keep <= most:
        return [(i, i + 1) for i in range(keep, n)]
    ends = [
        i + 1
        for i, t in enumerate(text)
        if i >= keep and ("\n" in t or t.strip()[-1:] in (".", "?", "!", "。"))
    ]
    ends = sorted({*ends, n})
    spans, start, size = [], keep, max(1.0, (n - keep) / most)
    for end in ends:
        while end - start > 1.5 * size:
            spans.append((start, start + round(size)))
            start += round(size)
        if end - start >= size / 2 or end == n:
            spans.append((start, end))
            start = end
    return [s for s in spans if s[1] > s[0]]


@dataclass
class Without:
    """The metric of a prompt of which only some parts are kept: a function of masks [S, parts], True where kept."""

    model: PreTrainedModel
    spans: Sequence[Span]
    pairs: Pairs  # one, whose clean prompt, target, foil and metric are asked
    progress: Progress | None = None
    known: dict[tuple[bool, ...], float] = field(default_factory=dict)  # what was asked before
    done: int = 0
    total: int = 0

    @property
    def ids(self) -> Tensor:
        """[N]"""
        return self.pairs.clean.ids[0]

    @torch.no_grad()
    def __call__(self, masks: Tensor) -> Tensor:
        keys = [tuple(mask.tolist()) for mask in masks]
        new = list(dict.fromkeys(key for key in keys if key not in self.known))
        for some in torch.tensor(new, dtype=torch.bool).split(max(1, TOKENS // len(self.ids))) if new else ():
            self.known.update(zip(map(tuple, some.tolist()), self.some(some).tolist(), strict=True))
        self.done += len(masks)
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done))
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)

    def hidden(self, masks: Tensor) -> Tensor:
        """[S] scores of whole texts, in which no query sees what is taken away."""
        edits, n = [], len(self.ids)
        for text, mask in enumerate(masks):
            stays = {*self.kept(mask).tolist()}
            keys = tuple(i for i in range(n) if i not in stays)
            if keys:
                edits.append(Edit(Site("scores", keys=keys, tower="text", texts=text), "block"))
        batch = self.pairs.clean.at([0]).repeated(len(masks)).to(self.model.device)
        logits, _ = forward(self.model, batch, edits)
        return self.pairs.score(logits.cpu())

    def some(self, masks: Tensor) -> Tensor:
        """[S] scores; texts of unequal length are padded to the left, and tokens keep their positions."""
        if self.pairs.clean.image:
            return self.hidden(masks)
        kept = [self.kept(mask) for mask in masks]
        width = max(len(k) for k in kept)
        ids = torch.zeros(len(kept), width, dtype=torch.long)
        real, places = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, places_kept in enumerate(kept):
            n = len(places_kept)
            ids[row, width - n :], places[row, width - n :] = self.ids[places_kept], places_kept
            real[row, width - n :] = 1
        device = self.model.device
        batch = At(ids.to(device), real.to(device), places=places.to(device))
        logits, _ = forward(self.model, batch)
        return self.pairs.score(logits.cpu())

    def kept(self, mask: Tensor) -> Tensor:
        """The places of tokens that stay: all but those of parts that are taken away. The last token always stays."""
        stays = torch.ones(len(self.ids), dtype=torch.bool)
        for (first, last), keep in zip(self.spans, mask.tolist(), strict=True):
            stays[first:last] = keep
        stays[-1] = True
        return stays.nonzero().flatten()


@dataclass(frozen=True)
class At(Batch):
    """Prompts whose tokens stand at given places."""

    places: Tensor = field(default=None)  # type: ignore[assignment]

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.places}


def check_positions(model: PreTrainedModel) -> None:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unsupported(
            f"{type(model).__name__} takes no position_ids: tokens that stay cannot keep their places"
        )


# ways that look at the model once


@torch.no_grad()
def last_rows(model: PreTrainedModel, batch: Batch) -> dict[int, Tensor]:
    """Layer -> [H, N] weights of the last token of one prompt."""
    _, attached = forward(model, batch, [Observer("last_row", Site(tower="text"), name="rows")])
    return {layer: w[0] for layer, _, w in attached.records["rows"]}


@torch.no_grad()
def written_lengths(model: PreTrainedModel, batch: Batch) -> dict[int, Tensor]:
    """Layer -> [H, N] length of what each head would write for each token, |v W_O|; unknown layers are left out."""
    _, attached = forward(model, batch, [Observer("value", Site("v", tower="text"), name="v")])
    matrices = output_matrices(model)
    result = {}
    for layer, _, v in attached.records["v"]:
        if layer in matrices:
            w = matrices[layer].to(v)  # [H, E, width]
            heads = v[0].repeat_interleave(len(w) // v.shape[1], 0)
            gram = w @ w.mT
            result[layer] = torch.einsum("hne,hef,hnf->hn", heads, gram, heads).clamp(min=0).sqrt()
    return result


def output_matrices(model: PreTrainedModel) -> dict[int, Tensor]:
    """Layer -> [H, E, width] the part of the output projection that each head's output meets."""
    heads, width = heads_at("z", model), model.config.get_text_config().hidden_size
    result: dict[int, Tensor] = {}
    for layer in anatomy(model):
        weight = getattr(layer.project, "weight", None)
        if not isinstance(weight, Tensor) or layer.attention is None:
            continue
        matrix = weight if weight.shape[1] == width and weight.shape[0] != width else weight.T
        matrix = weight if type(layer.project).__name__ == "Conv1D" else matrix
        if matrix.shape[0] % heads == 0:
            result[layer.number] = matrix.unflatten(0, (heads, -1))
    return result


def gradient_scores(model: PreTrainedModel, pairs: Pairs) -> Tensor:
    """[N] (embedding - mean embedding) · gradient of the metric at the clean prompt."""
    with torch.enable_grad(), frozen(model), embedded(model) as leaf:
        logits, _ = forward(model, pairs.clean)
        (g,) = torch.autograd.grad(pairs.score(logits).sum(), leaf[0])
    table: nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    mean = table.weight.detach().mean(0)
    return ((leaf[0].detach() - mean) * g).sum(-1)[0].double().cpu()


def attention_scores(
    rows: dict[int, Tensor], heads: Sequence[tuple[int, int]], by: dict[int, Tensor] | None
) -> Tensor:
    """[N] weights of these heads, times a length where one is given."""
    parts = [rows[n][h] * (1 if by is None else by[n][h]) for n, h in heads if by is None or n in by]
    require(len(parts) > 0, "a head whose output projection is known", heads=[*heads])
    return torch.stack(parts).sum(0).double().cpu()


# all of them


def carried(
    model: PreTrainedModel,
    pairs: Pairs,
    spans: Sequence[Span],
    heads: Sequence[tuple[int, int]],
    *,
    samples: int = 64,
    held: int = 32,
    seed: int = 0,
    ks: Sequence[int] = (1, 2, 4, 8),
    progress: Progress | None = None,
) -> list[Carried]:
    """Every way for the clean prompt of the first pair, the best by its drops first, then the controls.

    pairs     the others are variations of the first, equally long: drops are measured on all of them
    heads     those whose attention is read (layer, query head): the ones that mattered
    samples   removals that the surrogate is fitted to; `held` others on which all ways are scored
    """
    if not pairs.clean.image:
        check_positions(model)
    masks = removal_masks(len(spans), held, seed + 1)
    ks = [k for k in ks if k <= len(spans)]
    withouts = [Without(model, spans, pairs.at([i]).to("cpu"), progress) for i in range(len(pairs))]
    without = withouts[0]
    without.total = held + len(spans) + 1 + samples + 7 * (len(ks) + 1)
    truth = asked(without, masks)
    ways = scores_of(model, pairs.at([0]).to(model.device), spans, heads, without, samples, seed)
    found = []
    for name, (by_part, by_token) in ways.items():
        drop = dropped(withouts, by_part, ks)
        lds = datamodelling(by_part, masks, truth)
        found.append(Carried(name, by_part, by_token, drop, lds, name in ("random", "last layer")))
    return sorted(found, key=lambda c: (c.control, -sum(c.drop["mean"])))


def scores_of(
    model: PreTrainedModel, pairs: Pairs, spans: Sequence[Span], heads: Sequence[tuple[int, int]], without: Without,
    samples: int, seed: int,
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Way -> (scores of parts, scores of tokens)."""
    rows, lengths = last_rows(model, pairs.clean), written_lengths(model, pairs.clean)
    last = layers_of(model)[-1]
    by_token = {
        "attention": attention_scores(rows, heads, None),
        "gradient": gradient_scores(model, pairs),
        "last layer": rows[last].mean(0).double().cpu(),
    }
    if any(n in lengths for n, _ in heads):
        by_token["attention·norm"] = attention_scores(rows, heads, lengths)
    by_part = {
        "removal": occlusion(without, len(spans)),
        "random": torch.rand(len(spans), generator=torch.Generator().manual_seed(seed + 2)).double(),
    }
    if find_spec("sklearn") is not None:
        by_part["surrogate"] = removal_surrogate(without, len(spans), samples, seed)
    ways = {name: (torch.stack([x[a:b].sum() for a, b in spans]), x) for name, x in by_token.items()}
    return {**ways, **{name: (x, spread(x, spans, len(without.ids))) for name, x in by_part.items()}}


def spread(x: Tensor, spans: Sequence[Span], n: int) -> Tensor:
    """[N] scores of parts at each of their tokens; 0 at those of none."""
    result = torch.zeros(n, dtype=torch.float64)
    for (first, last), value in zip(spans, x.tolist(), strict=True):
        result[first:last] = value
    return result


def dropped(withouts: Sequence[Without], scores: Tensor, ks: Sequence[int]) -> dict[str, list]:
    """What the metric loses without the k parts of the highest scores, with its interval over the prompts."""
    each = torch.tensor([drops(w, scores, ks) for w in withouts], dtype=torch.float64)
    low, high = bootstrap(each, torch.ones(len(each)))
    return {"k": [*ks], "mean": each.mean(0).tolist(), "low": finite(low), "high": finite(high)}


def drops(without: Without, scores: Tensor, ks: Sequence[int]) -> list[float]:
    """What the metric of one prompt loses without the k parts of the highest scores."""
    masks = torch.ones(len(ks) + 1, len(scores), dtype=torch.bool)
    order = scores.argsort(descending=True, stable=True)
    for row, k in enumerate(ks):
        masks[row + 1, order[:k]] = False
    found = asked(without, masks)
    return (found[0] - found[1:]).tolist()


def datamodelling(scores: Tensor, masks: Tensor, truth: Tensor, draws: int = 400) -> dict[str, float]:
    """The score with its bootstrap interval over removals."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(truth), (draws, len(truth)), generator=g)
    found = torch.tensor([linear_datamodelling_score(scores, masks[i], truth[i]) for i in drawn])
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return {"mean": linear_datamodelling_score(scores, masks, truth), "low": low, "high": high}
