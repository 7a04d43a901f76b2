"""Superlinear attention's claim: every key before the window is in some span, and a query touches about √t keys.

Anchors and spans come from the page's own helpers and are counted for every t. That these are what the fast path reads
is asked of it too: the spans that it says it read, of every anchor at once, leave out no key either.
"""

import torch

from regard.claims.lab import generator, random_qkv, slope
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.sparse.superlinear_attention import METHOD, Config, distances, lengths, window

LONGEST = 4_096
SIZES = [2**i for i in range(10, 21)]


def covered(t: int, cfg: Config) -> int:
    """How many of the t keys that a query sees lie in its window or in the span of some anchor."""
    seen, w, (back, ahead) = torch.zeros(t, dtype=torch.bool), window(cfg), lengths(t, cfg)
    seen[max(0, t - w) :] = True
    for distance in distances(t, cfg):
        anchor = t - 1 - distance
        seen[max(0, anchor - back) : max(0, min(anchor + ahead, t - 1 - w) + 1)] = True
    return int(seen.sum())


def touched(t: int, cfg: Config) -> int:
    """Keys of the window, anchors that are scored, and keys of the top_k longest spans."""
    w, anchors, (back, ahead) = window(cfg), [t - 1 - d for d in distances(t, cfg)], lengths(t, cfg)
    spans = sorted(min(a + ahead, t - 1 - w) - max(0, a - back) + 1 for a in anchors)
    return min(w, t) + len(anchors) + sum(spans[-cfg.top_k :])


def holes(cfg: Config) -> tuple[int, int]:
    """(how many t <= 4,096 miss a key, the most keys that one misses)."""
    missed = [t - covered(t, cfg) for t in range(1, LONGEST + 1)]
    return sum(miss > 0 for miss in missed), max(missed)


def left_out_by_fast(back: float, n: int = 400) -> int:
    """Keys of the last of n queries that no span of the fast path holds, where it takes every anchor."""
    cfg, (q, k, v) = Config(top_k=n, back=back), random_qkv(generator(), 1, n, 8)
    first, last = METHOD.fast(q, k, v, cfg, Call(params={"route": torch.eye(8)[None]}))[2]["spans"]
    seen = set(range(n - window(cfg), n))
    for a, z in zip(first[0, 0, -1].tolist(), last[0, 0, -1].tolist(), strict=True):
        seen |= set(range(a, z + 1)) if a >= 0 else set()
    return n - len(seen)


def measure() -> Measured:
    numbers: dict = {}
    for s in (0, Config().window_index):
        two, one = (holes(Config(window_index=s, back=back)) for back in (2.0, 1.0))
        numbers |= {
            f"window_index_{s}_texts_with_holes_at_2": two[0],
            f"window_index_{s}_texts_with_holes_at_1": one[0],
        }
        numbers[f"window_index_{s}_most_keys_left_out_at_1"] = one[1]
        numbers[f"window_index_{s}_slope"] = slope(SIZES, [touched(t, Config(window_index=s)) for t in SIZES])
    numbers |= {f"left_out_by_fast_at_{int(back)}": left_out_by_fast(back) for back in (2.0, 1.0)}
    numbers["touched_at_4096"] = touched(LONGEST, Config())
    whole = all(value == 0 for name, value in numbers.items() if name.endswith("_at_2"))
    broken = all(value > 0 for name, value in numbers.items() if name.endswith("_at_1"))
    root = all(abs(value - 0.5) <= 0.05 for name, value in numbers.items() if name.endswith("_slope"))
    parts = {"no holes at factor 2": whole, "holes at factor 1": broken, "root of t": root}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="superlinear_attention",
    statement=(
        "for every t the spans of all anchors and the window hold all past keys, while the keys that a query touches "
        "grow as the root of t; with half the span before an anchor keys are left out"
    ),
    bound=(
        "coverage = 100% for all t <= 4096 at backward factor 2; log-log slope of touched keys 0.5 +- 0.05; factor 1 "
        "leaves holes"
    ),
    measure=measure,
)
