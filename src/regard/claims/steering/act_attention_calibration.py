"""ACT's claim, on the shipped language model: heads that a search finds, against as many at random.

Accuracy is the share of the next tokens of held-out text that the model has right, in pieces of 256 tokens: at
retrieval this model has nothing left to gain. A split has calibration and test pieces of its own, none twice. On
calibration pieces each head of all layers but the first is calibrated alone, and those that raise the accuracy are
selected; on the test pieces all of them are calibrated at once, and so are as many heads drawn at random, several
times.

alpha and beta are those of the released code. With 8 pieces a side, measured first, selected heads were above random
ones in 2 of 5 splits; with 32 in all, by 0.00004 to 0.0018. That is damage which selection avoids: neither is above
the model as it is (`selected_minus_plain`), and on calibration pieces heads that help one by one do not always help
at once.
"""

import random
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.claims.lab import mean, threads
from regard.claims.shipped_lm import shipped, stream
from regard.core import Claim, Measured, Method, Observer, Site
from regard.methods.steering import act_attention_calibration as page

NAME, LENGTH, PIECES, SPLITS, DRAWS = "act_attention_calibration", 256, 32, 5, 6
BETTER = 4  # in so many of the splits selected heads are to be above random ones
CANDIDATES = tuple((layer, head) for layer in (1, 2, 3) for head in range(6))


def calibrated(heads: tuple[page.Head, ...], **changed: Any) -> Method:
    cfg = page.Config(**{"heads": heads, "first": 0, "spared": 0, **changed})
    return Method(NAME, page.METHOD, cfg)


@cache
def pieces() -> Tensor:
    """[2 SPLITS, PIECES, LENGTH + 1] ids, each piece after the first token."""
    count = 2 * SPLITS * PIECES
    ids = stream(count * LENGTH + 1)
    begin = ids[:1].expand(count, 1)
    return torch.cat([begin, ids[1:].view(count, LENGTH)], 1).view(-1, PIECES, LENGTH + 1)


@torch.inference_mode()
def accuracy(ids: Tensor, heads: tuple[page.Head, ...]) -> float:
    """Of the model as it is, where there are no heads."""
    model = shipped().model
    with attach(model, calibrated(heads)) if heads else nullcontext():
        best = model(ids[:, :-1]).logits.argmax(-1)
    return (best == ids[:, 1:]).double().mean().item()


def split(number: int) -> dict[str, float]:
    """Accuracies on the test pieces, and what was selected."""
    given, test = pieces()[2 * number], pieces()[2 * number + 1]
    selected = page.raising_heads(lambda heads: accuracy(given, heads), CANDIDATES)
    rng = random.Random(f"{NAME} {number}")
    others = [accuracy(test, tuple(rng.sample(CANDIDATES, len(selected)))) for _ in range(DRAWS)]
    found = {"plain": accuracy(test, ()), "selected": accuracy(test, selected), "random": mean(others)}
    raised = accuracy(given, selected) - accuracy(given, ())
    return {**found, "heads": len(selected), "raised_on_calibration": raised}


@torch.inference_mode()
def exactness() -> dict[str, float]:
    """What the rows of all candidates sum to, how many sinks there are, and whether β = 1 is the model itself."""
    model, ids = shipped().model, pieces()[0][:, :-1]
    plain = model(ids).logits
    with attach(model, calibrated(CANDIDATES, beta=1.0)):
        same = torch.equal(model(ids).logits, plain)
    rows = Observer("value", Site("weights", rows=tuple(range(-16, 0))))
    with attach(model, [calibrated(CANDIDATES), rows]) as seen:
        moved = (model(ids).logits - plain).abs().max().item()
    weights = [w for _, _, w in next(iter(seen.records.values()))]
    error = max((w.double().sum(-1) - 1).abs().max().item() for w in weights)
    return {"row_sum_error": error, "beta_1_is_the_model": int(same), "logits_move_by": moved}


def measure() -> Measured:
    with threads(1):
        exact, splits = exactness(), [split(number) for number in range(SPLITS)]
    gains = [s["selected"] - s["random"] for s in splits]
    numbers: dict[str, Any] = {
        f"accuracy_{key}": [s[key] for s in splits] for key in ("plain", "selected", "random")
    }
    numbers |= {"selected_minus_random": gains, "heads_selected": [s["heads"] for s in splits]}
    numbers |= {"selected_minus_plain": [s["selected"] - s["plain"] for s in splits]}
    numbers |= {"raised_on_calibration": [s["raised_on_calibration"] for s in splits]} | exact
    better = sum(gain > 0 for gain in gains)
    parts = {
        "rows keep their sum": exact["row_sum_error"] < 1e-6,
        "β = 1 is the model": exact["beta_1_is_the_model"] == 1,
        "above random heads": better >= BETTER,
    }
    return Measured.by(parts, numbers | {"splits_better": better})


CLAIM = Claim(
    name=NAME,
    statement=(
        "β = 1 is the identity and rows keep their sum; with heads selected on calibration texts accuracy on "
        "others is higher than with an equal number of random heads"
    ),
    bound=(
        "row-sum error < 1e-6, logits at β = 1 equal to the last bit; accuracy with selected heads minus that with "
        "random heads > 0 in >= 4 of 5 splits"
    ),
    measure=measure,
)
