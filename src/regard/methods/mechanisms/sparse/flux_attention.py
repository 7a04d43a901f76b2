"""Flux Attention: a small router reads the ends of the prompt and says whether a layer attends to all or to a window.

    u    = mean over heads, and over the first and the last `pool` queries of the prompt, of q before rotary positions
    h    = SiLU(u W_1 + b_1) W_2 + b_2                      D -> 8D -> 2D
    p    = softmax(SiLU(SiLU(h W_3 + b_3) W_4 + b_4) W_5 + b_5)_1       2D -> 4D -> D -> 2
    o_i  = softmax attention of i over all keys                                      if p >= threshold
           softmax attention of i over the first `sinks` keys and the last `local`   otherwise, in whole blocks

One decision for all heads of a layer and each text of a batch. It is made once, on the first call of a text, and holds
for the parts and tokens after it: the state carries it. The model stays as it is; the router learns from the loss of
texts through z · full + (1 - z) · sparse, z rounded forward and straight through backward under Gumbel noise, beside a
price on the share of full layers (the "routes" of a conversion).

Worked by hand: a router of zeros with b_5 = (0, 0) has p = 1/2. At a threshold of 0.6 query 3 reads the first key and
its own, as A-shape with one sink and a window of one does; at 0.5 it reads all four.

>>> k, v = torch.zeros(1, 1, 4, 1), torch.tensor([2.0, 9.0, 9.0, 4.0]).view(1, 1, 4, 1)
>>> router = {n: torch.zeros_like(p) for n, p in init(Config(), {"key": 1}).items()}
>>> small, call = dict(sinks=1, local=1, block_q=1, block_k=1), Call(params=router, unrotated=(k, k))
>>> [reference(k, k, v, Config(threshold=t, **small), call)[0][0, 0, 3].item() for t in (0.6, 0.5)]
[3.0, 6.0]
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops.blocks import WHOLE, BlockSettings, Placed, both_ends, run_blocks, slow_attention

LAYERS = 5


@dataclass(frozen=True)
class Config(BlockSettings):
    threshold: float = 0.5  # of p, from which a layer reads all; 0: it always does
    sinks: int = 128  # tokens, rounded up to blocks
    local: int = 1024  # tokens up to the last query of a block, rounded up to blocks
    pool: int = (
        100  # queries at either end of the prompt that the router reads; those at both ends count twice
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold <= 1, "0 <= threshold <= 1", threshold=self.threshold)
        require(self.sinks >= 0 and self.pool >= 1, "sinks >= 0, pool >= 1", sinks=self.sinks, pool=self.pool)
        require(self.local >= self.block_q, "local >= block_q: a block of queries reads its own keys", local=self.local,
                block_q=self.block_q)  # fmt: skip


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """The last layer says "full" whatever it reads, with p = 0.989, until it learns."""
    d = dims["key"]
    sizes, params = (d, 8 * d, 2 * d, 4 * d, d, 2), {}
    for i, (a, b) in enumerate(pairwise(sizes), 1):
        params |= {f"w_{i}": (2 * torch.rand(a, b) - 1) * a**-0.5, f"b_{i}": torch.zeros(b)}
    return params | {"w_5": torch.zeros(d, 2), "b_5": torch.tensor([0.0, 4.5])}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    parts, old = [], call.initial_state
    for b in range(len(q)):
        mask = None if call.key_mask is None else call.key_mask[b % len(call.key_mask)][None]
        text = call.with_(
            key_mask=mask, unrotated=None, initial_state=old and tuple(x[b, None] for x in old[:2])
        )
        if old is None:
            real = range(q.shape[2]) if mask is None else mask[0, 0, -q.shape[2] :].nonzero()[:, 0].tolist()
            full = (
                probability(call.before_rotation[0][b].detach().double(), list(real), cfg, call.params)
                >= cfg.threshold
            )
        else:
            full = bool(old[2][b])
        out, state = slow_attention(partial(sees, full=full), q[b, None], k[b, None], v[b, None], cfg, text)
        parts.append((out, *state, torch.tensor([full])))
    out, *state = (torch.cat(x) for x in zip(*parts, strict=True))
    return out, tuple(state)


def probability(q: Tensor, real: list[int], cfg: Config, params: dict[str, Tensor]) -> float:
    """p of one text: q [H, N, D], the queries that are there."""
    ends = real[: cfg.pool] + real[-cfg.pool :]
    u = sum((q[h, i] for h in range(len(q)) for i in ends), q.new_zeros(q.shape[2])) / max(
        1, len(q) * len(ends)
    )
    for i in range(1, 6):
        u = u @ params[f"w_{i}"].detach().double() + params[f"b_{i}"].detach().double()
        u = u / (1 + (-u).exp()) if i in (1, 3, 4) else u
    return 1 / (1 + float((u[0] - u[1]).exp()))


def sees(q: Tensor, k: Tensor, start: int, cfg: Config, full: bool) -> Tensor:
    seen = torch.full((len(q), q.shape[1], k.shape[1]), full)
    for i in range(q.shape[1]):
        last = ((start + i) // cfg.block_q + 1) * cfg.block_q - 1
        for j in range(0, k.shape[1], cfg.block_k):
            if j < cfg.sinks or last - (j + cfg.block_k - 1) < cfg.local:
                seen[:, i, j : j + cfg.block_k] = True
    return seen


def router(q: Tensor, real: Tensor | None, cfg: Config, params: dict[str, Tensor]) -> Tensor:
    """[B, 2] of a prompt's unrotated queries [B, H, N, D], of which `real` [B, N] are there; gradients reach params."""
    real = q.new_ones(len(q), q.shape[2], dtype=torch.bool) if real is None else real
    nth, last = real.cumsum(1), real.sum(1, keepdim=True)
    weight = ((nth <= cfg.pool).float() + (nth > last - cfg.pool).float()) * real
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
    u = (q.masked_fill(~real[:, None, :, None], 0).float().mean(1) * weight[..., None]).sum(1)
    for i in range(1, LAYERS + 1):
        u = u @ params[f"w_{i}"].float() + params[f"b_{i}"].float()
        u = F.silu(u) if i in (1, 3, 4) else u
    return u


