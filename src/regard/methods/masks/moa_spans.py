"""MoA's spans: every head has a window of its own, as long as its task asks, beside a block of sinks.

    i sees j for head h  if  j ≤ i  and  (⌊i / block⌋ - ⌊j / block⌋ < ⌈S_h / block⌉  or  j < sinks)
    S_h = alpha_h + beta_h · length

Some heads read their neighbourhood at any length (beta = 0), some need the whole of it (beta = 1). One window for all
is too long for the former and too short for the latter; at the same mean, spans chosen by head lose less.

Two heads at length 8, blocks of one: alpha (1, 0), beta (0.25, 1): windows of 3 and of 8 tokens:

>>> build(Config(alpha=(1, 0), beta=(0.25, 1.0), length=8, sinks=0, block=1)).row(6)[0]
tensor([[ 4,  5,  6, -1, -1, -1, -1],
        [ 0,  1,  2,  3,  4,  5,  6]])
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.core.coordinates import Corner, by_block
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, causal, first, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    alpha: tuple[float, ...] = (1024.0,)  # tokens, a number for each query head, or one for all
    beta: tuple[float, ...] = (0.0,)  # share of the length, likewise
    length: int = 4096  # of the text that the spans are for
    sinks: int = 64  # tokens
    block: int = 64  # tokens of a block; spans are rounded up to whole blocks

    def __post_init__(self) -> None:
        require(
            self.block >= 1 and self.sinks >= 0 and self.length >= 1,
            "block, length >= 1, sinks >= 0",
            config=self,
        )
        require(
            len(self.alpha) == len(self.beta) >= 1, "alpha and beta have a number for each head", config=self
        )
        require(min(self.spans()) > 0, "every span alpha + beta · length > 0", spans=self.spans())

    def spans(self) -> tuple[float, ...]:
        """Tokens of each head's window."""
        return tuple(a + b * self.length for a, b in zip(self.alpha, self.beta, strict=True))

    def blocks(self) -> tuple[int, ...]:
        return tuple(math.ceil(span / self.block) for span in self.spans())


def within(at: Coordinates | Corner, blocks: tuple[int, ...], heads: int | None, block: int) -> Tensor:
    reach = torch.tensor(blocks, device=at.q.device)[at.h if heads else torch.zeros_like(at.h)]
    return at.q // block - at.k // block < reach


@predicate(tiles=by_block(within, "block"))
def span(at: Coordinates, blocks: tuple[int, ...], heads: int | None, block: int) -> Tensor:
    return within(at, blocks, heads, block)


def build(cfg: Config) -> Mask:
    count = len(cfg.alpha)
    return causal() & (span(cfg.blocks(), count if count > 1 else None, cfg.block) | first(cfg.sinks))


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("causal_self",),
    test_settings=(
        {"alpha": (3.0, 9.0), "beta": (0.0, 0.0), "sinks": 2, "block": 2},
        {"alpha": (2.0, 1.0, 5.0, 4.0), "beta": (0.0, 0.5, 0.0, 0.1), "length": 20, "sinks": 1, "block": 3},
    ),
    card=Card(
        title="MoA spans",
        paper="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2024)",
        year=2024,
        idea="every head has a window of its own length, which may grow with the text",
        cost="Σ_h S_h keys per query",
        state="S_h + sinks keys per head",
        lineage=("sinks",),
        neutral={"alpha": (float(2**40),), "beta": (0.0,)},
        caveat=(
            "spans differ by layer too: regard.attach(model, Converted(method, by_layer={...})). The length of the "
            "text is a setting, since a mask does not know how much will follow. What a head asks for is found by "
            "profiling: the claim does it with the paper's influence of masking"
        ),
    ),
)
