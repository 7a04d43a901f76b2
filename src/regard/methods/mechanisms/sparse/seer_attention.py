"""SeerAttention: a gate, learned from the model's own attention, says which blocks of it hold weight.

    x_I  = R_I W_q mean(q in I)                          W_q [D, G] of each head
    y_J  = R_J W_k [max(k in J), min(k in J), mean(k in J)]      W_k [3D, G] of each KV head
    P_IJ = softmax_J(x_I · y_J / √G)                     over the blocks J that I may see
    o_i  = softmax attention of i over the keys of the blocks with P_IJ >= threshold, and of its own block

q and k are taken before rotary positions turned them; R turns the gate's vectors to the first place of their block. The
choice is hard: no gradient reaches the gate through the output. It learns from the model, which stays as it is: P is to
be the largest attention weight of each block of the map, rows made to sum to one (the "blocks" of a conversion).

Worked by hand: blocks of one token, D = G = 1, W_q = 1 and W_k takes the mean. One channel is no pair: nothing turns.
Query 2 with q = 1 over keys log 4, 0, 0 has P = 4/6, 1/6, 1/6. At a threshold of 1/2 it reads key 0 and its own.

>>> import math, torch
>>> q, k = torch.ones(1, 1, 3, 1), torch.tensor([math.log(4), 0.0, 0.0]).view(1, 1, 3, 1)
>>> v = torch.tensor([1.0, 7.0, 0.0]).view(1, 1, 3, 1)
>>> gate = {"w_q": torch.ones(1, 1, 1), "w_k": torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1)}
>>> cfg = Config(block_q=1, block_k=1, width=1, threshold=0.5)
>>> round(reference(q, k, v, cfg, Call(params=gate, unrotated=(q, k)))[0][0, 0, 2].item(), 6)
0.8
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops.blocks import (
    BlockSettings,
    Placed,
    block_max,
    block_mean,
    block_min,
    causal_softmax,
    diagonal,
    slow_attention,
    top_blocks,
)  # fmt: skip
from regard.ops.rotary import rotate
from regard.ops.softmax import per_query_head


@dataclass(frozen=True)
class Config(BlockSettings):
    threshold: float = 2e-3  # of P, which a block needs to be read; 0 reads all
    top_k: int | None = None  # at most so many blocks, those of the largest P, beside its own; None: no bound
    width: int = 128  # G, of the gate's vectors
    rope_theta: float = 1e4  # base of the gate's rotary positions; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold <= 1, "0 <= threshold <= 1", threshold=self.threshold)
        require(self.top_k is None or self.top_k >= 1, "top_k >= 1 block, or None", top_k=self.top_k)
        require(self.width >= 1, "width >= 1", width=self.width)
        require(
            self.rope_theta == 0 or self.rope_theta > 1, "rope_theta > 1, or 0", rope_theta=self.rope_theta
        )


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """Means as they are, the largest and the smallest at a third, so that an untrained gate is that of block top-k."""
    width, eye = dims["key"], torch.zeros(dims["key"], cfg.width)
    eye[range(min(eye.shape)), range(min(eye.shape))] = (cfg.width / width) ** 0.25
    noise = torch.randn(dims["kv_heads"], 3 * width, cfg.width) * 0.02
    return {"w_q": eye.repeat(dims["heads"], 1, 1), "w_k": torch.cat([eye / 3, eye / 3, eye]) + noise}


def sees(q: Tensor, k: Tensor, start: int, cfg: Config, params: dict[str, Tensor]) -> Tensor:
    """[H, N, M] bool, block by block."""
    (heads, n, _), m = q.shape, k.shape[1]
    seen, place = torch.zeros(heads, n, m, dtype=torch.bool), torch.arange(n) + start
    w_q, w_k = params["w_q"].detach().double(), params["w_k"].detach().double()
    for h in range(heads):
        keys = []
        for a in range(0, m, cfg.block_k):
            own = k[h, a : a + cfg.block_k].double()
            pooled = torch.cat([own.max(0).values, own.min(0).values, own.sum(0) / len(own)])
            keys.append(turned(pooled @ w_k[h * len(w_k) // heads], a, cfg))
        for block in sorted(set((place // cfg.block_q).tolist())):
            rows = place // cfg.block_q == block
            ask = turned(q[h, rows].double().sum(0) / int(rows.sum()) @ w_q[h], block * cfg.block_q, cfg)
            last = (block + 1) * cfg.block_q - 1
            fits = torch.stack([ask @ y / cfg.width**0.5 for y in keys[: last // cfg.block_k + 1]])
            share = (fits - fits.max()).exp() / (fits - fits.max()).exp().sum()
            best = sorted(range(len(fits)), key=lambda j: -float(fits[j]))[: cfg.top_k]
            for j in range(len(fits)):
                if (float(share[j]) >= cfg.threshold and j in best) or j * cfg.block_k >= block * cfg.block_q:
                    seen[h, rows, j * cfg.block_k : (j + 1) * cfg.block_k] = True
    return seen


def turned(x: Tensor, place: int, cfg: Config) -> Tensor:
    """[G] with channels c and c + G/2, a complex number, turned by place / theta^(2c/G)."""
    half = len(x) // 2
    if cfg.rope_theta == 0 or half == 0:
        return x
    angle = [place / cfg.rope_theta ** (c / half) for c in range(half)]
    unit = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angle], dtype=torch.complex128)
    pairs = torch.complex(x[:half], x[half : 2 * half]) * unit
    return torch.cat([pairs.real, pairs.imag, x[2 * half :]])


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    return slow_attention(partial(sees, params=call.params), q, k, v, cfg, call)


def gate(at: Placed, cfg: Config, call: Call) -> Tensor:
    """[B, H, I, J] x_I · y_J / √G, -inf where a block may not be read."""
    q, k = at.unrotated
    x = block_mean(q, cfg.block_q, at.q_there)
    pools = [pool(k, cfg.block_k, at.k_there) for pool in (block_max, block_min, block_mean)]
    # a block without tokens has no largest; it is not allowed either
    y = torch.cat(pools, -1).nan_to_num(posinf=0.0, neginf=0.0)
    x, y = x @ call.params["w_q"].to(x.dtype), y @ call.params["w_k"].to(y.dtype)
    if cfg.rope_theta:
        first = torch.arange(y.shape[2], device=y.device)[None] * cfg.block_k
        x, y = rotate(x, at.first(cfg.block_q)[:, 0, :, 0], cfg.rope_theta), rotate(y, first, cfg.rope_theta)
    logits = x @ per_query_head(y, x.shape[1]).mT * cfg.width**-0.5
    return logits.masked_fill(~at.allowed(cfg.block_q, cfg.block_k), -torch.inf)


def choose(at: Placed, cfg: Config, call: Call) -> Tensor:
    allowed = at.allowed(cfg.block_q, cfg.block_k)
    own, logits = diagonal(allowed, at.first(cfg.block_q), cfg.block_q, cfg.block_k), gate(at, cfg, call)
    found = (causal_softmax(logits, allowed) >= cfg.threshold) & allowed
    return (found if cfg.top_k is None else found & top_blocks(logits, allowed, cfg.top_k)) | own


METHOD = Mechanism(
    config=Config,
    reference=reference,
    choose=choose,
    gate=gate,
    init=init,
    patterns=("causal_self",),
    unsupported={
        "self": "its own block is that of a causal text",
        "cross": "its own block is that of a causal text",
        "causal_cross": "queries choose together, so earlier ones would depend on later ones",
    },
    needs_unrotated=True,
    transfer="blocks",
    test_settings=(
        {"threshold": 0.2, "width": 6, "block_q": 4, "block_k": 4},
        {"top_k": 2, "threshold": 0.0, "width": 3, "block_q": 8, "block_k": 2, "rope_theta": 10.0},
    ),
    knob=(
        "threshold",
        (0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 7e-3, 5e-3, 3e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 1e-5, 1e-7, 0.0),
    ),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (2 * dims["key"] + dims["value"]),
    card=Card(
        title="SeerAttention",
        paper="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (2024)",
        year=2024,
        idea="a small gate learns from the model's own attention map which blocks hold its weight",
        cost="N² / block² products to choose, then what is read",
        state="every key and value so far, keys before and after rotation",
        needs=("qkv",),
        lineage=("block_topk", "xattention"),
        neutral={"threshold": 0.0, "top_k": None},
        caveat=(
            "learn the gate first: regard convert MODEL --mechanism seer_attention. The queries of a block choose "
            "together. The official code has no W_q where the gate is as wide as a head, reads blocks above the "
            "threshold (here: from it on, so that 0 reads all), leaves the last two blocks of queries dense "
            "(dense_last=128), and has a share of blocks in the place of top_k, which depends on the length of the text"
        ),
    ),
)
