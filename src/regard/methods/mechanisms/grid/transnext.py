"""Aggregated attention (TransNeXt): near places one by one and the whole image in averages, in one softmax.

    s_ij = (q̂_i + E)·k̂_j τ log N_i + b_ij    j in the w x w window of i (real places), or an average p of the image
    a_i  = softmax(s_i)                      over both together; N_i keys take part
    o_i  = Σ_near (a_ij + q̂_i·T_j + t_j) v_j + Σ_p a_ip v_p

q̂ and k̂ have length 1, τ = softplus of a parameter, one for each head. log N_i keeps the softmax as sharp on a larger
image, where a cosine with a fixed temperature spreads. b is learned for each place of the window; for averages it is an
MLP of the steps to their middle, on a logarithmic scale, so that any size can be asked. T and t are weights of the near
values that no softmax has seen. Averages are those of GELU(x W), normed; their keys and values are projected here.

Worked by hand on a 4 x 4 image, w = 3, averages of 2 x 2 places, all scores 0 and values 1 of near places, 0 of
averages: the corner reads 4 places and 4 averages, so it gets 4/8; an edge 6/10; the inside 9/13.

>>> import torch
>>> dims = {"heads": 1, "kv_heads": 1, "key": 2, "value": 1, "width": 3}
>>> params = {name: torch.zeros_like(p) for name, p in init(Config(), dims).items()}
>>> q, x, v = torch.zeros(1, 1, 16, 2), torch.zeros(1, 16, 3), torch.ones(1, 1, 16, 1)
>>> out, _ = reference(q, q, v, Config(), Call("self", x=x, params=params, grid=(4, 4)))
>>> [round(o, 4) for o in out.flatten()[[0, 1, 5]].tolist()], [round(n / m, 4) for n, m in ((4, 8), (6, 10), (9, 13))]
([0.5, 0.6, 0.6923], [0.5, 0.6, 0.6923])
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.mechanism import Mechanism
from regard.ops import at_least_float32, exact, heads_of, matmul, mix, per_query_head
from regard.ops.grid import as_image, as_tokens, continuous_bias, inside, window_scores, window_sums
from regard.ops.grid.continuous import cells, steps_to
from regard.ops.grid.padded import window_of

START = 1 / 0.24  # of the temperature


@dataclass(frozen=True)
class Config:
    window: int = 3  # w
    ratio: int = 2  # places on each axis that an average is of
    pool: int | None = None  # averages on each axis, whatever the image; None: side // ratio
    trained: int | None = None  # the side by which steps are counted; None: those of the image
    length: float | None = None  # N of log N for all; None: the keys that a query reads
    hidden: int = 512  # of the MLP

    def __post_init__(self) -> None:
        odd = self.window > 0 and self.window % 2 == 1
        require(odd, "an odd window: it has a middle", window=self.window)
        sizes = [x for x in (self.ratio, self.hidden, self.pool, self.trained) if x is not None]
        require(min(sizes) >= 1, "ratio, hidden, pool and trained >= 1", cfg=self)
        require(self.length is None or self.length > 1, "log N > 0", length=self.length)

    def averages(self, sides: Sides) -> Sides:
        """How many averages there are on each axis."""
        return tuple(side // self.ratio if self.pool is None else self.pool for side in sides)

    def counted_by(self, sides: Sides) -> Sides:
        return sides if self.trained is None else (self.trained,) * len(sides)


def fits(cfg: Config, sides: Sides) -> None:
    least = cfg.ratio if cfg.pool is None else cfg.pool
    require(min(sides) >= least, "each average has a place: side >= ratio, or pool", cfg=cfg, sides=sides)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    heads, key, width, near = dims["heads"], dims["key"], dims["width"], cfg.window**2

    def small(*shape: int, std: float = 0.02) -> Tensor:
        return torch.nn.init.trunc_normal_(torch.empty(shape), std=std)

    params = {
        "temperature": torch.full((heads,), math.log(math.expm1(START))),
        "query": small(heads, key),  # E
        "near_bias": small(heads, near, std=0.0004),
        "tokens": small(heads, key, near),  # T
        "token_bias": torch.zeros(heads, near),  # t
        "norm": torch.ones(width),
        "norm_bias": torch.zeros(width),
        "pool": torch.randn(width, width) * (2 / max(1, width)) ** 0.5,
        "pool_k": small(dims["kv_heads"], key, width),
        "pool_v": small(dims["kv_heads"], dims["value"], width),
        "mlp_1": small(cfg.hidden, 2),
        "mlp_2": small(heads, cfg.hidden),
    }
    linear = ("pool", "pool_k", "pool_v", "mlp_1", "mlp_2")
    return params | {f"{name}_bias": torch.zeros(params[name].shape[:-1]) for name in linear}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Place by place: the keys that it reads, near ones and averages, in one list."""
    heads, p = q.shape[1], {name: t.double() for name, t in call.params.items()}
    q_h, k_h, v_h, x = exact(q, heads_of(k, heads), heads_of(v, heads), call.x_of_keys)
    q_h, k_h = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (q_h, k_h))
    far_k, far_v = (heads_of(t, heads) for t in seen_from_afar(x, cfg, call.sides, p))
    steps = q_h.new_tensor(steps_to(call.sides, cfg.averages(call.sides), cfg.counted_by(call.sides)))
    hidden = (steps @ p["mlp_1"].mT + p["mlp_1_bias"]).relu()  # [N, P, hidden]
    bias, out = (hidden @ p["mlp_2"].mT + p["mlp_2_bias"]).mT, []  # [N, H, P]
    temperature = (1 + p["temperature"].exp()).log()[:, None]
    for i in range(q.shape[2]):
        places, there = window_of(i, call.sides, cfg.window)
        slots = [slot for slot, on in enumerate(there) if on]
        near = [places[slot] for slot in slots]
        n = len(near) + far_k.shape[2] if cfg.length is None else cfg.length
        keys, values = torch.cat([k_h[:, :, near], far_k], dim=2), torch.cat([v_h[:, :, near], far_v], dim=2)
        s = (keys @ (q_h[:, :, i] + p["query"])[..., None])[..., 0] * temperature * math.log(n)
        a = (s + torch.cat([p["near_bias"][:, slots], bias[i]], dim=1)).softmax(-1)
        learned = torch.einsum("bhd,hds->bhs", q_h[:, :, i], p["tokens"][..., slots])
        learned = learned + p["token_bias"][:, slots]
        weights = torch.cat([a[..., : len(near)] + learned, a[..., len(near) :]], dim=-1)
        out.append((weights[..., None] * values).sum(2))
    return torch.stack(out, dim=2).to(v.dtype), None


