"""Aaren's claim: scan, recurrence and softmax over each prefix agree, at constant memory and constant time per step.

Scores of ±1e4 lie 1e-3 apart in float32, so the difference there is that of the scores; in float64 it is 1e-12.
"""

from functools import partial

import torch
from torch import Tensor

from regard.claims.lab import difference, generator, paired_ratios, random_qkv, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import aaren as page

HEADS, WIDTH, EARLY, LATE = 4, 32, 10, 10_000


def drawn(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    g = generator(seed)
    q, k, v = random_qkv(g, HEADS, n, WIDTH)
    return q, k, v, {"query": torch.randn(HEADS, WIDTH, generator=g)}


def of_each_prefix(k: Tensor, v: Tensor, query: Tensor) -> Tensor:
    """[.., N, E]: softmax over the first 1, 2, ... keys, in float64."""
    s = (k.double() @ query.double()[:, :, None])[..., 0] * WIDTH**-0.5
    return torch.stack(
        [(s[..., : t + 1].softmax(-1)[..., None] * v[:, :, : t + 1]).sum(2) for t in range(s.shape[2])], 2
    )


def stepped() -> dict[str, float | int]:
    """Bytes of the state after 1 and LATE tokens, and the median time of a step after EARLY and after LATE."""
    q, k, v, params = drawn(LATE)
    cfg, state_of = page.Config(), {}
    for n in (1, EARLY, LATE):
        state_of[n] = page.METHOD.fast(q[:, :, :n], k[:, :, :n], v[:, :, :n], cfg, Call(params=params))[1]
    held = {n: sum(t.numel() * t.element_size() for t in state) for n, state in state_of.items()}

    def step(n: int) -> None:
        page.METHOD.fast(
            q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], cfg, Call(params=params, initial_state=state_of[n])
        )

    early, late = paired_ratios(partial(step, EARLY), partial(step, LATE), rounds=2_000, warm=200).medians
    return {"bytes_1": held[1], "bytes_10k": held[LATE], "step_us_10": 1e6 * early, "step_us_10k": 1e6 * late}


def measure() -> Measured:
    with threads(1), torch.no_grad():
        q, k, v, params = drawn(700)
        wanted, cfg = of_each_prefix(k, v, params["query"]), page.Config()
        scan = page.METHOD.fast(q, k, v, cfg, Call(params=params))[0]
        recurrence = page.METHOD.reference(q, k, v, cfg, Call(params=params))[0]
        apart = [difference(out, wanted) for out in (scan, recurrence)]
        huge = k / (k @ params["query"][:, :, None]).abs() * 1e4 * WIDTH**0.5  # scores of ±1e4
        at_huge = [
            path(q, huge, v, cfg, Call(params=params)) for path in (page.METHOD.fast, page.METHOD.reference)
        ]
        finite = all(t.isfinite().all() for out, state in at_huge for t in (out, *state))
        apart_huge = max(difference(out, of_each_prefix(huge, v, params["query"])) for out, _ in at_huge)
        steps = stepped()
    ratio = steps["step_us_10k"] / steps["step_us_10"]
    parts = {
        "the same": max(apart) < 1e-5,
        "finite": finite,
        "bytes": steps["bytes_1"] == steps["bytes_10k"],
        "time of a step": 0.8 <= ratio <= 1.2,
    }
    numbers = {"difference_scan": apart[0], "difference_recurrence": apart[1], "finite_at_1e4": int(finite)}
    return Measured.by(parts, numbers | {"difference_at_1e4": apart_huge, **steps, "step_ratio": ratio})


CLAIM = Claim(
    name="aaren",
    statement="scan, recurrence and softmax over each prefix agree; a step costs the same wherever it is",
    bound="difference < 1e-5; finite at scores ±1e4; state bytes at 10k = at 1; step time at 10k within 20 % of at 10",
    measure=measure,
)
