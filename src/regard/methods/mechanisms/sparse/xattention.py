"""XAttention: the sums along antidiagonals of small squares say which blocks of scores are worth computing.

    s_rc  = Σ_t q_{rS + S-1-t} · k_{cS + t} / (S √D)          one number for each S x S square of scores
    p_rc  = softmax over the squares c ≤ r
    m_IJ  = Σ p_rc over the squares of block (I, J)
    I reads the first block, its own, and the largest m_IJ until they hold `threshold` of Σ_J m_IJ

An antidiagonal crosses every vertical and every slash line of its square, so neither pattern is missed; S tokens beside
each other are one row of S·D channels, and the estimate costs 1/S of the scores.

Worked by hand: S = 2, D = 1, queries (1, 2) and keys (3, 5): s = (2·3 + 1·5) / 2 = 5.5.

>>> import torch
>>> q, k = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
>>> strided(q.view(1, 1, 2, 1), 2, flip=True) @ strided(k.view(1, 1, 2, 1), 2).mT / 2
tensor([[[[5.5000]]]])

Two tokens are too few to leave any out: scores 0 and log 3, values 0 and 4, the output 3.

>>> import math
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.0, 1.0], [0.0, math.log(3)], [0.0, 4.0]))
>>> round(reference(q, k, v, Config(), Call())[0][0, 0, 1].item(), 6)
3.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops.blocks import BlockSettings, Placed, diagonal, hidden, in_blocks, slow_attention, top_mass
from regard.ops.softmax import scores

ROWS = 2048  # queries estimated at a time; bounds the memory, never changes the result


@dataclass(frozen=True)
class Config(BlockSettings):
    threshold: float = 0.9  # share of the estimated mass that is read; 1 reads all
    stride: int = 8  # S, tokens each way of a square of scores; larger: a cheaper and coarser estimate
    block_q: int = 128
    block_k: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold <= 1, "0 <= threshold <= 1", threshold=self.threshold)
        divides = self.stride >= 1 and self.block_k % self.stride == 0
        require(divides, "stride divides block_k", stride=self.stride, block_k=self.block_k)


def sees(q: Tensor, k: Tensor, start: int, cfg: Config) -> Tensor:
    """[H, N, M] bool, square by square."""
    (heads, n, width), m, s = q.shape, k.shape[1], cfg.stride
    seen, place = torch.zeros(heads, n, m, dtype=torch.bool), torch.arange(n) + start
    for h in range(heads):
        for block in sorted(set((place // cfg.block_q).tolist())):
            last, mass = (block + 1) * cfg.block_q - 1, torch.zeros(-(-m // cfg.block_k), dtype=q.dtype)
            for r in range(block * cfg.block_q // s, (last + 1) // s):
                rows = [r * s + s - 1 - t - start for t in range(s)]
                if not any(0 <= row < n for row in rows):
                    continue
                sums = []
                for c in range(min(r, (m - 1) // s) + 1):
                    pairs = [(row, c * s + t) for t, row in enumerate(rows) if 0 <= row < n and c * s + t < m]
                    sums.append(sum((q[h, i] @ k[h, j] for i, j in pairs), q.new_zeros(())))
                weights = (torch.stack(sums) / (s * width**0.5)).softmax(0)
                for c, weight in enumerate(weights):
                    mass[c * s // cfg.block_k] += weight
            own = [j for j in range(len(mass)) if block * cfg.block_q <= j * cfg.block_k <= last]
            taken = sorted({0, *own})
            for j in sorted(set(range(len(mass))) - set(taken), key=lambda j: -float(mass[j])):
                held = mass[taken].sum()
                if j * cfg.block_k <= last and (cfg.threshold >= 1 or held < cfg.threshold * mass.sum()):
                    taken.append(j)
            for j in taken:
                seen[h, place // cfg.block_q == block, j * cfg.block_k : (j + 1) * cfg.block_k] = True
    return seen


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(sees, q, k, v, cfg, call)


def strided(x: Tensor, stride: int, flip: bool = False) -> Tensor:
    """[B, H, n / stride, stride·D] of [B, H, n, D]: tokens beside each other in one row, the last first with flip."""
    squares = in_blocks(x, stride)
    return (squares.flip(3) if flip else squares).flatten(3)


def estimate(at: Placed, cfg: Config) -> Tensor:
    """[B, H, I, J] mass of the squares of each block, some rows of queries at a time."""
    s, per = cfg.stride, cfg.block_k // cfg.stride
    q = strided(hidden(at.q, at.q_there, 0.0), s, flip=True)
    k = strided(hidden(at.k, at.k_there, 0.0), s)
    there = torch.ones(q.shape[2], dtype=torch.bool, device=q.device)[None]
    there = there if at.q_there is None else in_blocks(at.q_there[:, None], s)[:, 0].any(-1)
    columns, step, parts = (
        at.columns(cfg.block_k),
        max(cfg.block_q, ROWS // cfg.block_q * cfg.block_q) // s,
        [],
    )
    for row in range(0, q.shape[2], step):
        rows = q[:, :, row : row + step]
        place = at.start[:, None] // s + row + torch.arange(rows.shape[2], device=q.device)
        square = torch.arange(k.shape[2], device=q.device)
        seen = (square <= place[..., None]) & (square * s < at.length[:, None, None])  # [B, rows, squares]
        weights = (
            scores(rows, k, at.q.shape[-1] ** -0.5 / s).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        )
        weights = weights.nan_to_num(0.0) * there[:, None, row : row + step, None]
        weights = torch.nn.functional.pad(weights, (0, columns * per - weights.shape[-1]))
        parts.append(in_blocks(weights.unflatten(-1, (columns, per)).sum(-1), cfg.block_q // s).sum(3))
    return torch.cat(parts, dim=2)


def choose(at: Placed, cfg: Config, call: Call) -> Tensor:
    allowed = at.allowed(cfg.block_q, cfg.block_k)
    first = torch.arange(allowed.shape[-1], device=allowed.device) == 0
    kept = (diagonal(allowed, at.first(cfg.block_q), cfg.block_q, cfg.block_k) | first) & allowed
    return top_mass(estimate(at, cfg), allowed, cfg.threshold, first=kept)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    choose=choose,
    patterns=("causal_self",),
    unsupported={
        "self": "its squares end at a query",
        "cross": "its squares end at a query",
        "causal_cross": "queries choose together, so earlier ones would depend on later ones",
    },
    test_settings=(
        {"threshold": 0.5, "stride": 2, "block_q": 4, "block_k": 4},
        {"threshold": 0.7, "stride": 2, "block_q": 8, "block_k": 2},
    ),
    knob=("threshold", (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="XAttention",
        paper="XAttention: Block Sparse Attention with Antidiagonal Scoring (2025)",
        year=2025,
        idea="antidiagonal sums cross every vertical and slash line, so a sixteenth of the scores finds the blocks",
        cost="N² / stride products to choose, then what is read",
        state="every key and value so far",
        needs=("qkv",),
        lineage=("block_topk",),
        neutral={"threshold": 1.0},
        caveat=(
            "the queries of a block choose together. The official code has one threshold for each head, found by "
            "search (regard.calibrate finds one for each layer), cuts the text into chunks that it pads with zero "
            "keys, and takes one row of a batch. Squares on the diagonal hold later keys of the block's own "
            "squares"
        ),
    ),
)
