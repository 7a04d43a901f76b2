"""LongHeads: every head reads k chunks of its own choice, at contiguous positions inside the trained length.

    s̄_c = mean_i softmax(q_i K_cᵀ) V_c      of chunk c alone, rotated from its start, not causal
    key_c = softmax(s̄_c K_cᵀ) K_c
    query i of chunk t reads chunks 0, t-1, t and the k-3 best by q_i · key_c    by head; q_i before rotation
    the chunk of rank r stands at positions r·w … r·w + w-1, the query at (k-1)·w + i mod w

where no distance leaves the trained length k·w, so a model reads texts longer than it was trained on, and up to
k·w nothing changes at all. Rotary scores see differences only: instead of moving keys, the query is rotated back
by (t - k + 1) - (c - r) chunks for each of its k ranks. Llama-2-7B (4k) finds passkeys at 128k (figure 4).

>>> [split(budget, Config()) for budget in (None, 1024, 128, 12)]  # (w, k)
[(256, 16), (64, 16), (16, 8), (3, 4)]
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, Unsupported, require
from regard.kinds.cache import CachePage
from regard.ops import Budget, View, best, capped, gather_rows, matmul, mix, parse_budget, slots_of
from regard.ops.softmax import at_least_float32, lower_right, masked_softmax, row_blocks, softmax_attention


@dataclass(frozen=True)
class Config:
    chunk: int = 256  # w, tokens of a chunk; a small budget shrinks it
    chunks: int = 16  # that a query reads: the first, the last two, the best of the rest
    budget: Budget | int | float | str | None = None  # tokens that a query reads; None: chunks · chunk
    trained: int | None = None  # queries before this position read everything; None: the budget

    def __post_init__(self) -> None:
        # three chunks are always read: the first and the last two
        enough = min(self.chunk - 1, self.chunks - 3, self.trained or 0)
        require(enough >= 0, "chunk >= 1, chunks >= 3, trained >= 0", cfg=self)


def split(budget: int | None, cfg: Config) -> tuple[int, int]:
    """(tokens of a chunk, chunks that a query reads). A small budget shrinks chunks: to 16, where four fit."""
    if budget is None:
        return cfg.chunk, cfg.chunks
    chunk = max(1, min(cfg.chunk, budget // cfg.chunks), min(cfg.chunk, 16, budget // 4))
    return chunk, max(3, budget // chunk)


@dataclass(frozen=True)
class Part:
    """Rows of the batch whose text starts at the same slot, without the padding before it."""

    rows: slice
    q: Tensor  # [b, H, N, D] queries of this step
    k: Tensor  # [b, G, n, D] all keys so far
    v: Tensor
    chunk: int  # its tokens
    chunks: int  # that a query reads
    full: int  # queries before this position read everything


def parts(view: View, cfg: Config) -> Iterator[Part]:
    """All rows at once where they start together, else one by one. A row's chunk is fixed at its first step.

    A fraction or bytes give a chunk by the tokens of that step; a number of tokens gives the same always.
    """
    tokens = None if cfg.budget is None else parse_budget(cfg.budget).tokens
    budgets = [None if cfg.budget is None else tokens or b for b in view.budget.tolist()]
    starts, fresh = (x.expand(len(budgets)).tolist() for x in (view.seen - view.length(), view.fresh()))
    if "chunk" not in view.memory:
        view.memory["chunk"] = torch.tensor([split(b, cfg)[0] for b in budgets])
    kinds = list(zip(starts, view.memory["chunk"].tolist(), budgets, fresh, strict=True))
    each = [slice(None)] if len(set(kinds)) == 1 else [slice(b, b + 1) for b in range(len(kinds))]
    for rows, (start, w, budget, new) in zip(each, kinds, strict=False):
        chunks = cfg.chunks if budget is None else max(3, budget // w)
        full = max(chunks * w, budget or 0, cfg.trained or 0)
        q = view.q[rows, :, view.new - new :]
        if new:  # else the step is padding alone
            yield Part(rows, q, view.k[rows, :, start:], view.v[rows, :, start:], w, chunks, full)


def read_chunks(view: View, cfg: Config) -> Tensor | None:
    """[B, H, N, E], or None while every query reads everything."""
    # a window of the layer's own never leaves the trained distances; all of the text leaves nothing out
    if view.window is not None or (cfg.budget == 1.0 and isinstance(cfg.budget, float)):
        return None
    # the cache began without it, or was cropped
    unknown = view.stored != view.seen or (view.new < view.seen and "keys" not in view.memory)
    if view.bias is not None or unknown or not view.counts_one_by_one():
        raise Unsupported(
            "LongHeads under a position bias, without all tokens and chunk keys, or on shared positions"
        )
    groups = list(parts(view, cfg))
    remember(view, groups)
    if all(part.k.shape[2] <= part.full for part in groups):
        return None
    out = view.q.new_zeros(*view.q.shape[:3], view.v.shape[-1])
    for part in groups:
        out[part.rows, :, view.new - part.q.shape[2] :] = read(view, part)
    return out


def remember(view: View, groups: list[Part]) -> None:
    """Compute the key of every chunk that this step fills; keep the queries of those still open."""
    # [B, H, recent, D], ends at the newest token
    recent = view.after(view.memory.get("queries", view.q[:, :, :0]))
    view.memory["queries"] = recent[:, :, -max(part.chunk for part in groups) :].clone()
    keys = view.memory.get("keys", at_least_float32(view.q[:, :, :0]))
    most = max(part.k.shape[2] // part.chunk for part in groups)
    # [B, H, chunks, D]
    view.memory["keys"] = keys = F.pad(keys, (0, 0, 0, max(0, most - keys.shape[2])))
    for part in groups:
        stored, w = part.k.shape[2], part.chunk
        old, now = (stored - part.q.shape[2]) // w, stored // w
        if now > old:
            queries = recent[part.rows, :, old * w - stored :][:, :, : (now - old) * w]
            keys[part.rows, :, old:now] = chunk_keys(view, at_least_float32(queries), part, old, now)


def chunk_keys(view: View, q: Tensor, part: Part, old: int, now: int) -> Tensor:
    """[b, H, C, D] keys of the chunks numbered old … now - 1, whose queries are q."""
    w = part.chunk
    k, v = (at_least_float32(x[:, :, old * w : now * w]) for x in (part.k, part.v))
    # from each chunk's start
    rotated = view.rotate(k, -torch.arange(old, now, device=k.device).repeat_interleave(w) * w)
    require(k.shape[-1] == v.shape[-1], "a chunk's mean value asks its keys: widths agree", k=k, v=v)
    # [b·C, G, w, D]; within a chunk only differences of positions count: queries and keys serve as they are
    q, k, v, rotated = (x.unflatten(2, (-1, w)).transpose(1, 2).flatten(0, 1) for x in (q, k, v, rotated))
    # the chunk's mean value asks its keys: [b·C, H, 1, D]
    mean = softmax_attention(q, k, v, scale=view.scale).mean(2, keepdim=True)
    key = softmax_attention(mean, rotated, rotated, scale=view.scale)
    return key.squeeze(2).unflatten(0, (-1, now - old)).transpose(1, 2)


def read(view: View, part: Part) -> Tensor:
    """[b, H, N, E] for these rows: ordinary attention before `full`, chosen chunks from there on."""
    new, past, w = part.q.shape[2], part.k.shape[2] - part.q.shape[2], part.chunk
    full = min(max(part.full - past, 0), new)
    if full < new == 1:
        return gathered(view, part)
    outs = []
    if full:
        q, k, v = part.q[:, :, :full], part.k[:, :, : past + full], part.v[:, :, : past + full]
        how = dict(scale=view.scale, softcap=view.softcap, sinks=view.sinks)
        outs.append(softmax_attention(q, k, v, mask=lower_right(full, past + full, q.device), **how))
    k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % w)) if full < new else x for x in (part.k, part.v))
    while full < new:
        seen = ((past + full) // w + 1) * w  # the queries of one chunk, in blocks
        for rows in row_blocks(min(new, seen - past) - full, len(part.q) * part.q.shape[1] * seen):
            q = part.q[:, :, full + rows.start : full + rows.stop]
            outs.append(dense(view, part, q, past + full + rows.start, k[:, :, :seen], v[:, :, :seen]))
        full = seen - past
    return torch.cat(outs, dim=2)


def choose(view: View, part: Part, q: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """For queries at positions first, first + 1, … of one chunk: chosen [b, H, r, C], q rotated [b, H, r, k, D]."""
    w, k, t = part.chunk, part.chunks, first // part.chunk
    bare = view.rotate(at_least_float32(q), -torch.arange(first, first + q.shape[2], device=q.device))
    # the first and the last two are always among them
    chosen = best(F.pad(bare @ view.memory["keys"][part.rows, :, 1 : t - 1].mT, (1, 2), value=torch.inf), k)
    # chunks left out before each rank [b, H, r, k], less those before the last k: never above 0
    back = (slots_of(chosen) - torch.arange(k, device=q.device) - (t - k + 1)) * w
    spread = q[:, :, :, None].expand(-1, -1, -1, k, -1).flatten(2, 3)
    return chosen, view.rotate(spread, back.flatten(2)).unflatten(2, (-1, k))


def dense(view: View, part: Part, q: Tensor, first: int, k: Tensor, v: Tensor) -> Tensor:
    """[b, H, r, E]: scores against all chunks, each with the query of the rank that the chunk has for it."""
    w, (chosen, rotated) = part.chunk, choose(view, part, q, first)
    rows = torch.arange(chosen[..., 0].numel(), device=q.device).view(*chosen.shape[:3], 1) * part.chunks
    # [b, G, C, H/G, r]
    at = (rows + chosen.cumsum(-1) - 1).unflatten(1, (k.shape[1], -1)).permute(0, 1, 4, 2, 3)
    packed = rotated.flatten(0, 3).index_select(0, at.flatten()).view(*at.shape[:3], -1, q.shape[-1])
    s = matmul(packed, k.unflatten(2, (-1, w)).mT).unflatten(3, at.shape[3:])  # [b, G, C, H/G, r, w]
    s = s.permute(0, 1, 3, 4, 2, 5).flatten(4).flatten(1, 2)  # [b, H, r, C·w]
    position = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    seen = chosen.repeat_interleave(w, -1) & (torch.arange(k.shape[2], device=q.device) <= position)
    return blend(view, s, seen, v)


def gathered(view: View, part: Part) -> Tensor:
    """[b, H, 1, E]: one step of decoding copies only the chunks that its query chose."""
    w, last = part.chunk, part.k.shape[2] - 1
    chosen, rotated = choose(view, part, part.q, last)
    # [b, H, k·w]
    slots = (slots_of(chosen[:, :, 0])[..., None] * w + torch.arange(w, device=chosen.device)).flatten(2)
    k, v = (gather_rows(x, slots.clamp(max=last)) for x in (part.k, part.v))
    s = matmul(k.unflatten(2, (-1, w)), rotated[:, :, 0, :, :, None]).flatten(2)  # [b, H, k·w]
    # what this step reads of the layer, instead of all that is stored
    view.report_bytes(view.memory["keys"].nbytes + len(view.q) // len(part.q) * (k.nbytes + v.nbytes))
    return blend(view, s[:, :, None], (slots <= last)[:, :, None], v)


def blend(view: View, s: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    """[b, H, r, E] of products s [b, H, r, m]; every query sees at least its own token."""
    return mix(masked_softmax(capped(at_least_float32(s) * view.scale, view.softcap), seen, view.sinks), v)


METHOD = CachePage(
    config=Config,
    attention=read_chunks,
    reference="regard.testing.cache.longheads:reference",
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
        caveat="the prompt computes scores against every chunk and hides those not chosen: exact, but quadratic. In "
        "the released code a query of the prompt does not see its own token, and a step that ends a chunk reads k-1 "
        "chunks; here all read k, with their own. As released, attention in a chunk is not causal and choosing has no "
        "1/√D. Positions count real tokens, not padding. Layers that slide a window of their own stay as they are",
    ),
)
