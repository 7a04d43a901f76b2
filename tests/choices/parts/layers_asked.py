"""How layers share one budget by the entropy and the variance of their attention, written out."""

import math
from fractions import Fraction
from statistics import variance

from regard.testing.cache.definition import Moment


def observed(at: Moment, h: int, count: int) -> list[dict[int, float]]:
    """What each of the last queries of a forward gives to every token that its head holds."""
    given = []
    for i in list(at.new)[-count:]:
        seen = at.seen(i, at.held[at.kv_head(h)])
        weights = dict(zip(seen, at.weights(h, i, seen).tolist(), strict=True))
        given.append({j: weights.get(j, 0.0) for j in at.held[at.kv_head(h)]})
    return given


def spread_of(values: list[float]) -> float:
    return variance(values) if len(values) > 1 else 0.0


def preference(at: Moment, count: int, spread: float, motion: float) -> float:
    H = V = 0.0
    for h in range(len(at.q)):
        given = observed(at, h, count)
        for j in at.lasting(at.kv_head(h)):
            if j < at.n - count:
                H -= sum(row[j] * math.log(row[j]) for row in given if row[j] > 0)
                V += spread_of([row[j] for row in given])
    return H ** (1 / spread) * V ** (1 / motion)


def shared(moments: list[Moment], wanted: list[float], sure: list[int]) -> list[int]:
    """Tokens of each layer: those that stay anyhow, and of the rest of the budget its part, at most what it holds."""
    room = [
        max(len(at.lasting(g)) for g in range(len(at.k))) - s for at, s in zip(moments, sure, strict=True)
    ]
    rest = min(sum(room), sum(at.budget - s for at, s in zip(moments, sure, strict=True)))
    if not any(wanted):
        wanted = [1.0] * len(wanted)
    parts, open_ = [Fraction(0)] * len(room), set(range(len(room)))
    while True:
        left = rest - sum(parts[i] for i in range(len(room)) if i not in open_)
        whole = sum(Fraction(wanted[i]) for i in open_)
        parts = [left * Fraction(wanted[i]) / whole if i in open_ else parts[i] for i in range(len(room))]
        full = {i for i in open_ if parts[i] >= room[i]}
        if not full:
            break
        for i in full:
            parts[i] = Fraction(room[i])
        open_ -= full
        if not open_:
            break
    tokens = [math.floor(p + Fraction(1, 10**9)) for p in parts]
    order = sorted(range(len(parts)), key=lambda i: (tokens[i] - parts[i], i))
    for i in order[: rest - sum(tokens)]:
        tokens[i] += 1
    return [s + t for s, t in zip(sure, tokens, strict=True)]
