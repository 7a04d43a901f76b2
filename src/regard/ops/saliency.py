"""Context-aware saliency of a map, patch by patch, for references."""

import math


def compared(m: list[list[float]], patch: int, similar: int, distance: float) -> list[list[float]]:
    """How much each patch of a map differs from those that are the most like it, places apart counting less."""
    high, wide, half = len(m), len(m[0]), patch // 2
    around = [(a, b) for a in range(-half, half + 1) for b in range(-half, half + 1)]

    def around_of(y: int, x: int) -> list[float]:
        return [m[min(max(y + a, 0), high - 1)][min(max(x + b, 0), wide - 1)] for a, b in around]

    cells = [(y, x, around_of(y, x)) for y in range(high) for x in range(wide)]
    result = [[0.0] * wide for _ in m]
    for y, x, own in cells:
        d = []
        for v, u, other in cells:
            if (v, u) != (y, x):
                far = math.hypot(y - v, x - u) / max(high, wide)
                d.append(math.dist(own, other) / patch / (1 + distance * far))
        least = sorted(d)[:similar]
        result[y][x] = 1 - math.exp(-sum(least) / len(least)) if least else 0.0
    return result


def focused(s: list[list[float]], focus: float) -> list[list[float]]:
    """Less where the nearest place above `focus` of the largest is far."""
    most = max(map(max, s)) or 1.0
    s = [[n / most for n in row] for row in s]
    foci = [(y, x) for y, row in enumerate(s) for x, n in enumerate(row) if n > focus]
    size = max(len(s), len(s[0]))

    def far(y: int, x: int) -> float:
        return min((math.hypot(y - v, x - u) / size for v, u in foci), default=1.0)

    return [[n * (1 - min(far(y, x), 1.0)) for x, n in enumerate(row)] for y, row in enumerate(s)]
