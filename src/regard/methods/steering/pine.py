"""PINE: documents see each other both ways and stand where their importance puts them: their order says nothing.

    I_r(j) = mean over keys p of document j of softmax_p(q_r k_p / √D)     without rotary positions, over the keys of
                                                                           all documents but the query's own
    own document first, then the others by falling I: the first ends at the end, each next where the one before begins
    A query in a document stands at the end, its document nearest to it; I is summed over the document's queries.
    The text after the documents asks token by token and head by head; the text before them is as it was.

where all documents share the same stretch of positions. A query sees its own document up to itself and all of the
others. What a document holds, what the question reads and what follows is the same in every order of the documents, but
for ties of I and for rounding. Keys stay where they are: for each document the query is rotated instead.

>>> ranked(torch.tensor([[[0.0, 0.7, 0.3]]]), torch.tensor([2, 1, 4]), end=8)  # 0.7 nearest, then 0.3, then 0.0
tensor([[[1, 7, 3]]])
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32, masked_softmax

Turn = Callable[[Tensor, Tensor], Tensor]  # (x [H, N, D], by [H, N]) -> x at positions `by` further on


@dataclass(frozen=True)
class Config:
    documents: str = "document"  # the role that numbers documents from 0 on; -1 elsewhere
    least: int = 2  # documents at which it acts

    def __post_init__(self) -> None:
        require(self.least >= 2, "two documents have an order", least=self.least)


def ranked(importance: Tensor, lengths: Tensor, end: int) -> Tensor:
    """[H, N, J] where each document begins: the most important ends at `end`, the next before it."""
    order = importance.argsort(dim=-1, descending=True, stable=True)
    ends = end - lengths[order].cumsum(-1)
    return torch.empty_like(ends).scatter_(-1, order, ends)


def arranged(
    q: Tensor, k: Tensor, v: Tensor, bare: Tensor, documents: Tensor, k_at: Tensor, turn: Turn, scale: float
) -> Tensor:
    """[H, N, E] of one text: rotated q [H, N, D] of its last N tokens and k [H, n, D]; bare scores [H, N, n]."""
    n, new = k.shape[1], q.shape[1]
    names = documents[documents >= 0].unique()
    inside = documents[None] == names[:, None]  # [J, n]
    lengths, first = inside.sum(1), int((documents >= 0).to(torch.uint8).argmax())
    begins = torch.stack([k_at[row].min() for row in inside])
    end = int(k_at[first]) + int(lengths.sum())
    asking = documents[n - new :]
    of = (asking[:, None] == names[None]).to(torch.uint8).argmax(1)  # which document, where a row is in one
    own, after = asking >= 0, torch.arange(n - new, n, device=q.device) > first
    moved = torch.where(own, end - lengths[of] - begins[of], 0)  # of each query
    nearness = importance(bare, inside, of, own)
    shift = ranked(nearness, lengths, end) - begins  # [H, N, J]
    s = torch.where(own[None, :, None], turn(q, moved.expand(len(q), -1)) @ k.mT, q @ k.mT) * scale
    for j, keys in enumerate(inside):
        asked = turn(q, moved - shift[..., j]) @ k[:, keys].mT * scale
        s[:, :, keys] = torch.where((own | after)[None, :, None], asked, s[:, :, keys])
    return masked_softmax(s, sees(documents, new)[None].expand(len(q), -1, -1)).to(v.dtype) @ v


def importance(bare: Tensor, inside: Tensor, of: Tensor, own: Tensor) -> Tensor:
    """[H, N, J] of each document for each query; its own is the most important one."""
    mine = own[:, None] & (of[:, None] == torch.arange(len(inside), device=of.device))  # [N, J]
    region = inside.any(0)[None] & ~(mine[:, :, None] & inside[None]).any(1)  # [N, n]
    w = masked_softmax(bare, region[None].expand(len(bare), -1, -1))
    mean = torch.stack([w[..., keys].mean(-1) for keys in inside], -1)
    total = torch.stack([mean[:, mine[:, j]].sum(1) for j in range(len(inside))], 1)  # [H, J asking, J]
    mean = torch.where(own[None, :, None], total[:, of], mean)
    return mean.masked_fill(mine[None], torch.inf)


def sees(documents: Tensor, new: int) -> Tensor:
    """[N, n] bool: causal, and the other documents whole."""
    at = torch.arange(len(documents), device=documents.device)
    causal = at[None] <= at[:, None]
    both = (documents >= 0)[:, None] & (documents >= 0)[None]
    return (causal | both & (documents[:, None] != documents[None]))[-new:]


def rope(x: Tensor, at: Tensor, theta: float) -> Tensor:
    """x [H, m, D] rotated by positions [.., m], halves of the width in pairs."""
    half = x.shape[-1] // 2
    angle = at[..., None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    (a, b), cos, sin = x.split(half, -1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def measure(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, theta: float, new: int) -> Tensor:
    """[H, new, E] of unrotated q, k [H, n, D] and v of a whole text, of whose last `new` tokens is asked."""
    at, scale = torch.arange(k.shape[1]), q.shape[-1] ** -0.5
    bare = (q @ k.mT * scale)[:, -new:]
    turn = lambda x, by: rope(x, by, theta)  # noqa: E731
    rotated = rope(q, at, theta)[:, -new:], rope(k, at, theta)
    return arranged(*rotated, v, bare, documents, at, turn, scale)


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, theta: float, new: int) -> Tensor:
    """By the definition: for each query and head a place for every key, and every key rotated to its place."""
    n, scale, labels = k.shape[1], q.shape[-1] ** -0.5, documents.tolist()
    groups = {d: [p for p in range(n) if labels[p] == d] for d in sorted({*labels} - {-1})}
    first = min(p for p in range(n) if labels[p] >= 0)
    end, rows = first + sum(map(len, groups.values())), []
    for h in range(q.shape[0]):
        for t in range(n - new, n):
            own, places, here = labels[t], {p: p for p in range(n) if labels[p] < 0}, t
            asking = groups[own] if own >= 0 else [t]
            others = [d for d in groups if d != own]
            if own >= 0 or t > first:
                weight = dict.fromkeys(others, 0.0)
                for a in asking:
                    e = {p: float(torch.exp(scale * (q[h, a] @ k[h, p]))) for d in others for p in groups[d]}
                    for d in others:
                        weight[d] += sum(e[p] for p in groups[d]) / sum(e.values()) / len(groups[d])
                order = ([own] if own >= 0 else []) + sorted(others, key=lambda d: -weight[d])
                edge = end
                for d in order:
                    edge -= len(groups[d])
                    places |= {p: edge + i for i, p in enumerate(groups[d])}
                here = places[t] if own >= 0 else t
            seen = [p for p in range(n) if p <= t or (own >= 0 and labels[p] >= 0 and labels[p] != own)]
            at = torch.tensor([places.get(p, p) for p in seen])
            query = rope(q[h : h + 1, t : t + 1].double(), torch.tensor([here]), theta)
            keys = rope(k[h : h + 1, seen].double(), at, theta)
            rows.append((query @ keys.mT * scale).softmax(-1)[0] @ v[h, seen].double())
    return torch.stack(rows).view(q.shape[0], new, -1)


def cases(seed: int) -> Iterable[tuple]:
    """Two documents and four, of unequal lengths; a prompt, and single tokens behind it."""
    g = torch.Generator().manual_seed(seed)
    for labels, new in (
        ([-1, 0, 0, 1, 1, 1, -1], 7),
        ([-1, -1, 0, 1, 1, 2, 2, 2, 3, -1, -1], 11),
        ([0, 1, 1, 2, -1], 1),
    ):
        q, k, v = (torch.randn(2, len(labels), 4, generator=g, dtype=torch.float64) for _ in "qkv")
        yield 2 * q, 2 * k, v, torch.tensor(labels), 100.0, new


def attention(at: Any, cfg: Config) -> Tensor | None:
    """[B, H, N, E] of a call; None where no text has as many documents."""
    labels = at.labels(cfg.documents)
    if max(len({*row.tolist()} - {-1}) for row in labels) < cfg.least:
        return None
    q0, k0 = (at_least_float32(x) for x in at.bare())
    share = q0.shape[1] // k0.shape[1]
    out = torch.zeros(*at.q.shape[:3], at.v.shape[-1], dtype=at.v.dtype, device=at.v.device)
    for b, row in enumerate(labels):
        keys, asks = at.real[b].nonzero()[:, 0], at.asks[b].nonzero()[:, 0]
        if not len(asks):
            continue
        new = row[keys][-len(asks) :]
        whole = bool((new >= 0).any()) and not torch.equal(new[new >= 0], row[row >= 0])
        require(not whole, "all documents are read in one forward", documents=row.tolist()[:16])
        q, k, v = at.q[b, :, asks].float(), at.k[b, :, keys].float(), at.v[b, :, keys].float()
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        bare = q0[b, :, asks] @ k0[b, :, keys].repeat_interleave(share, 0).mT * at.scale
        few = len({*row.tolist()} - {-1}) < cfg.least
        own = torch.full_like(row[keys], -1) if few else row[keys]
        turn = lambda x, by: at.turn(x[None], by[None])[0]  # noqa: E731
        made = plain(q, k, v, at.scale) if few else arranged(
            q, k, v, bare, own, at.k_at[b, keys], turn, at.scale
        )  # fmt: skip
        out[b, :, asks] = made.to(out.dtype)
    return out


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of a text without documents."""
    n, m = q.shape[1], k.shape[1]
    seen = torch.arange(m, device=q.device) <= torch.arange(m - n, m, device=q.device)[:, None]
    return masked_softmax(q @ k.mT * scale, seen[None]) @ v


METHOD = SteeringPage(
    config=Config,
    attention=attention,
    measure=measure,
    reference=reference,
    cases=cases,
    standard=False,
    card=Card(
        title="PINE",
        paper="Eliminating Position Bias of Language Models: A Mechanistic Approach",
        year=2024,
        idea="documents attend to each other and stand by importance, so that their order in the prompt says nothing",
        cost="a rotation of the queries and a product for each document, explicit weights",
        needs=("decoder-lm", "rotary positions", "documents (a role)"),
        neutral={"least": 10**6},
        caveat="ties of importance fall by place. The released code caches keys before rotation and rotates them for "
        "each query and head; here the query is rotated, the same to rounding. Documents stand beside each other, are "
        "tokenised apart, and are read in one forward. Models whose tokens have several positions are refused",
    ),
)
