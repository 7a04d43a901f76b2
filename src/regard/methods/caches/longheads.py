"""LongHeads: every head reads k chunks of its own choice, at contiguous positions inside the trained length.

    s̄_c = mean_i softmax(q_i K_cᵀ) V_c      of chunk c alone, rotated from its start, not causal
    key_c = softmax(s̄_c K_cᵀ) K_c
    query i of chunk t reads chunks 0, t-1, t and the k-3 best by q_i · key_c    by head; q_i before rotation
    the chunk of rank r stands at positions r·w … r·w + w-1, the query at (k-1)·w + i mod w

where no distance leaves the trained length k·w, so a model reads texts longer than it was trained on, and up to
k·w nothing changes at all. Rotary scores see differences only: instead of moving keys, the query is turned back
by (t - k + 1) - (c - r) chunks for each of its k ranks. Llama-2-7B (4k) finds passkeys at 128k (figure 4).

>>> [split(budget, Config()) for budget in (None, 1024, 128, 12)]  # (w, k)
[(256, 16), (64, 16), (16, 8), (3, 4)]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import CachePage, Card, Unsupported, require
from regard.ops import (
    View,
    at_least_float32,
    best,
    gather_rows,
    lower_right,
    masked_softmax,
    mix,
    parse_budget,
    row_blocks,
    slots_of,
)
from regard.ops import attend as plain


@dataclass(frozen=True)
class Config:
    chunk: int = 256
    chunks: int = 16  # that a query reads: the first, the last two, the best of the rest
    budget: int | float | str | None = None  # tokens that a query reads; None: chunks · chunk
    trained: int | None = None  # queries before this place read everything; None: the budget

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)
        require(self.chunks >= 3, "chunks >= 3 (the first and the last two)", chunks=self.chunks)


def split(budget: int | None, cfg: Config) -> tuple[int, int]:
    """(tokens of a chunk, chunks that a query reads). A small budget shrinks chunks: to 16, where four fit."""
    if budget is None:
        return cfg.chunk, cfg.chunks
    chunk = max(1, min(cfg.chunk, budget // cfg.chunks), min(cfg.chunk, 16, budget // 4))
    return chunk, max(3, budget // chunk)


@dataclass(frozen=True)
class Rows:
    """Rows of the batch whose text starts at the same slot, with chunks of one size."""

    rows: slice
    start: int  # slot of the first real token
    chunk: int
    chunks: int
    full: int  # queries before this place read everything


def parts(view: View, cfg: Config) -> list[Rows]:
    """All rows at once where they start together, else one by one. A row's chunk is fixed at its first step.

    A fraction or bytes give a chunk by the tokens of that step; a number of tokens gives the same always.
    """
    asked = None if cfg.budget is None else parse_budget(cfg.budget)
    budgets = [None] * len(view.q) if asked is None else [asked.tokens or b for b in view.budget.tolist()]
    starts = [0] * len(budgets) if view.real is None else view.first().expand(len(budgets)).tolist()
    if "chunk" not in view.memory:
        view.memory["chunk"] = torch.tensor([split(b, cfg)[0] for b in budgets])
    kinds = list(zip(starts, view.memory["chunk"].tolist(), budgets, strict=True))
    each = [slice(None)] if len(set(kinds)) == 1 else [slice(b, b + 1) for b in range(len(kinds))]
    made = []
    for rows, (start, w, budget) in zip(each, kinds, strict=False):
        k = cfg.chunks if budget is None else max(3, budget // w)
        made.append(Rows(rows, start, w, k, max(k * w, budget or 0, cfg.trained or 0)))
    return made


def attend(view: View, cfg: Config) -> Tensor | None:
    """[B, H, N, E], or None while every query reads everything."""
    if view.bias is not None or view.stored != view.seen:
        raise Unsupported("LongHeads on a model with a position bias or on a cache that lacks tokens")
    if (cfg.budget == 1.0 and isinstance(cfg.budget, float)) or windowed(view):
        return None  # nothing is ever left out
    groups = parts(view, cfg)
    remember(view, groups)
    if all(view.seen - part.start <= part.full for part in groups):
        return None
    out = view.q.new_zeros(*view.q.shape[:3], view.v.shape[-1])
    for part in groups:
        skip = max(0, part.start - (view.seen - view.new))  # queries that are padding
        out[part.rows, :, skip:] = read(view, part, skip)
    return out


def windowed(view: View) -> bool:
    """Whether this layer slides its own window and so never leaves the trained distances."""
    seen = view.visible(slice(view.new - 1, view.new))
    first = view.index.new_zeros(1) if view.real is None else view.first()
    return seen is not None and not bool(seen[:, 0, 0].gather(1, first.expand(len(seen))[:, None]).all())


def remember(view: View, groups: list[Rows]) -> None:
    """Compute the key of every chunk that this step fills; keep the queries of those still open."""
    memory, old = view.memory, view.memory.get("queries", view.q[:, :, :0])
    q = torch.cat([old, view.q], dim=2)  # [B, H, recent, D], ends at the newest token
    memory["queries"] = q[:, :, -max(part.chunk for part in groups) :].clone()
    keys = memory.setdefault("keys", at_least_float32(q[:, :, :0]))
    need = max((view.seen - part.start) // part.chunk for part in groups)
    memory["keys"] = keys = F.pad(keys, (0, 0, 0, max(0, need - keys.shape[2])))  # [B, H, chunks, D]
    for part in groups:
        past = max(0, view.seen - view.new - part.start)
        old, now = past // part.chunk, (view.seen - part.start) // part.chunk
        if now > old:
            cut = slice(part.start + old * part.chunk, part.start + now * part.chunk)
            late = cut.start - (view.seen - q.shape[2])
            own = q[part.rows, :, late : late + cut.stop - cut.start]
            keys[part.rows, :, old:now] = chunk_keys(view, own, part, cut, old)


def chunk_keys(view: View, q: Tensor, part: Rows, cut: slice, number: int) -> Tensor:
    """[B, H, C, D] keys of the chunks numbered from `number`, whose slots are `cut`."""
    k, v = (at_least_float32(x[part.rows, :, cut]) for x in (view.k, view.v))
    back = (number + torch.arange(k.shape[2], device=k.device) // part.chunk) * part.chunk
    turned = view.turn(k, -back)  # from each chunk's start
    require(k.shape[-1] == v.shape[-1], "a chunk's mean value asks its keys: widths agree", k=k, v=v)
    alone = lambda x: x.unflatten(2, (-1, part.chunk)).transpose(1, 2).flatten(0, 1)  # noqa: E731  # [B·C, G, w, D]
    # within a chunk only differences of positions count: queries and keys serve as they are
    mean = plain(alone(at_least_float32(q)), alone(k), alone(v), scale=view.scale).mean(2, keepdim=True)
    key = plain(mean, alone(turned), alone(turned), scale=view.scale)  # [B·C, H, 1, D]
    return key.squeeze(2).unflatten(0, (len(k), -1)).transpose(1, 2)


def read(view: View, part: Rows, skip: int) -> Tensor:
    """[B, H, N, E] for these rows: ordinary attention before `full`, chosen chunks from there on."""
    q = view.q[part.rows, :, skip:]
    k, v = (x[part.rows, :, part.start :] for x in (view.k, view.v))
    new, past = q.shape[2], k.shape[2] - q.shape[2]
    full, outs = min(max(part.full - past, 0), new), []
    if full:
        seen, mask = past + full, lower_right(full, past + full, q.device)
        settings = {"scale": view.scale, "softcap": view.softcap, "sinks": view.sinks}
        outs.append(plain(q[:, :, :full], k[:, :, :seen], v[:, :, :seen], mask=mask, **settings))
    if full < new == 1:
        return gathered(view, part, q, k, v)
    rest = -k.shape[2] % part.chunk
    k, v = (F.pad(x, (0, 0, 0, rest)) for x in (k, v)) if full < new else (k, v)
    while full < new:
        t = (past + full) // part.chunk
        stop, seen = min(new, (t + 1) * part.chunk - past), (t + 1) * part.chunk
        for rows in row_blocks(stop - full, q.shape[0] * q.shape[1] * seen):
            own = slice(full + rows.start, full + rows.stop)
            outs.append(dense(view, part, q[:, :, own], past + own.start, k[:, :, :seen], v[:, :, :seen]))
        full = stop
    return torch.cat(outs, dim=2)


def choose(view: View, part: Rows, q: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """For queries at places first, first + 1, … of one chunk: chosen [B, H, r, C], q turned [B, H, r, k, D]."""
    w, k, t = part.chunk, part.chunks, first // part.chunk
    place = torch.arange(first, first + q.shape[2], device=q.device)
    bare = view.turn(at_least_float32(q), -place)
    score = bare @ view.memory["keys"][part.rows, :, 1 : t - 1].mT  # [B, H, r, t-2]
    chosen = best(F.pad(score, (1, 2), value=torch.inf), k)
    gap = slots_of(chosen) - torch.arange(k, device=q.device)  # [B, H, r, k] chunks left out before each rank
    back = (gap - (t - k + 1)) * w  # never above 0
    spread = q[:, :, :, None].expand(-1, -1, -1, k, -1).flatten(2, 3)
    return chosen, view.turn(spread, back.flatten(2)).unflatten(2, (-1, k))


def dense(view: View, part: Rows, q: Tensor, first: int, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, r, E]: scores against all chunks, each with the query of the rank that the chunk has for it."""
    w, k_heads, (chosen, turned) = part.chunk, k.shape[1], choose(view, part, q, first)
    rows = torch.arange(chosen[..., 0].numel(), device=q.device).view(*chosen.shape[:3], 1) * part.chunks
    at = (
        (rows + chosen.cumsum(-1) - 1).unflatten(1, (k_heads, -1)).permute(0, 1, 4, 2, 3)
    )  # [B, G, C, H/G, r]
    packed = turned.flatten(0, 3).index_select(0, at.flatten()).view(*at.shape[:3], -1, q.shape[-1])
    s = (packed @ k.unflatten(2, (-1, w)).mT).unflatten(3, at.shape[3:])  # [B, G, C, H/G, r, w]
    s = s.permute(0, 1, 3, 4, 2, 5).flatten(4).flatten(1, 2)  # [B, H, r, C·w]
    place = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    seen = chosen.repeat_interleave(w, -1) & (torch.arange(k.shape[2], device=q.device) <= place)
    return blend(view, s, seen, v)


