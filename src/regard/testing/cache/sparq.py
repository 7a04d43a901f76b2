"""SparQ Attention written out: one text, one head at a time; shares nothing with the page."""

import math

import torch
from torch import Tensor

from regard.methods.caches.sparq import Config
from regard.ops import View


def reference(view: View, cfg: Config) -> Tensor:
    """[1, H, n, E] for all queries of a whole text; sparse is only the last, where it was fed by itself."""
    n, heads, groups = view.seen, view.q.shape[1], view.k.shape[1]
    out = torch.stack([full(view, h, h * groups // heads) for h in range(heads)])
    budget = int(view.budget.max())
    if view.fed == 1 < n and budget < n:
        for g in range(groups):
            last(view, cfg, g, budget, [h for h in range(heads) if h * groups // heads == g], out)
    return out[None]


def logs(view: View, q: Tensor, k: Tensor, h: int, temperature: float = 1.0) -> Tensor:
    """[m] logarithm of the softmax of q · k_j, with the model's cap of scores and its sink, which is no token's."""
    s = k @ q * view.scale / temperature
    s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
    sink = torch.full((1,), -math.inf) if view.sinks is None else view.sinks[h : h + 1]
    return torch.cat([s, sink.to(s)]).log_softmax(0)[:-1]


def full(view: View, h: int, g: int) -> Tensor:
    """[n, E] what head h answers when it reads all before."""
    q, k, v = view.q[0, h], view.k[0, g], view.v[0, g]
    return torch.stack([logs(view, q[i], k[: i + 1], h).exp() @ v[: i + 1] for i in range(view.seen)])


def last(view: View, cfg: Config, g: int, budget: int, heads: list[int], out: Tensor) -> None:
    """Write the last query of the heads that share KV head g into out [H, n, E]."""
    q, k, v = view.q[0, heads, -1], view.k[0, g], view.v[0, g]
    size = q.abs().sum(0).tolist()
    large = sorted(sorted(range(len(size)), key=lambda c: -size[c])[: cfg.rank])
    rough = []
    for x, h in zip(q, heads, strict=True):
        heat = math.sqrt(float(x[large].abs().sum() / x.abs().sum()))
        rough.append(logs(view, x[large], k[:, large], h, heat))
    summed, n = torch.stack(rough).logsumexp(0).tolist(), view.seen
    recent = list(range(n - max(1, round(cfg.local * budget)), n))
    others = sorted(range(recent[0]), key=lambda j: -summed[j])[: budget - len(recent)]
    read = sorted([*others, *recent])
    for x, h, w in zip(q, heads, rough, strict=True):
        left = float(w.exp().sum() - w[read].exp().sum())
        out[h, -1] = (1 - left) * (logs(view, x, k[read], h).exp() @ v[read]) + left * v.mean(0)
