"""Landmark attention: one landmark token after each block of the text, through which later queries reach the block.

    tokens 0 .. b - 1 of a section of b + 1 tokens are its block, token b is its landmark; i is in section S
    r_i  = softmax over the tokens of section S up to i, and the landmarks of sections j < S
    p_ij = softmax over the tokens of block j alone                                         scores q·k / √D
    w_it = r_it                                for a token t of section S
    w_it = r_i,landmark(j) · p_ij(t)           for a token t of block j < S
    o_i  = Σ_t w_it v_t

A landmark has no value of its own: its weight is shared out among the tokens of its block, so weights sum to one. The
landmark of the query's own section is hidden, also from itself. With top_k a query reads, of the earlier sections, only
the k with the largest landmark scores, and the others leave its softmax: with k = all nothing changes. Sections are
counted in tokens that are there; a hidden token gives zero.

Worked by hand: one block of two tokens, its landmark, then a query that is also the last token, all with scores of 0:
the landmark and the query's own token share, 1/2 each, and the block's tokens have half of the landmark's: 1/4, 1/4.
With values 4, 8, 100 and 2 that is 1 + 2 + 0 + 1.

>>> import torch
>>> zero, v = torch.zeros(1, 1, 4, 1), torch.tensor([4.0, 8.0, 100.0, 2.0]).view(1, 1, 4, 1)
>>> reference(zero, zero, v, Config(block=2), Call())[0][0, 0, 3].item()
4.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, carried, exact, gather_rows, heads_of, mix, scores
from regard.ops.blocks import in_blocks
from regard.ops.closed import chunks, closed, highest, recomputed

BLOCK = 1 << 20  # numbers of one step: bounds the memory, never changes the result
# a key that is fetched costs about as much as this many that are multiplied where they lie
FETCH = 4
HIDDEN = -1e30
REFUSED = "a query reads its own section token by token, and the sections before it through their landmarks"


@dataclass(frozen=True)
class Config:
    block: int = 50  # tokens between two landmarks
    top_k: int | None = None  # sections that a query reads beside its own; None: all of them

    def __post_init__(self) -> None:
        require(self.block >= 1, "block >= 1", block=self.block)
        require(self.top_k is None or self.top_k >= 1, "top_k >= 1, or None", top_k=self.top_k)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    heads, n, m = q.shape[1], q.shape[2], k.shape[2]
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    there = torch.ones_like(k_h[..., 0], dtype=torch.bool)
    there = there if call.key_mask is None else there & call.key_mask
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device)
    for b in range(len(q)):
        for h in range(heads):
            tokens = there[b, h].nonzero()[:, 0]
            place = (tokens >= m - n).nonzero()[:, 0]
            asking = tokens[place] - (m - n)
            if len(asking):
                weights = one_head(q_h[b, h, asking], k_h[b, h, tokens], place, cfg)
                out[b, h, asking] = weights @ v_h[b, h, tokens]
    return out.to(v.dtype), state


def one_head(q: Tensor, k: Tensor, place: Tensor, cfg: Config) -> Tensor:
    """Weights [n, T] of queries at these places among T tokens."""
    s = q @ k.T * q.shape[-1] ** -0.5
    t, place, size = torch.arange(len(k), device=k.device), place[:, None], cfg.block + 1
    section, landmark = t // size, t % size == cfg.block
    own = (section == place // size) & ~landmark & (t <= place)
    gates = landmark & (section < place // size)
    if cfg.top_k is not None:
        for i, row in enumerate(gates):
            by_score = sorted(row.nonzero()[:, 0].tolist(), key=lambda j: (-s[i, j].item(), j))
            gates[i, by_score[cfg.top_k :]] = False
    r = s.masked_fill(~(own | gates), -torch.inf).softmax(-1)
    columns = []
    for j in range(int(section[-1]) + 1):
        inside = (section == j).nonzero()[:, 0]
        share = torch.zeros_like(s[:, inside])
        if len(inside) == size:
            p = s[:, inside[:-1]].softmax(-1)
            share = torch.cat([p, torch.zeros_like(p[:, :1])], dim=1) * (r * gates)[:, inside[-1:]]
        columns.append((r * own)[:, inside] + share)
    return torch.cat(columns, dim=1)


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    k, v, state = carried(k, v, call)
    n, m = q.shape[2], k.shape[2]
    text, size = closed(call, n, m), min(cfg.block + 1, m)
    q_c, k_s, v_s = text.queries(q), *(in_blocks(text.keys(t), size) for t in (k, v))
    read = ((cfg.top_k or 0) + 1) * size
    few = cfg.top_k is not None and FETCH * read < m
    per_row = q.shape[0] * q.shape[1] * (read * k.shape[3] if few else m)
    outs = []
    for rows in chunks(n, BLOCK // per_row):
        sections = k_s.shape[2]
        if isinstance(text.first, int):
            sections = (text.first + rows.stop - 1) // size + 1
        parts = q_c[:, :, rows], k_s[:, :, :sections], v_s[:, :, :sections], text.places(rows, q)
        outs.append(recomputed(n * per_row, fetched if few else all_read, *parts, cfg))
    return text.opened(torch.cat(outs, dim=2)).to(v.dtype), state


def all_read(q: Tensor, k_s: Tensor, v_s: Tensor, place: Tensor, cfg: Config) -> Tensor:
    """[B, H, n, E] of queries over sections [B, G, J, b + 1, ...], each of which all of them multiply."""
    size, sections = k_s.shape[3], torch.arange(k_s.shape[2], device=q.device)
    s = scores(q, k_s.flatten(2, 3), q.shape[3] ** -0.5).unflatten(3, (-1, size))  # [B, H, n, J, b + 1]
    read = None
    if cfg.top_k is not None:
        best = highest(gate_scores(q, k_s, place, cfg), cfg.top_k)
        read = (best[..., None] == sections).any(-2)  # [B, H, n, J]
    return mix(grouped(s, sections, place, read, cfg).flatten(3), v_s.flatten(2, 3))


def fetched(q: Tensor, k_s: Tensor, v_s: Tensor, place: Tensor, cfg: Config) -> Tensor:
    """The same, where each query fetches the sections that it reads."""
    size = k_s.shape[3]
    best = highest(gate_scores(q, k_s, place, cfg), cfg.top_k)
    own = (place // (cfg.block + 1)).expand(*best.shape[:3], 1)
    sections = torch.cat([best, own], dim=-1)  # [B, H, n, k + 1]
    k_f, v_f = (
        at_least_float32(gather_rows(t.flatten(3), sections.flatten(2))).unflatten(2, sections.shape[2:])
        for t in (k_s, v_s)
    )
    k_f, v_f = (t.unflatten(4, (size, -1)) for t in (k_f, v_f))  # [B, H, n, k + 1, b + 1, ...]
    s = torch.einsum("bhnd,bhnjtd->bhnjt", at_least_float32(q) * q.shape[3] ** -0.5, k_f)
    return torch.einsum("bhnjt,bhnjte->bhne", grouped(s, sections, place, sections >= 0, cfg), v_f)


def gate_scores(q: Tensor, k_s: Tensor, place: Tensor, cfg: Config) -> Tensor:
    """[B, H, n, J] scores of the landmarks, -inf from the query's own section on. In float32: they choose."""
    s = scores(at_least_float32(q.detach()), at_least_float32(k_s[:, :, :, -1].detach()), q.shape[3] ** -0.5)
    earlier = torch.arange(k_s.shape[2], device=q.device) < place // (cfg.block + 1)
    return s.masked_fill(~earlier, -torch.inf)