def gathered(view: View, part: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, 1, E]: one step of decoding copies only the chunks that its query chose."""
    w, last = part.chunk, k.shape[2] - 1
    chosen, turned = choose(view, part, q, last)
    chunks = slots_of(chosen[:, :, 0])[..., None]  # [B, H, k, 1]
    slots = (chunks * w + torch.arange(w, device=q.device)).flatten(2)  # [B, H, k·w]
    k, v = (gather_rows(x, slots.clamp(max=last)) for x in (k, v))
    s = (k.unflatten(2, (-1, w)) @ turned[:, :, 0, :, :, None]).flatten(2)  # [B, H, k·w]
    view.report_bytes(len(view.q) // len(q) * (k.nbytes + v.nbytes) + view.memory["keys"].nbytes)
    return blend(view, s[:, :, None], (slots <= last)[:, :, None], v)


def blend(view: View, s: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    """[B, H, r, E] of products s [B, H, r, m]; every query sees at least its own token."""
    s = at_least_float32(s) * view.scale
    s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
    return mix(masked_softmax(s.masked_fill(~seen, -torch.inf), None, view.sinks), v)


METHOD = CachePage(
    config=Config,
    attend=attend,
    budget=lambda cfg: cfg.chunk * cfg.chunks,
    patterns=("causal_self",),
    card=Card(
        title="LongHeads",
        paper="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
        year=2024,
        idea="each head and query reads the first, the last two and its own best chunks, positions closed up",
        cost="chunk keys: O(N·w); a step of decoding reads N/w chunk keys and k·w tokens in every query head",
        state="the whole cache, one key per chunk and query head, and the queries of the open chunk",
        needs=("qkv", "decoder-lm"),
        lineage=("streaming_llm",),
        neutral={"chunk": 1 << 20},
        caveat="the prompt computes scores against every chunk and hides those not chosen: exact, but quadratic. "
        "In the released code a query of the prompt does not see its own token, and a step of decoding that ends "
        "a chunk reads k-1 chunks; here every query reads k, its own token included. As released, attention "
        "inside a chunk is not causal and choosing uses q·key without 1/√D. With left padding, positions are "
        "those that generate gives (counted over real tokens). Layers that slide a window of their own stay as "
        "they are",
    ),
)
