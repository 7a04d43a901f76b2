"""RazorAttention's claim: which heads need the whole cache to find a passkey?

Passkeys lie outside the window of the other heads, so only heads with the full cache can reach them. The prompts are
read once, with full attention as under the method, whose heads are cut when the answer begins. Beside the bound stand
twice as many heads, and as many chosen by the retrieval score (methods/tracing/retrieval_heads.py) on other needles.
"""

import random
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.attaching.calibrate import by_kv_head, induction_heads
from regard.claims.lab import difference, generator, mean
from regard.claims.shipped_lm import samples, shipped
from regard.core.claim import Claim, Measured
from regard.explaining.tracing import accuracy, read_all, scored
from regard.methods.caches import razor_attention as page
from regard.ops import View, softmax_attention
from regard.tasks import Sample

LENGTHS, DEPTHS, DRAWS = (512, 1024), 16, 8
SINKS, WINDOW = 4, 64
SHARE = 0.15  # of the KV heads: 2 of 12, 14 of 90


def questions(model: str, seed: int = 1) -> list[list[Sample]]:
    """Needles outside the window, max(64, N / 5), when the first token is generated."""
    needles = [samples("needle", n, DEPTHS, seed, model=model) for n in LENGTHS]
    outside = [
        [s for s in group if s.evidence[1] <= n - max(WINDOW, n // 5)] for n, group in zip(LENGTHS, needles)
    ]
    return [group for group in outside if group]


def compensated() -> float:
    """Largest difference to full attention when all dropped keys, and all dropped values, are the same."""
    g = generator()
    q = torch.randn(2, 4, 1, 16, generator=g)
    k, v = torch.randn(2, 2, 2, 200, 16, generator=g).unbind()
    k[:, :, SINKS : -WINDOW // 2], v[:, :, SINKS : -WINDOW // 2] = k[:, :, 9:10], v[:, :, 9:10]
    whole = softmax_attention(q, k, v, scale=0.25)
    kept = page.keep(view_of(q, k, v), page.Config(heads=(), retrieval=0.0, sinks=SINKS, window=WINDOW))
    assert kept is not None and kept.merged is not None
    slots = kept.slots.expand(2, 2, -1)[..., None].expand(-1, -1, -1, 16)
    k, v = (torch.cat([x.gather(2, slots), mean], 2) for x, mean in zip((k, v), kept.merged[:2], strict=True))
    count = torch.cat([torch.ones(2, 2, slots.shape[2]), kept.merged[2]], -1)
    # [B, H, 1, m], added to the scores
    stands_for = count.log().repeat_interleave(2, 1)[:, :, None]
    return difference(softmax_attention(q, k, v, scale=0.25, bias=stands_for), whole)


def view_of(q: Tensor, k: Tensor, v: Tensor) -> View:
    n = k.shape[2]
    return View(
        q=q, k=k, v=v, index=torch.arange(n)[None, None], real=None, scale=0.25, seen=n, groups=2, heads=(0, 1),
        budget=torch.full((len(q),), n), total_heads=2,
    )  # fmt: skip


def random_heads(best: tuple, count: int) -> list[tuple]:
    """Draws of `count` KV heads that are not the best `count`."""
    every = [head for head in sorted(best) if head not in best[:count]]
    return [tuple(random.Random(seed).sample(every, count)) for seed in range(DRAWS)]


def measure(on: str) -> Measured:
    model, groups = shipped(on).model, questions(on)
    texts, best = read_all(model, groups), induction_heads(model)
    settings = {"retrieval": SHARE, "sinks": SINKS, "window": WINDOW}
    razor = lambda heads: [catalog.method("razor_attention", heads=tuple(heads), **settings)]  # noqa: E731
    full, kept = accuracy(model, texts), accuracy(model, texts, razor(best))
    count = round(SHARE * len(best))
    draws = [accuracy(model, texts, razor(heads)) for heads in random_heads(best, count)]
    twice = catalog.method("razor_attention", heads=best, **{**settings, "retrieval": 2 * SHARE})
    # other needles, of the shorter length: which heads copy an answer there
    retrieving = by_kv_head(model, scored(model, read_all(model, questions(on, seed=0)[:1])).scores)
    numbers: dict[str, Any] = {
        "accuracy_full": full,
        "accuracy_induction_heads": kept,
        "accuracy_random_heads": mean(draws),
        "random_draws": draws,
        "accuracy_twice_the_heads": accuracy(model, texts, [twice]),
        "accuracy_heads_by_retrieval_score": accuracy(model, texts, razor(retrieving)),
        "heads": [list(head) for head in best[:count]],
        "kv_heads": len(best),
        "questions": sum(map(len, groups)),
        "compensation_difference": compensated(),
    }
    parts = {
        "full attention finds passkeys": full > 0,
        "induction heads keep them": kept >= 0.95 * full,
        "random heads do not": mean(draws) <= 0.7 * full,
        "compensation": numbers["compensation_difference"] < 1e-5,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="razor_attention",
    statement=(
        "the full cache in the 15 % of KV heads with the highest induction score, 4 sinks, a window of N / 5 and a "
        "compensation token in the others, keeps passkey accuracy; the same number of random heads does not"
    ),
    bound=(
        "accuracy >= 0.95 of full, versus random heads (mean of 8 draws) <= 0.7 of full; identical dropped k, v: "
        "output difference < 1e-5"
    ),
    measure=measure,
    models=("lm", "smollm2"),
    fails={"smollm2": ("induction heads keep them",)},
    contradicted={
        "smollm2": (
            "of 26 passkeys that full attention finds, the 14 of 90 KV heads with the highest induction score keep "
            "69 %, and random heads none: the order is the paper's, the number is not. Twice as many keep 88 %, and 14 "
            "heads by their retrieval score on other needles 96 %: random tokens that repeat show little of heads that "
            "copy a passkey, (6, 0) and (21, 0). Tried: no compensation token (69 %), the best echo head for the last "
            "(62 %), the mean over a group's query heads for its largest (69 %), a window of 200 (73 %)"
        ),
    },
)
