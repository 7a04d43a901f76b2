"""Routing attention's claim: one cluster is full attention, and clusters find what a local window does not.

Planted clusters: tokens are one of eight directions with noise, in random order, the same share of each. Centroids
start as the page draws them and learn by the page's own moving means on texts of their own, at a decay of 0.9. k-means
from one random start may give two centroids to one cluster and none to another, so four heads learn from starts of
their own, and the one whose centroids fit the last text best counts; the mass of each stands beside it. Mass captured
is the weight that full attention gives to the keys which a query meets; a window reads as many keys, those nearest to
it. The bound is for self, where a window reads w keys of n whoever asks; causal_self, in which a window shows early
queries everything, is given beside it. Operations are those that torch counts in matrix products, with k = √n.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regard.claims.lab import difference, generator, random_qkv, slope, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.sparse import routing_transformer as page

TOKENS, CLUSTERS, WIDTH, NOISE, STEPS, STARTS = 512, 8, 16, 0.3, 400, 4
LENGTHS = (1_024, 4_096, 16_384)


def attend(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, pattern: str, **settings: float) -> tuple:
    cfg = page.Config(clusters=centroids.shape[1], **settings)
    return page.METHOD.fast(q, k, v, cfg, Call(pattern, params={"centroids": centroids}))


def planted(g: torch.Generator, directions: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [1, 1, TOKENS, WIDTH]: a token's are about its direction, with noise of their own."""
    kind = torch.randperm(TOKENS, generator=g) % CLUSTERS
    q, k = (directions[kind] + NOISE * torch.randn(TOKENS, WIDTH, generator=g) for _ in range(2))
    return q[None, None], k[None, None]


def learned(g: torch.Generator, directions: Tensor) -> Tensor:
    """Centroids [STARTS, CLUSTERS, WIDTH] after STEPS texts, those that fit the last one best first."""
    dims = {"heads": STARTS, "kv_heads": STARTS, "key": WIDTH, "value": 1, "width": WIDTH}
    centroids = page.init(page.Config(clusters=CLUSTERS), dims)["centroids"]
    for _ in range(STEPS):
        q, k = (t.expand(-1, STARTS, -1, -1) for t in planted(g, directions))
        centroids = attend(q, k, q[..., :1], centroids, "self", decay=0.9)[2]["centroids"]
    x = F.layer_norm(torch.cat([q, k], dim=2)[0, 0], (WIDTH,))
    fit = (centroids @ x.T).amax(1).mean(1)
    return centroids[fit.argsort(descending=True)]


def masses(q: Tensor, k: Tensor, centroids: Tensor, pattern: str) -> tuple[float, float]:
    """The share of full attention's weights on keys that (routing, a window of as many keys) reads."""
    causal, unit = pattern == "causal_self", torch.eye(TOKENS)[None, None]
    met = attend(q, k, unit, centroids, pattern)[0][0, 0] > 0
    q, k = (F.layer_norm(t[0, 0], (WIDTH,)) for t in (q, q if causal else k))
    i, w = torch.arange(TOKENS), TOKENS // CLUSTERS
    seen = (i <= i[:, None]) if causal else torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    full = (q @ k.T).masked_fill(~seen, -torch.inf).softmax(-1)
    start = i[:, None] - (w - 1 if causal else w // 2)
    near = (i >= start) & (i < start + w)
    return (full * met).sum(-1).mean().item(), (full * near).sum(-1).mean().item()


def operations(n: int) -> int:
    q, k, v = random_qkv(generator(), 1, n, WIDTH)
    clusters = math.isqrt(n)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attend(q, k, v, torch.randn(1, clusters, WIDTH, generator=generator(1)), "causal_self")
    return counter.get_total_flops()


def single_cluster() -> float:
    """The largest difference from full attention with shared queries and keys, in float32."""
    q, k, v = random_qkv(generator(), 2, 300, WIDTH)
    one = attend(q, k, v, torch.ones(2, 1, WIDTH), "causal_self")[0]
    x = F.layer_norm(q, (WIDTH,), eps=page.EPS)
    return difference(one, F.scaled_dot_product_attention(x, x, v, scale=1.0, is_causal=True))


def measure() -> Measured:
    with threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        g, directions = generator(), torch.randn(CLUSTERS, WIDTH, generator=generator(1))
        centroids = learned(g, directions)
        q, k = planted(g, directions)
        by_start = [masses(q, k, start[None], "self") for start in centroids]
        routed, local = by_start[0]
        routed_causal, local_causal = masses(q, k, centroids[:1], "causal_self")
        same, counts = single_cluster(), [operations(n) for n in LENGTHS]
    grown = slope(LENGTHS, [float(c) for c in counts])
    numbers = {
        "difference_of_one_cluster": same,
        "mass_routed": routed,
        "mass_routed_by_start": [mass for mass, _ in by_start],
        "mass_local": local,
        "mass_routed_causal": routed_causal,
        "mass_local_causal": local_causal,
        "operations": counts,
        "exponent_of_operations": grown,
    }
    parts = {
        "one cluster": same < 1e-5,
        "mass": routed >= 0.9,
        "mass of the window": local <= 0.4,
        "operations": grown <= 1.6,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="routing_transformer",
    statement=(
        "one cluster is full attention with shared queries and keys; on planted clusters routing captures far more of "
        "full attention's mass than a local window that reads as many keys"
    ),
    bound=(
        "difference of one cluster < 1e-5; mass captured >= 0.9, by the window <= 0.4, at w = n / 8; exponent of "
        "operations in n <= 1.6"
    ),
    measure=measure,
)
