"""Retrieval Head's claim on the shipped model: which heads does needle recall live in?

Detected on one seed, ablated on another. As in the released code the prompt is read in full, heads are switched off
by uniform attention while the answer is generated, and random heads are drawn from those that do not retrieve.
"""

import random
from math import ceil

from regard.core.claim import Claim, Measured
from regard.methods.tracing.retrieval_heads import Config, ablate
from regard.models.shipped import load_shipped
from regard.models.trace import Read, Retrieval, accuracy, read_all, scored
from regard.tasks import task

LENGTHS, DEPTHS, DRAWS = (256, 512, 1024), 16, 5
MASKED = 0.05  # share of the heads that is switched off, as in the paper's figure: rounded up, 2 of 24


def texts(model, tokenizer, seed: int) -> list[Read]:
    return read_all(model, [task("needle").samples(tokenizer, n, DEPTHS, seed) for n in LENGTHS])


def ablated(model, asked: list[Read], found: Retrieval, how: str) -> tuple[float, list[float]]:
    """Accuracy without the top heads, and without as many random heads that do not retrieve."""
    cfg, ranked = Config(how=how), found.ranked()
    count, keeping = ceil(MASKED * len(ranked)), round(found.share(cfg.threshold) * len(ranked))
    draws = [random.Random(seed).sample(ranked[keeping:], count) for seed in range(DRAWS)]
    return accuracy(model, asked, ablate(ranked[:count], cfg)), [
        accuracy(model, asked, ablate(heads, cfg)) for heads in draws
    ]


def measure() -> Measured:
    model, tokenizer = load_shipped("lm")
    found, asked = scored(model, texts(model, tokenizer, seed=0)), texts(model, tokenizer, seed=1)
    full = accuracy(model, asked)
    numbers = {
        "accuracy": full,
        "share_of_heads_at_0.1": found.share(0.1),
        "top_heads": [list(head) for head in found.ranked()[:4]],
        "top_scores": found.scores.flatten().sort(descending=True).values[:8].tolist(),
        "heads": found.scores.numel(),
        "masked": ceil(MASKED * found.scores.numel()),
    }
    for how in ("uniform", "zero"):
        top, others = ablated(model, asked, found, how)
        numbers[f"drop_top_{how}"] = 100 * (full - top)
        numbers[f"drop_random_{how}"] = 100 * (full - sum(others) / DRAWS)
    return Measured(numbers["drop_top_uniform"] >= 50 and numbers["drop_random_uniform"] <= 10, numbers)


CLAIM = Claim(
    name="retrieval_heads",
    statement=(
        "in a small model trained to copy from its context, switching off the top-scoring 5 % of the heads destroys "
        "needle recall, while switching off as many random heads that do not retrieve does not"
    ),
    bound="accuracy drop >= 50 points (top heads) and <= 10 (mean of 5 random draws); share of heads >= 0.1 reported",
    measure=measure,
)
