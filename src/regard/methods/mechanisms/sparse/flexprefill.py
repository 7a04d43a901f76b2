"""FlexPrefill: each head decides how it is to be read, by its last block of queries, and as much as holds `gamma`.

    p_J = softmax_J of mean(q in the last block) · mean(k in J) / √D      what pooling says of the last block
    t_J = attention of the last block's queries, summed over the keys of J, their mean      what is true of it
    d   = √JSD(p, t)
    d < tau    query-aware: softmax of mean(q in I)·mean(k in J) / √D over all (I, J); the largest until they hold
               gamma of the whole
    d ≥ tau    vertical-slash: the fewest key blocks, and the fewest distances, that hold gamma of the last block's
               attention; every I reads these blocks, and the blocks at these distances

A pattern is estimated where the question stands, and pooling is trusted only in heads where it foretells the truth.

Worked by hand: p = (1, 0), t = (0, 1): the divergence is log 2, its root 0.8326, so no tau below it trusts pooling.

>>> import torch
>>> root_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
tensor(0.8326)

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
from regard.ops.blocks import (
    WHOLE,
    BlockSettings,
    Placed,
    block_mean,
    causal_softmax,
    in_blocks,
    last_mean,
    last_weights,
    root_divergence,
    slashes,
    slow_attention,
    top_mass,
    verticals,
)
from regard.ops.softmax import per_query_head


@dataclass(frozen=True)
class Config(BlockSettings):
    gamma: float = 0.9  # share of the attention that is to be held
    tau: float = 0.1  # divergence below which a head is read by its pooled scores; 0: none is
    min_budget: int = 1024  # tokens: at least so many verticals, and so many distances, in whole blocks
    block_q: int = 128
    block_k: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.gamma <= 1, "0 < gamma <= 1", gamma=self.gamma)
        require(min(self.tau, self.min_budget) >= 0, "tau, min_budget >= 0", config=self)
        same = self.block_q == self.block_k
        require(
            same,
            "block_q = block_k: distances are counted in blocks",
            block_q=self.block_q,
            block_k=self.block_k,
        )


def fewest(mass: Tensor, share: float, least: int) -> set[int]:
    """The indices of the largest of mass [n] until they hold a share of its sum, at least so many."""
    order = sorted(range(len(mass)), key=lambda i: -float(mass[i]))
    taken: set[int] = set()
    for i in order:
        held = sum(float(mass[j]) for j in taken)
        if share >= 1 or len(taken) < least or held < share * float(mass.sum()):
            taken.add(i)
    return taken


def sees(q: Tensor, k: Tensor, start: int, cfg: Config) -> Tensor:
    """[H, N, M] bool, head by head."""
    (heads, n, width), m, b = q.shape, k.shape[1], cfg.block_k
    seen, place = torch.zeros(heads, n, m, dtype=torch.bool), torch.arange(n) + start
    least, columns = -(-cfg.min_budget // b), -(-m // b)
    for h in range(heads):
        rows = range(max(0, n - b), n)
        key, distance = torch.zeros(columns, dtype=q.dtype), torch.zeros(columns, dtype=q.dtype)
        for i in rows:
            weights = (q[h, i] @ k[h, : start + i + 1].T / width**0.5).softmax(0)
            for j, w in enumerate(weights):
                key[j // b] += w / len(rows)
                distance[(start + i - j) // b] += w / len(rows)
        means = torch.stack([k[h, j * b : (j + 1) * b].mean(0) for j in range(columns)])
        pooled = (q[h, rows.start :].mean(0) @ means.T / width**0.5).softmax(0)
        jsd = sum(0.5 * (p * (2 * p / (pooled + key)).log()).nan_to_num(0.0).sum() for p in (pooled, key))
        if float(jsd.clamp(min=0).sqrt()) < cfg.tau:
            pairs = query_aware(q[h], means, place, cfg)
        else:
            lines, steps = fewest(key, cfg.gamma, least), fewest(distance, cfg.gamma, least) | {0}
            back = steps | {step + 1 for step in steps}
            pairs = {(i, j) for i in range(columns) for j in range(i + 1) if j in lines or i - j in back}
        for row, j in {*pairs, *((i, j) for i in range(columns) for j in (0, i))}:
            seen[h, place // b == row, j * b : (j + 1) * b] = True
    return seen


def query_aware(q: Tensor, means: Tensor, place: Tensor, cfg: Config) -> set[tuple[int, int]]:
    """(I, J) of one head: the largest shares of all rows' softmax together until they hold gamma of the whole."""
    shares = {}
    for i in sorted(set((place // cfg.block_q).tolist())):
        mean = q[place // cfg.block_q == i].mean(0)
        row = (means[: i + 1] @ mean / q.shape[-1] ** 0.5).softmax(0)
        shares |= {(i, j): float(w) for j, w in enumerate(row)}
    at = list(shares)
    return {at[i] for i in fewest(torch.tensor(list(shares.values()), dtype=q.dtype), cfg.gamma, 0)}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(sees, q, k, v, cfg, call)


def choose(at: Placed, cfg: Config, call: Call) -> Tensor:
    b, allowed = cfg.block_k, at.allowed(cfg.block_q, cfg.block_k)
    weights, place = last_weights(at, b)
    rows = (place >= 0).sum(-1)[:, None, None].clamp(min=1)
    mass = [
        in_blocks(x, b).sum(3) / rows for x in (verticals(weights), slashes(weights, place))
    ]  # [B, H, J] each
    column = torch.arange(allowed.shape[-1], device=allowed.device)
    there = (column * b < at.length[:, None])[:, None]
    means = per_query_head(block_mean(at.k, b, at.k_there), at.q.shape[1])
    pooled = causal_softmax(last_mean(at, b) @ means.mT, there[:, :, None])[:, :, 0]
    aware = (root_divergence(pooled, mass[0]) < cfg.tau)[..., None, None]
    least = -(-cfg.min_budget // b)
    lines, steps = (top_mass(x, there, cfg.gamma, least=least) for x in mass)
    own = at.first(cfg.block_q) // b
    found = torch.where(
        aware, by_pooling(at, means, allowed, cfg), by_lines(lines, steps | (column == 0), own - column)
    )
    return (found | (column == 0) | (column == own)) & allowed


def by_lines(lines: Tensor, steps: Tensor, apart: Tensor) -> Tensor:
    """[B, H, I, J]: blocks on lines [B, H, J], and those that slashes at `steps` cross; apart = I - J."""
    steps = steps | torch.nn.functional.pad(steps, (1, 0))[..., :-1]  # a distance lies in two blocks
    near = apart.clamp(0, steps.shape[-1] - 1).expand(-1, steps.shape[1], -1, -1)
    return steps[:, :, None].expand_as(near).gather(-1, near) & (apart >= 0) | lines[:, :, None]


def by_pooling(at: Placed, means: Tensor, allowed: Tensor, cfg: Config) -> Tensor:
    """[B, H, I, J]: the largest shares of the pooled attention of all blocks of queries together."""
    q = block_mean(at.q, cfg.block_q, at.q_there) * at.q.shape[-1] ** -0.5
    there = None if at.q_there is None else in_blocks(at.q_there[:, None], cfg.block_q).any(-1)[..., None]
    rows = allowed if there is None else allowed & there
    share = causal_softmax(q @ means.mT, rows)
    return top_mass(share.flatten(2), rows.expand_as(share).flatten(2), cfg.gamma).view_as(share)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    choose=choose,
    patterns=("causal_self",),
    unsupported={
        **dict.fromkeys(("self", "cross"), "its distances are those of a causal text"),
        "causal_cross": "the last queries choose for all",
    },
    together=lambda cfg: WHOLE,
    test_settings=(
        {"gamma": 0.6, "tau": 0.0, "min_budget": 0, "block_q": 4, "block_k": 4},
        {"gamma": 0.5, "tau": 0.3, "min_budget": 4, "block_q": 4, "block_k": 4},
        {"gamma": 0.5, "tau": 2.0, "min_budget": 0, "block_q": 4, "block_k": 4},
    ),
    knob=("gamma", (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="FlexPrefill",
        paper="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference (2025)",
        year=2025,
        idea="each head is read by pooled scores or by lines, as its last block shows, and as much as holds a share",
        cost="N · block products to choose, N² / block² more in heads read by pooling, then what is read",
        state="every key and value so far",
        needs=("qkv",),
        lineage=("vertical_slash", "block_topk"),
        neutral={"gamma": 1.0},
        caveat=(
            "the last queries of a call choose for all before them, so outputs depend on them, and a prompt in "
            "parts is not the whole. Lines are counted in blocks; the official code counts tokens and divides by "
            "128, and reads one of the two blocks that a slash line crosses"
        ),
    ),
)
