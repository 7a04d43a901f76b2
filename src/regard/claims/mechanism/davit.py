"""DaViT's claim: channels compare all places at linear cost and do not know where these are; windows stay local.

Tokens are permuted and the outputs permuted back; the change is the largest difference, relative to the largest output.
One pixel in a corner gets another query, key and value: which outputs change is counted in float64, so that a small
change is not lost. Times are those of the CPU on one core, of the operator in float32 on 8 heads of 32 channels, a
median of alternating runs from 28 x 28 to 112 x 112 pixels; the exponent is the slope of log time over log pixels. The
process keeps freed memory meanwhile, as otherwise the larger images alone pay for fresh pages.

Beside the bound: how much of its weight a channel gives to the channel that it likes most, on images of two sizes, by
the paper's scale and by Florence-2's. Sums over pixels grow with the image, and the paper's scale does not.
"""

import time
from functools import partial

import torch
from torch import Tensor

from regard.claims.lab import (
    generator,
    keep_freed_memory,
    median_times,
    random_qkv,
    relative_difference,
    slope,
    threads,
)
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.grid import davit as page

HEADS, WIDTH, SIDE, WINDOW = 8, 32, 56, 7
SIDES = (28, 42, 56, 84, 112)
RUNS = 21
TURNS = ("channel", "window")


def mixed(qkv: tuple[Tensor, ...], side: int, **settings: object) -> Tensor:
    q, k, v = qkv
    return page.METHOD.fast(q, k, v, page.METHOD.configure(**settings), Call("self", grid=(side, side)))[0]


def change_under_permutation(attention: str) -> float:
    qkv = random_qkv(generator(), HEADS, SIDE**2, WIDTH)
    order = torch.randperm(SIDE**2, generator=generator(1))
    out = mixed(qkv, SIDE, attention=attention)
    moved = mixed(tuple(t[:, :, order] for t in qkv), SIDE, attention=attention)
    return relative_difference(moved[:, :, order.argsort()], out)


def moved_by_a_pixel(attention: str) -> Tensor:
    """[SIDE, SIDE]: by how much, at most, each output changes with the pixel in the corner."""
    qkv = random_qkv(generator(), HEADS, SIDE**2, WIDTH, dtype=torch.float64)
    other = tuple(t.clone() for t in qkv)
    for i, t in enumerate(other):
        t[:, :, 0] = torch.randn(t[:, :, 0].shape, generator=generator(2 + i), dtype=t.dtype)
    apart = mixed(other, SIDE, attention=attention) - mixed(qkv, SIDE, attention=attention)
    return apart.abs().amax((0, 1, 3)).view(SIDE, SIDE)


def largest_weight(side: int, scale: str) -> float:
    """The mean over channels of the largest of their weights."""
    q, k, _ = random_qkv(generator(), HEADS, side**2, WIDTH)
    # values of a channel each: what a token gets of it is its weight
    each = torch.eye(WIDTH).expand(1, HEADS, -1, -1)
    values = torch.cat([each, each.new_zeros(1, HEADS, side**2 - WIDTH, WIDTH)], dim=2)
    weights = mixed((q, k, values), side, attention="channel", scale=scale)[
        :, :, :WIDTH
    ]  # [1, H, of k, of q]
    return weights.amax(2).mean().item()


def times(attention: str) -> list[float]:
    """Seconds at each of SIDES."""
    given = {side: random_qkv(generator(), HEADS, side**2, WIDTH) for side in SIDES}
    runs = {side: partial(mixed, given[side], side, attention=attention) for side in SIDES}
    return list(median_times(runs, RUNS, clock=time.process_time).values())


@torch.no_grad()
def measure() -> Measured:
    permuted = {turn: change_under_permutation(turn) for turn in TURNS}
    moved = {turn: moved_by_a_pixel(turn) for turn in TURNS}
    outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    outside[:WINDOW, :WINDOW] = False
    keep_freed_memory()
    with threads(1):
        seconds = {turn: times(turn) for turn in TURNS}
    pixels = [side**2 for side in SIDES]
    exponents = {turn: slope(pixels, seconds[turn]) for turn in TURNS}
    sixteen = {turn: seconds[turn][-1] / seconds[turn][0] for turn in TURNS}
    numbers: dict = {
        "changes_by_permutation": permuted["channel"],
        "changes_by_permutation_window": permuted["window"],
        "least_change_by_a_pixel": moved["channel"].min().item(),
        "places_moved_by_a_pixel": int((moved["channel"] > 0).sum()),
        "largest_change_outside_the_window": moved["window"][outside].max().item(),
        "places_moved_in_the_window": int((moved["window"] > 0).sum()),
        "time_exponents_channel_and_window": list(exponents.values()),
        "times_at_16_times_the_pixels": list(sixteen.values()),
        "milliseconds_channel": [1000 * t for t in seconds["channel"]],
        "milliseconds_window": [1000 * t for t in seconds["window"]],
    }
    for scale in ("width", "places"):
        numbers[f"largest_weight_by_{scale}_at_28_and_112"] = [largest_weight(n, scale) for n in (28, 112)]
    parts = {
        "channels permute": permuted["channel"] < 1e-5,
        "windows do not": permuted["window"] > 1e-2,
        "a pixel reaches all": bool((moved["channel"] > 0).all()),
        "and in windows none outside": bool((moved["window"][outside] == 0).all()),
        "time": max(exponents.values()) <= 1.1,
        "time at 16 times the pixels": max(sixteen.values()) <= 20,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="davit",
    statement=(
        "channel attention commutes with permutations of the places, one pixel changes every output, and time is "
        "linear in pixels; attention in windows stays local"
    ),
    bound=(
        "change under a permutation < 1e-5 (windows > 1e-2); a pixel changes every output (windows: none outside its "
        "own, exactly); from 28 x 28 to 112 x 112 a time exponent <= 1.1, and 16 times the pixels in at most 20 times "
        "the time, of both"
    ),
    measure=measure,
)