def grouped(s: Tensor, section: Tensor, place: Tensor, read: Tensor | None, cfg: Config) -> Tensor:
    """Weights of scores s [B, H, n, J, b + 1] of sections [J] or [B, H, n, J]; `read`: which of those before."""
    own, t = place // (cfg.block + 1), torch.arange(s.shape[4], device=s.device)
    # [.., n, J, b + 1]
    seen = (t < cfg.block) & (section[..., None] * (cfg.block + 1) + t <= place[..., None])
    s, landmark = s.masked_fill(~seen, HIDDEN), s[..., -1]
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top).exp()
    total = e.sum(-1)  # [B, H, n, J]
    earlier = section < own if read is None else (section < own) & read
    gate = torch.where(section == own, total.log() + top[..., 0], landmark.masked_fill(~earlier, HIDDEN))
    return e * (gate.softmax(-1) / total)[..., None]


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("causal_self",),
    unsupported=dict.fromkeys(("self", "cross", "causal_cross"), REFUSED),
    test_settings=({"block": 3}, {"block": 3, "top_k": 1}, {"block": 5, "top_k": 2}),
    state_size=lambda cfg, dims, n: dims["kv_heads"] * n * (dims["key"] + dims["value"]),
    card=Card(
        title="Landmark Attention",
        paper="Landmark Attention: Random-Access Infinite Context Length for Transformers, arXiv:2305.16300",
        year=2023,
        idea="a landmark after each block answers for it: its weight is shared out inside the block, or fetches it",
        cost="O(N·M·(D + E)) time with all sections, O(N·(M/b + k·b)·(D + E)) with top_k; no N × M weights are held",
        state="every key and value so far: (D + E)·n numbers per KV head",
        needs=("qkv", "decoder-lm"),
        lineage=("softmax",),
        neutral={"block": 2**30, "top_k": None},
        caveat=(
            "landmarks are tokens of the text: every (block + 1)-th one, which whoever prepares it puts in. In the "
            "released code retrieved sections get clamped positions, by the order in which they come, so keys are "
            "stored before they are rotated; keys come here as they are, with true positions. Its choice is by head "
            "and query as here, or one for all queries of a call where the cache lies on another device"
        ),
    ),
)