@torch.no_grad()
def decide(q: Tensor, real: Tensor | None, cfg: Config, params: dict[str, Tensor]) -> Tensor:
    """[B] bool: which texts read all, by the unrotated queries of their prompts."""
    return router(q, real, cfg, params).softmax(-1)[:, 1] >= cfg.threshold


def choose(at: Placed, cfg: Config, call: Call, full: Tensor) -> Tensor:
    return both_ends(at, cfg.sinks, cfg.local, cfg.block_q, cfg.block_k) | full[:, None, None, None]


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict]:
    old, mask = call.initial_state, call.key_mask
    if old is None:
        real = None if mask is None else mask[:, 0, -q.shape[2] :].expand(len(q), -1)
        full = decide(call.before_rotation[0], real, cfg, call.params)
    else:
        full = old[2]
    call = call.with_(unrotated=None, initial_state=None if old is None else old[:2])
    out, state, aux = run_blocks(partial(choose, full=full), q, k, v, cfg, call)
    return out, (*state, full), aux


def later(full: Tensor, place: Tensor, newest: Tensor, cfg: Config) -> Tensor:
    """[B, n] bool: which stored keys, at these places of the text, a single token at place `newest` [1|B, 1] reads."""
    block, last = place // cfg.block_k * cfg.block_k, (newest // cfg.block_q + 1) * cfg.block_q
    return (block < cfg.sinks) | (last - block - cfg.block_k < cfg.local) | full[:, None]


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    router=router,
    decide=decide,
    later=later,
    patterns=("causal_self",),
    unsupported={
        "self": "its window lies before a query",
        "cross": "its window lies before a query",
        "causal_cross": "its window lies before a query",
    },
    needs_unrotated=True,
    transfer="routes",
    together=lambda cfg: WHOLE,
    test_settings=(
        {"threshold": 1.0, "sinks": 2, "local": 5, "pool": 3, "block_q": 4, "block_k": 2},
        {"threshold": 0.5, "sinks": 0, "local": 9, "pool": 5, "block_q": 4, "block_k": 4},
    ),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Flux Attention",
        paper="Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference (2026)",
        year=2026,
        idea="each layer decides by the prompt whether it attends to everything or to sinks and a window",
        cost="36 D² products for a text to decide; N² products in layers that read all, N · (sinks + local) in others",
        state="every key and value so far, and the decision",
        needs=("qkv",),
        lineage=("a_shape",),
        neutral={"threshold": 0.0},
        caveat=(
            "learn the routers first: regard convert MODEL --mechanism flux_attention. The last queries of a prompt "
            "decide for all before them, so outputs depend on them, and a prompt in parts is decided by its first. The "
            "official code has windows of 1,024 or 2,048, pools 100 or 150 tokens of context and question, and other "
            "sparse modes (a triangle, top-k, XAttention)"
        ),
    ),
)
