"""HiP's claim: with top_k >= N it is full attention; on smooth keys its search finds nearly what the best keys hold.

Queries and keys are AR(1) along the text, of unit variance, queries four times that, so that the best 512 of 8,192 keys
hold nine tenths of the attention. What the search is worth is the softmax mass outside sinks and local window, which
are read anyway: of its blocks, of as many random blocks, and of the top_k best keys of each single query. The numbers
name other smoothness and sharpness beside it, down to keys that are independent: there they hold a fifth.
"""

import math
import time
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.claims.lab import (
    difference,
    generator,
    keep_freed_memory,
    mean,
    paired_ratios,
    random_qkv,
    threads,
)
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.sparse import hip_attention as page
from regard.ops.blocks import Blocks, block_attention, tree

LENGTH, WIDTH, HEADS, SEEDS = 8_192, 64, 2, 3
SHORT, LONG = 4_096, 32_768
CFG = page.Config()
SINKS, FOUND = CFG.sinks // CFG.block_k, CFG.top_k // CFG.block_k  # blocks


def smooth(g: torch.Generator, rho: float) -> Tensor:
    """[1, HEADS, LENGTH, WIDTH] AR(1) along the text, of unit variance."""
    noise = torch.randn(LENGTH, 1, HEADS, WIDTH, generator=g)
    rows = [noise[0]]
    for new in noise[1:]:
        rows.append(rho * rows[-1] + (1 - rho**2) ** 0.5 * new)
    return torch.stack(rows, dim=2)


def guessed(found: Blocks, g: torch.Generator) -> Blocks:
    """The same lists with random blocks in the place of those that were searched for."""
    index = found.index.clone()
    for i in range(index.shape[2]):
        width = max(0, i * CFG.block_q - CFG.local + 1) // CFG.block_k - SINKS
        if width > FOUND:
            drawn = [torch.randperm(width, generator=g)[:FOUND].sort().values for _ in range(HEADS)]
            index[0, :, i, SINKS : SINKS + FOUND] = torch.stack(drawn) + SINKS
    return Blocks(index, CFG.block_q, CFG.block_k)


def shares(rho: float, sharp: float, seed: int) -> tuple[float, float, float]:
    """Mean softmax mass outside sinks and window: of the search, of random blocks, of each query's best keys."""
    g = generator(seed)
    k, q = smooth(g, rho), sharp * smooth(g, rho)
    _, _, aux = page.METHOD.fast(q, k, k, CFG, Call())
    rows = torch.arange(LENGTH // 2, LENGTH, 37)  # of a search in more than top_k keys
    place, first = torch.arange(LENGTH), rows // CFG.block_q * CFG.block_q
    local = (first - CFG.local + 1) // CFG.block_k * CFG.block_k
    read = (place < CFG.sinks) | (place >= local[:, None])
    s = (q[:, :, rows] @ k.mT * WIDTH**-0.5).masked_fill(place > rows[:, None], -torch.inf)
    anyway, outside = (s.masked_fill(~m, -torch.inf) for m in (read, ~read))
    total, always = s.logsumexp(-1), (anyway.logsumexp(-1) - s.logsumexp(-1)).exp()

    def mass(blocks: Blocks) -> float:
        lse = block_attention(q, k, k, blocks, scale=WIDTH**-0.5, causal=True)[1][:, :, rows]
        return ((lse - total).exp() - always).mean().item()

    best = (outside.topk(CFG.top_k).values.logsumexp(-1) - total).exp().mean().item()
    return mass(aux["blocks"]), mass(guessed(aux["blocks"], g)), best


def searched(rho: float, sharp: float) -> tuple[float, float]:
    """(mass of the search over that of the best keys, over that of random blocks)."""
    found, random, best = (
        mean(side) for side in zip(*(shares(rho, sharp, s) for s in range(SEEDS)), strict=True)
    )
    return found / best, found / random


def scored() -> int:
    """Keys that are scored for the last block of queries."""
    q, k, v = random_qkv(generator(), 1, LENGTH, WIDTH)
    counted, peak = [], tree.Keys.peak

    def counting(self: tree.Keys, q: Tensor, texts: Tensor, at: Tensor) -> Tensor:
        counted.append(at.shape[-1] * CFG.block_k)
        return peak(self, q, texts, at)

    with patch.object(tree.Keys, "peak", counting):
        page.METHOD.fast(q[:, :, -CFG.block_q :], k, v, CFG, Call())
    return sum(counted)


def from_full(n: int = 2_000) -> float:
    q, k, v = random_qkv(generator(), HEADS, n, WIDTH)
    out = page.METHOD.fast(q, k, v, page.Config(top_k=n, local=1, sinks=0), Call())[0]
    return difference(out, scaled_dot_product_attention(q, k, v, is_causal=True))


def exponent(rounds: int = 5) -> float:
    """From SHORT to LONG, of the seconds that the processor gave to it."""
    keep_freed_memory()
    short, long = (
        partial(page.METHOD.fast, *random_qkv(generator(), 8, n, WIDTH), CFG, Call()) for n in (SHORT, LONG)
    )
    ratio = paired_ratios(short, long, rounds, clock=time.process_time).median
    return math.log(ratio) / math.log(LONG / SHORT)


def measure() -> Measured:
    with threads(1), torch.no_grad():
        off, keys, grown = from_full(), scored(), exponent()
        of_best, of_random = searched(0.99, 4.0)
        others = {f"rho_{rho:g}_sharp_{sharp:g}": searched(rho, sharp)[0]
                  for rho, sharp in ((0.99, 2.0), (0.9, 4.0), (0.0, 4.0))}  # fmt: skip
    most = int(2 * CFG.top_k * math.log2(LENGTH / CFG.top_k)) + CFG.top_k
    parts = {
        "full attention": off < 1e-5,
        "nearly the best keys": of_best >= 0.9,
        "over random blocks": of_random >= 2,
        "few keys scored": keys <= most,
        "time": grown <= 1.25,
    }
    numbers = {
        "difference_top_k_of_n": off,
        "mass_over_best": of_best,
        "mass_over_random": of_random,
        "keys_scored": keys,
        "keys_allowed": most,
        "time_exponent_4k_32k": grown,
    }
    return Measured.by(parts, numbers | {f"mass_over_best_{name}": value for name, value in others.items()})


CLAIM = Claim(
    name="hip_attention",
    statement="with top_k >= N it is full attention; on smooth keys the search finds nearly the mass of the best keys "
    "while it scores few",
    bound="difference < 1e-5 with top_k = N; on AR(1) keys mass >= 0.9 of that of the best top_k and >= 2 times that "
    "of random blocks; keys scored <= 2k·log2(N/k) + k; time exponent 4k to 32k <= 1.25",
    measure=measure,
)
