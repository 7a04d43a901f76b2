"""Induction in a language model: what it gains on the second copy of random tokens, and the heads that do it.

    ids     first, u_1 ... u_50, u_1 ... u_50        gain = loss on the first copy - loss on the second

The first token of a copy does not count: nothing says that a second copy begins. A head's score is its weight, from
a token of the second copy, on the token after the earlier occurrence (`retrieval_scores`). Heads are ablated in the
second copy by what they had there after 50 other tokens, where nothing repeats.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from regard.attaching.attachment import attach
from regard.attaching.calibrate import repeated, retrieval_scores
from regard.claims.lab import mean
from regard.core import Edit, Site
from regard.explaining.pairs import Pairs, batch_of
from regard.explaining.runs import Values, capture

# tokens of a copy, texts for the scores, others for the losses, draws of other heads
COPY, SCORED, TEXTS, DRAWS = 50, 4, 8, 5
INDUCES = 0.4  # score of an induction head
Head = tuple[int, int]


def scores(model: PreTrainedModel) -> Tensor:
    """[layers, heads] weight on the token after the earlier occurrence, mean over queries and texts."""
    found = [retrieval_scores(model, COPY, 2, seed)["induction"] for seed in range(SCORED)]
    return torch.stack(found).mean(0).double()


def texts(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """([TEXTS, 1 + 2 COPY] ids that repeat, the same after another first copy)."""
    ids = torch.cat([repeated(model, COPY, 2, 100 + i) for i in range(TEXTS)])
    others = torch.cat([repeated(model, COPY, 2, 200 + i) for i in range(TEXTS)])
    return ids, torch.cat([others[:, : 1 + COPY], ids[:, 1 + COPY :]], 1)


def pairs(model: PreTrainedModel, count: int, copy: int = 20) -> Pairs:
    """Texts that end within a second copy, and the same after another first copy; the foil is another token of it."""
    ids, others = (
        torch.cat([repeated(model, copy, 2, seed + i) for i in range(count)]) for seed in (300, 400)
    )
    end = 1 + copy + copy // 2
    corrupt = torch.cat([others[:, : 1 + copy], ids[:, 1 + copy : end]], 1)
    clean = ids[:, :end]
    return Pairs(batch_of(clean.tolist()), batch_of(corrupt.tolist()), ids[:, end], ids[:, 1])


def in_second_copy(heads: Sequence[Head], given: Values) -> list[Edit]:
    """One edit a layer."""
    edits, rows = [], tuple(range(-COPY, 0))
    for layer in sorted({n for n, _ in heads}):
        some = tuple(sorted(h for n, h in heads if n == layer))
        site = Site("z", layers=layer, heads=some, tower="text", rows=rows)
        edits.append(Edit(site, "replace", given["z"][layer][:, list(some), -COPY:]))
    return edits


@torch.no_grad()
def copied(model: PreTrainedModel, ids: Tensor, edits: Sequence[Edit] = ()) -> tuple[float, float]:
    """Mean loss on the first copy and on the second."""
    with attach(model, list(edits) or None):
        logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")  # [TEXTS, 2 COPY]
    return loss[:, 1:COPY].mean().item(), loss[:, COPY + 1 :].mean().item()


def gains(model: PreTrainedModel, sets: Sequence[Sequence[Head]]) -> tuple[float, float, list[float]]:
    """Loss on the first copy and on the second, and the gain without each set of heads."""
    ids, others = texts(model)
    given = capture(model, batch_of(others.tolist()), ["z"])[1]
    first, second = copied(model, ids)
    return first, second, [first - copied(model, ids, in_second_copy(heads, given))[1] for heads in sets]


def findings(model: PreTrainedModel, of_tasks: Sequence[Head]) -> dict[str, Any]:
    """Numbers of a model, and how many heads of a circuit are induction heads, beside what chance gives."""
    found = scores(model)
    layers, heads = found.shape
    order = [(int(i) // heads, int(i) % heads) for i in found.flatten().argsort(descending=True)]
    count = max(1, int((found > INDUCES).sum()))
    best, others = order[:count], order[count:]
    drawn = [random.Random(seed).sample(others, count) for seed in range(DRAWS)]
    first, second, (without, alone, *random_ones) = gains(model, [best, of_tasks, *drawn])
    within = sum(sum(b[0] == n for b in best) / heads for n, _ in of_tasks)
    return {
        "top_heads": [list(head) for head in order[:10]],
        "top_scores": found.flatten().sort(descending=True).values[:10].tolist(),
        "median_score": found.median().item(),
        "heads": int((found > INDUCES).sum()),
        "shared": len({*best} & {*of_tasks}),
        "shared_chance": len(of_tasks) * count / (layers * heads),
        "shared_chance_within_layers": within,
        "loss_first_copy": first,
        "loss_second_copy": second,
        "gain": first - second,
        "gain_without_induction_heads": without,
        "gain_without_random_heads": mean(random_ones),
        "gain_without_random_heads_by_draw": random_ones,
        "gain_without_shared_heads": alone,
    }