def seen_from_afar(x: Tensor, cfg: Config, sides: Sides, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys [B, G, P, D] of length 1 and values [B, G, P, E] of the averages."""
    bent = F.gelu(x @ p["pool"].mT + p["pool_bias"]).unflatten(1, sides)
    parts = cells(sides, cfg.averages(sides))
    means = torch.stack([bent[:, rows, columns].mean((1, 2)) for rows, columns in parts], dim=1)
    means = means - means.mean(-1, keepdim=True)
    means = means / (means.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm"] + p["norm_bias"]
    k, v = (means[:, None] @ p[name].mT + p[f"{name}_bias"][:, None] for name in ("pool_k", "pool_v"))
    return k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12), v


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Near scores and sums by shifted images, averages by matrix products, one softmax over both."""
    sides, p = call.sides, {name: at_least_float32(t) for name, t in call.params.items()}
    asked, keys = (F.normalize(at_least_float32(t), dim=-1) for t in (q, k))
    far_k, far_v = pooled(call.x_of_keys, cfg, sides, call.params["pool"], p)
    there = inside(sides, cfg.window, device=q.device)  # [w², N]
    count = there.sum(0) + far_k.shape[2] if cfg.length is None else torch.tensor(cfg.length)
    log_n = count.to(asked).log()[..., None]
    sharp = (asked + p["query"][:, None]) * F.softplus(p["temperature"])[:, None, None] * log_n
    s_near = window_scores(sharp, keys, sides, cfg.window) + p["near_bias"][..., None]
    s_near = s_near.masked_fill(~there, -torch.inf).mT  # [B, H, N, w²]

    def mlp(steps: Tensor) -> Tensor:
        return F.linear(F.linear(steps, p["mlp_1"], p["mlp_1_bias"]).relu(), p["mlp_2"], p["mlp_2_bias"])

    bias = continuous_bias(mlp, sides, cfg.averages(sides), cfg.counted_by(sides), asked)  # [H, N, P]
    s_far = matmul(sharp, per_query_head(far_k, q.shape[1]).mT) + bias
    weights = torch.cat([s_near, s_far], dim=-1).softmax(-1)
    a_near, a_far = weights[..., : len(there)], weights[..., len(there) :]
    learned = asked @ p["tokens"] + p["token_bias"][:, None]
    out = window_sums((a_near + learned).mT, v, sides, cfg.window) + mix(a_far, far_v)
    return out.to(v.dtype), None


def pooled(
    x: Tensor, cfg: Config, sides: Sides, weight: Tensor, p: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys [B, G, P, D] of length 1 and values [B, G, P, E] of the averages, in float32 at least."""
    bent = F.gelu(at_least_float32(matmul(x, weight.mT)) + p["pool_bias"])
    means = as_tokens(F.adaptive_avg_pool2d(as_image(bent, sides), cfg.averages(sides)))
    means = F.layer_norm(means, means.shape[-1:], p["norm"], p["norm_bias"])
    k, v = (
        torch.einsum("bpc,gdc->bgpd", means, p[name]) + p[f"{name}_bias"][:, None]
        for name in ("pool_k", "pool_v")
    )
    return F.normalize(k, dim=-1), v


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    needs_x=True,
    patterns=("self",),
    unsupported=dict.fromkeys(
        ("causal_self", "cross", "causal_cross"), "averages are of an image that attends to itself"
    ),
    grid=OnGrid(fits),
    order_aware=True,
    test_settings=(
        {"ratio": 1, "hidden": 4, "trained": 3},
        {"pool": 2, "window": 5, "hidden": 3, "length": 30.0, "trained": 5},
    ),
    exempt={"neutral": "cosines times log N, beside weights that no softmax saw: never plain softmax"},
    card=Card(
        title="Aggregated attention (TransNeXt)",
        paper="arXiv:2311.17132",
        year=2023,
        idea="one softmax over a place's window and averages of the whole image, scores scaled by log N",
        cost="O(N·w²·(D + E) + N²/r²·(D + E)) time for averages of r x r places, O(N) for a fixed number of them",
        state="none",
        needs=("cnn-features", "vit"),
        lineage=("softmax", "fused_neighborhood_attention"),
        caveat=(
            "the released layer projects averages with the k, v matrix of the pixels; here they have their own "
            "(pool_k, pool_v), as a page gets q, k and v made. Its sizes are fixed when it is built; here log N and "
            "steps follow the image, and `trained` counts steps as at training. On an axis of one place steps are 0 "
            "(there 0/0). Its last stage, full attention with the same scores, and its ConvGLU are the model's"
        ),
    ),
)
