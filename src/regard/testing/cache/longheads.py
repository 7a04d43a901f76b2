"""LongHeads written out: one head and one query at a time, shares nothing with the page but how a budget is split."""

import math

import torch
from torch import Tensor

from regard.core.errors import present
from regard.methods.caches.longheads import Config, split
from regard.ops import View, parse_budget


def reference(view: View, cfg: Config) -> Tensor:
    """[1, H, n, E] for all queries of a whole text. A budget is in tokens, so that chunks do not change on the way."""
    budget = None if cfg.budget is None else parse_budget(cfg.budget).tokens
    present(cfg.budget is None or budget, "the written-out form takes a budget in tokens", budget=cfg.budget)
    w, most = split(budget, cfg)
    whole = max(w * most, budget or 0, cfg.trained or 0)
    heads = view.q.shape[1]
    return torch.stack([head(view, h, h * view.groups // heads, w, most, whole) for h in range(heads)], 1)


def moved(view: View, x: Tensor, by: Tensor) -> Tensor:
    """x [m, D] rotated on by `by` [m] positions."""
    rotate = present(view.rotate, "the model's rotation is at hand")
    return rotate(x[None, None], by[None, None])[0, 0]


def head(view: View, h: int, g: int, w: int, most: int, whole: int) -> Tensor:
    """[1, n, E] of query head h on KV head g."""
    at = torch.arange(view.seen)
    q, k = (moved(view, x, -at) for x in (view.q[0, h], view.k[0, g]))  # as projected, [n, D]
    v, rows = view.v[0, g], []
    keys = {c: chunk_key(view, *(x[c * w : c * w + w] for x in (q, k, v))) for c in range(view.seen // w)}
    near, asking = moved(view, k, at), moved(view, q, at)
    for i in range(view.seen):
        t, slots, close, asks = i // w, at[: i + 1], near[: i + 1], asking[i]
        if i >= whole:
            rated = sorted(range(1, t - 1), key=lambda c: -float(q[i] @ keys[c]))
            chunks = sorted({0, t - 1, t, *rated[: most - 3]})
            slots = torch.tensor([j for c in chunks for j in range(c * w, c * w + w) if j <= i])
            close = moved(view, k[slots], at[: len(slots)])
            asks = moved(view, q[i : i + 1], at[len(slots) - 1 : len(slots)])[0]
        rows.append(weights(view, close @ asks, h) @ v[slots])
    return torch.stack(rows)[None]


def chunk_key(view: View, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[D] the key of a chunk: its mean answer asks its keys, all counted from its start."""
    near = torch.arange(len(k))
    q, k = moved(view, q, near), moved(view, k, near)
    mean = ((q @ k.T * view.scale).softmax(-1) @ v).mean(0)
    return (k @ mean * view.scale).softmax(0) @ k


def weights(view: View, products: Tensor, h: int) -> Tensor:
    """[m] softmax of products [m], with the model's cap of scores and its sink."""
    s = products * view.scale
    s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
    sink = torch.full((1,), -math.inf) if view.sinks is None else view.sinks[h : h + 1].to(s)
    return torch.cat([s, sink.to(s)]).softmax(0)[:-1]
