"""Routing attention: every token attends within clusters of tokens that online k-means finds similar.

    q, k ← layer norm of q and k, without gain and bias, norm √D; in causal_self k ← q, keys are not read
    members of cluster c = the w = ⌈n / k⌉ tokens with the largest μ_c·q; in self those with the largest μ_c·k answer
    o_i^c = Σ_j softmax_j(q_i·k_j) v_j                    over the members j of c, in causal_self those up to i
    o_i   = the mean of o_i^c over the clusters that i is in; zero where it is in none
    μ_c   ← λ μ_c + (1 - λ) · mean of the q and k whose largest μ·x is that with c

All clusters have one size, so with k = √n each of n queries reads √n keys. A token may be in several clusters or none.
Nothing learns through the choice: the centroids μ get no gradient and move by the last line, which the page gives as
aux["centroids"].

In causal_self weights are causal, the choice is not: the largest of the whole text are taken, so a later token can
push an earlier one out of a cluster, and outputs before it change: a leak. Such is the paper's training pass. Token by
token, a state makes the choice among the tokens so far. A hidden token is in no cluster, w counts those that are there.

Worked by hand: two clusters of one token, centroids of (2, -2) and (-2, 2), tokens of (1, -1) and (-1, 1): each is
alone in its cluster and gets its own value, and the first centroid moves to 0.999 (2, -2) + 0.001 (1, -1).

>>> import torch
>>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(1, 1, 2, 2)
>>> call = Call("causal_self", params={"centroids": 2 * x[0]})
>>> out, _, aux = reference(x, x, torch.tensor([4.0, 8.0]).view(1, 1, 2, 1), Config(clusters=2), call)
>>> out.flatten().tolist(), [round(c, 4) for c in aux["centroids"][0, 0].tolist()]
([4.0, 8.0], [1.999, -1.999])
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, per_query_head, shown, softmax_attention
from regard.ops.closed import among_members, highest

EPS = 1e-6
REFUSED = "clusters gather the tokens of one text"
OWN_TEXT = "own text: as many queries as keys, which are the queries in causal_self"


@dataclass(frozen=True)
class Config:
    clusters: int = 16  # k, about √n
    members: int | None = None  # w, tokens of a cluster; None: ⌈n / k⌉
    scale: float = 1.0  # of scores; those of the norm √D on both sides are D at most
    decay: float = 0.999  # λ

    def __post_init__(self) -> None:
        require(self.clusters >= 1, "clusters >= 1", clusters=self.clusters)
        require(self.members is None or self.members >= 1, "members >= 1, or None", members=self.members)
        require(0 <= self.decay <= 1, "0 <= decay <= 1", decay=self.decay)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    centroids = torch.randn(dims["heads"], cfg.clusters, dims["key"])
    return {"centroids": F.layer_norm(centroids, centroids.shape[-1:])}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict[str, Tensor]]:
    require(q.shape[2] == k.shape[2], OWN_TEXT, q=q, k=k)
    n, heads, causal = q.shape[2], q.shape[1], call.pattern == "causal_self"
    before = call.initial_state or (q[:, :, :0], v[:, :, :0])
    q, v = state = tuple(torch.cat(parts, dim=2) for parts in zip(before, (q, v), strict=True))
    q_h, k_h, v_h = exact(q, q if causal else heads_of(k, heads), heads_of(v, heads))
    q_h, k_h = (t - t.mean(-1, keepdim=True) for t in (q_h, k_h))
    q_h, k_h = (t / (t.square().mean(-1, keepdim=True) + EPS).sqrt() for t in (q_h, k_h))
    mu = call.params["centroids"].double()
    there = torch.ones_like(k_h[..., 0], dtype=torch.bool)
    there = there if call.key_mask is None else there & call.key_mask
    out, nearest = torch.zeros_like(v_h), [[[] for _ in mu[0]] for _ in mu]
    for b, h in ((b, h) for b in range(len(q)) for h in range(heads)):
        tokens = there[b, h].nonzero()[:, 0]
        inputs = q_h[b, h, tokens], k_h[b, h, tokens], v_h[b, h, tokens]
        out[b, h, tokens] = one_head(*inputs, mu[h], causal, cfg)
        for x in torch.cat(inputs[:2]).detach():
            nearest[h][int((mu[h] @ x).argmax())].append(x)
    centroids = mu.detach().clone()
    for h, c in ((h, c) for h, row in enumerate(nearest) for c, near in enumerate(row) if near):
        centroids[h, c] = cfg.decay * mu[h, c] + (1 - cfg.decay) * torch.stack(nearest[h][c]).mean(0)
    aux = {"centroids": centroids.detach().to(call.params["centroids"].dtype)}
    return out[:, :, -n:].to(v.dtype), state if causal else None, aux


def one_head(q: Tensor, k: Tensor, v: Tensor, mu: Tensor, causal: bool, cfg: Config) -> Tensor:
    """[T, E] of T tokens, all of them there."""
    found, w = [[] for _ in q], cfg.members or -(-len(q) // len(mu))
    for centroid in mu:
        asking, answering = (
            sorted(sorted(range(len(x)), key=lambda t: (-(x[t] @ centroid).item(), t))[:w]) for x in (q, k)
        )
        for i in asking:
            keys = [j for j in answering if j <= i or not causal]
            found[i].append((k[keys] @ q[i] * cfg.scale).softmax(0) @ v[keys])
    rows = [torch.stack(outs).mean(0) if outs else torch.zeros_like(v[0]) for outs in found]
    return torch.stack(rows) if rows else v


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None, dict[str, Tensor]]:
    require(q.shape[2] == k.shape[2], OWN_TEXT, q=q, k=k)
    n, heads, dtype, causal = q.shape[2], q.shape[1], v.dtype, call.pattern == "causal_self"
    if call.initial_state is not None:
        q, v = (torch.cat([old, new], dim=2) for old, new in zip(call.initial_state, (q, v), strict=True))
    state = (q, v) if causal else None
    k, v = (at_least_float32(per_query_head(t, heads).expand(-1, heads, -1, -1)) for t in (k, v))
    q, v = shown(at_least_float32(q), call.key_mask), shown(v, call.key_mask)
    q = F.layer_norm(q, q.shape[-1:], eps=EPS)
    k = q if causal else F.layer_norm(shown(k, call.key_mask), k.shape[-1:], eps=EPS)
    mu = at_least_float32(call.params["centroids"]).detach()
    fit_q = mu @ q.detach().mT  # [B, H, c, N]
    fit_k = fit_q if causal else mu @ k.detach().mT
    asking = members(fit_q, cfg, call)
    answering = asking if causal else members(fit_k, cfg, call)
    out = among_members(q, k, v, asking, answering, scale=cfg.scale, causal=causal)
    centroids = moved(mu, ((q, fit_q), (k, fit_k)), cfg, call)
    aux = {"centroids": centroids.to(call.params["centroids"].dtype)}
    return out[:, :, -n:].to(dtype), state, aux


def members(fit: Tensor, cfg: Config, call: Call) -> Tensor:
    """[B, H, c, w] ascending indices of the tokens of each cluster, -1 where there are fewer."""
    w = cfg.members or -(-fit.shape[3] // cfg.clusters)
    if call.key_mask is None:
        return highest(fit, w)
    count = call.key_mask.sum(-1)[..., None, None]
    limit = None if cfg.members else ((count + cfg.clusters - 1) // cfg.clusters).clamp(min=1)
    return highest(fit.masked_fill(~call.key_mask[:, :, None], -torch.inf), w, limit)


@torch.no_grad()
def moved(mu: Tensor, sides: tuple[tuple[Tensor, Tensor], ...], cfg: Config, call: Call) -> Tensor:
    """Centroids [H, c, D] moved to the mean of the tokens x [B, H, N, D] whose largest fit [B, H, c, N] is theirs."""
    total = mu.new_zeros(mu.shape[0], mu.shape[1], mu.shape[2] + 1)
    for x, fit in sides:
        nearest = F.one_hot(fit.argmax(2), mu.shape[1]).to(mu.dtype)  # [B, H, N, c]
        nearest = shown(nearest, call.key_mask)
        total = total + torch.einsum("bhnc,bhnd->hcd", nearest, F.pad(x, (0, 1), value=1.0))
    count = total[..., -1:]
    means = torch.where(count > 0, total[..., :-1] / count.clamp(min=1), mu)
    return cfg.decay * mu + (1 - cfg.decay) * means


def shared(q: Q, k: K, v: V, call: Call) -> Out:
    """All tokens in one cluster: attention of normed queries to normed keys, in causal_self to the queries."""
    q, k = (F.layer_norm(t, t.shape[-1:], eps=EPS) for t in (q, per_query_head(k, q.shape[1])))
    if call.pattern != "causal_self":
        return softmax_attention(q, k, v, scale=1.0)
    return softmax_attention(q, q, per_query_head(v, q.shape[1]), scale=1.0, causal=True)


def state_size(cfg: Config, dims: dict, n: int) -> int:
    return n * (dims["heads"] * dims["key"] + dims["kv_heads"] * dims["value"])


LEAK = "the members of a cluster are chosen among all tokens of a call, later ones too"
METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("causal_self", "self"),
    unsupported=dict.fromkeys(("cross", "causal_cross"), REFUSED),
    test_settings=({"clusters": 2}, {"clusters": 3, "members": 4}, {"clusters": 1, "scale": 0.5}),
    neutral_base=shared,
    state_size=state_size,
    exempt={
        "influence": LEAK,
        "queries": "a token whose query moves can push another out of its cluster; in causal_self it is the key too",
        "prefix": LEAK + "; in causal_self keys are the queries, in self they are not",
        "segments": LEAK,
        "decode": LEAK,
        "padded_state": LEAK,
    },
    card=Card(
        title="Routing attention (Routing Transformer)",
        paper="Efficient Content-Based Sparse Attention with Routing Transformers, arXiv:2003.05997",
        year=2020,
        idea="online k-means on queries and keys; each cluster takes its nearest tokens, which attend to each other",
        cost="O(N·(k + N/k)·(D + E)) time, O(N√N) with k = √N clusters; a decoded token routes all so far anew",
        state="every query and value: (H·D + G·E)·n numbers for H query heads and G KV heads",
        needs=("qkv", "decoder-lm"),
        lineage=("softmax",),
        neutral={"clusters": 1},
        caveat=(
            "causal_self leaks by design, as the paper's training pass: which earlier tokens a query meets depends on "
            "later ones. In the paper half of the heads attend to a local window instead (the mask window). The "
            "released code divides a token's sum over clusters by their count + 0.01, smooths the counts of the moving "
            "means (decay 0.99 by default), and adds 1e-4 times the distance of tokens to their centroids to the loss; "
            "here the mean is exact, λ is 0.999, and nothing is added. With k ← q a token's score with itself is the "
            "largest there is, scale·D, and it is not masked"
        ),
    ),
)
