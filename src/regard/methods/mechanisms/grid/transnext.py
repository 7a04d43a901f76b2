"""Aggregated attention (TransNeXt): near places one by one and the whole image in averages, in one softmax.

    s_ij = (q̂_i + E)·k̂_j τ log N_i + b_ij    j in the w x w window of i (real places), or an average p of the image
    a_i  = softmax(s_i)                      over both together; N_i keys take part
    o_i  = Σ_near (a_ij + q̂_i·T_j + t_j) v_j + Σ_p a_ip v_p

q̂ and k̂ have length 1, τ = softplus of a parameter, one for each head. log N_i keeps the softmax as sharp on a larger
image: that is what a cosine with a fixed temperature loses. b is learned for each place of the window; for averages it is
an MLP of the steps to their middle, on a logarithmic scale, so that any size can be asked. T and t are weights of the
near values that no softmax has seen. Averages are of GELU(x W) after a norm; their keys and values are projected here.

Worked by hand on a 4 x 4 image, w = 3, averages of 2 x 2 places, all scores 0 and values 1 of near places, 0 of
averages: the corner reads 4 places and 4 averages, so it gets 4/8; an edge 6/10; the inside 9/13. The middles of the
averages lie at 0.5 and 2.5; from place 0 the first is -0.5/3·8 = -4/3 steps away, -log2(7/3)/3 = -0.4075.

>>> import torch
>>> dims = {"heads": 1, "kv_heads": 1, "key": 2, "value": 1, "width": 3}
>>> params = {name: torch.zeros_like(p) for name, p in init(Config(), dims).items()}
>>> q, x, v = torch.zeros(1, 1, 16, 2), torch.zeros(1, 16, 3), torch.ones(1, 1, 16, 1)
>>> out, _ = reference(q, q, v, Config(), Call("self", x=x, params=params, grid=(4, 4)))
>>> [round(o, 4) for o in out.flatten()[[0, 1, 5]].tolist()], [round(n / m, 4) for n, m in ((4, 8), (6, 10), (9, 13))]
([0.5, 0.6, 0.6923], [0.5, 0.6, 0.6923])
>>> [round(scaled(y - middle, 4), 4) for y, middle in ((0, 0.5), (0, 2.5), (3, 0.5))]
[-0.4075, -0.9795, 0.9795]
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
from regard.ops.grid import as_image, as_tokens, inside, window_scores, window_sums

START = 1 / 0.24  # of the temperature
SPAN = 8  # steps over a whole axis, whose logarithm is 1


@dataclass(frozen=True)
class Config:
    window: int = 3  # w
    ratio: int = 2  # places on each axis that an average is of
    pool: int | None = None  # averages on each axis, whatever the image; None: side // ratio
    trained: int | tuple[int, int] | None = None  # sides by which steps are counted; None: those of the image
    length: float | None = None  # N of log N for all; None: the keys that a query reads
    hidden: int = 512  # of the MLP

    def __post_init__(self) -> None:
        require(self.window % 2 == 1, "an odd window: it has a middle", window=self.window)
        require(self.ratio >= 1 and (self.pool is None or self.pool >= 1), "averages of places", cfg=self)
        require(self.length is None or self.length > 1, "log N > 0", length=self.length)


def fits(cfg: Config, sides: Sides) -> None:
    least = cfg.ratio if cfg.pool is None else cfg.pool
    require(min(sides) >= least, "each average has a place: side >= ratio, or pool", cfg=cfg, sides=sides)


def averages(cfg: Config, sides: Sides) -> tuple[int, int]:
    """How many averages there are on each axis."""
    return (sides[0] // cfg.ratio, sides[1] // cfg.ratio) if cfg.pool is None else (cfg.pool, cfg.pool)


def counted_by(cfg: Config, sides: Sides) -> Sides:
    if cfg.trained is None:
        return sides
    return cfg.trained if isinstance(cfg.trained, tuple) else (cfg.trained, cfg.trained)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    heads, groups, width, near = dims["heads"], dims["kv_heads"], dims["width"], cfg.window**2

    def small(*shape: int, std: float = 0.02) -> Tensor:
        return torch.nn.init.trunc_normal_(torch.empty(shape), std=std)

    return {
        "temperature": torch.full((heads,), math.log(math.expm1(START))),
        "query": small(heads, dims["key"]),  # E
        "near_bias": small(heads, near, std=0.0004),
        "tokens": small(heads, dims["key"], near),  # T
        "token_bias": torch.zeros(heads, near),  # t
        "pool": torch.randn(width, width) * (2 / max(1, width)) ** 0.5,
        "pool_bias": torch.zeros(width),
        "norm": torch.ones(width),
        "norm_bias": torch.zeros(width),
        "pool_k": small(groups, dims["key"], width),
        "pool_k_bias": torch.zeros(groups, dims["key"]),
        "pool_v": small(groups, dims["value"], width),
        "pool_v_bias": torch.zeros(groups, dims["value"]),
        "mlp_1": small(cfg.hidden, 2),
        "mlp_1_bias": torch.zeros(cfg.hidden),
        "mlp_2": small(heads, cfg.hidden),
        "mlp_2_bias": torch.zeros(heads),
    }


def scaled(steps: float, side: int) -> float:
    """Steps on an axis, counted by this side, on a scale on which the whole axis is about 1."""
    part = steps / max(1, side - 1) * SPAN
    return math.copysign(math.log2(1 + abs(part)) / math.log2(SPAN), part)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Place by place: the keys that it reads, near ones and averages, in one list."""
    heads, (height, width) = q.shape[1], call.sides
    p = {name: t.double() for name, t in call.params.items()}
    q_h, k_h, v_h, x = exact(q, heads_of(k, heads), heads_of(v, heads), call.x_of_keys)
    q_h, k_h = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (q_h, k_h))
    pooled_k, pooled_v, middles = seen_from_afar(x, heads, cfg, call.sides, p)  # [B, H, P, D], [B, H, P, E]
    far = steps_to(middles, cfg, call.sides, p)  # [N, H, P]
    half, out = cfg.window // 2, []
    temperature = (1 + p["temperature"].exp()).log()[:, None]
    for i in range(height * width):
        y, x0 = divmod(i, width)
        box = [(y + a, x0 + b) for a in range(-half, half + 1) for b in range(-half, half + 1)]
        slots = [s for s, (a, b) in enumerate(box) if 0 <= a < height and 0 <= b < width]
        near = [box[s][0] * width + box[s][1] for s in slots]
        n = len(near) + len(middles) if cfg.length is None else cfg.length
        keys = torch.cat([k_h[:, :, near], pooled_k], dim=2)
        s = (keys @ (q_h[:, :, i] + p["query"])[..., None])[..., 0] * temperature * math.log(n)
        a = (s + torch.cat([p["near_bias"][:, slots], far[i]], dim=1)).softmax(-1)
        learned = torch.einsum("bhd,hds->bhs", q_h[:, :, i], p["tokens"][..., slots]) + p["token_bias"][:, slots]
        weights = torch.cat([a[..., : len(near)] + learned, a[..., len(near) :]], dim=-1)
        out.append((weights[..., None] * torch.cat([v_h[:, :, near], pooled_v], dim=2)).sum(2))
    return torch.stack(out, dim=2).to(v.dtype), None


def steps_to(middles: list[tuple[float, float]], cfg: Config, sides: Sides, p: dict[str, Tensor]) -> Tensor:
    """[N, H, P]: what the MLP says of the steps from each place to the middle of each average."""
    by = counted_by(cfg, sides)
    places = [(y, x) for y in range(sides[0]) for x in range(sides[1])]
    steps = [[[scaled(y - a, by[0]), scaled(x - b, by[1])] for a, b in middles] for y, x in places]
    hidden = (p["mlp_1"].new_tensor(steps) @ p["mlp_1"].mT + p["mlp_1_bias"]).relu()  # [N, P, hidden]
    return (hidden @ p["mlp_2"].mT + p["mlp_2_bias"]).mT


def seen_from_afar(
    x: Tensor, heads: int, cfg: Config, sides: Sides, p: dict[str, Tensor]
) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Keys and values of the averages, and where their middles lie."""
    bent = F.gelu(x @ p["pool"].mT + p["pool_bias"]).unflatten(1, sides)
    spans = [
        [(j * side // count, -(-(j + 1) * side // count)) for j in range(count)]
        for side, count in zip(sides, averages(cfg, sides), strict=True)
    ]
    cells = [(rows, columns) for rows in spans[0] for columns in spans[1]]
    means = torch.stack([bent[:, slice(*rows), slice(*columns)].mean((1, 2)) for rows, columns in cells], dim=1)
    means = means - means.mean(-1, keepdim=True)
    means = means / (means.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm"] + p["norm_bias"]
    k, v = (
        torch.einsum("bpc,gdc->bgpd", means, p[name]) + p[f"{name}_bias"][:, None] for name in ("pool_k", "pool_v")
    )
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    middles = [((a + b - 1) / 2, (c + d - 1) / 2) for (a, b), (c, d) in cells]
    return heads_of(k, heads), heads_of(v, heads), middles


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    """Near scores and sums by shifted images, averages by matrix products, one softmax over both."""
    sides, heads, near = call.sides, q.shape[1], cfg.window**2
    p = {name: at_least_float32(t) for name, t in call.params.items()}
    asked, keys = (F.normalize(at_least_float32(t), dim=-1) for t in (q, k))
    far_k, far_v = pooled(call.x_of_keys, cfg, sides, call.params)
    there = inside(sides, cfg.window, device=q.device)  # [w², N]
    count = there.sum(0).to(asked.dtype) + far_k.shape[2] if cfg.length is None else asked.new_tensor(cfg.length)
    sharp = (asked + p["query"][:, None]) * F.softplus(p["temperature"])[:, None, None] * count.log()[..., None]
    s_near = window_scores(sharp, keys, sides, cfg.window) + p["near_bias"][..., None]
    s_near = s_near.masked_fill(~there, -torch.inf).mT  # [B, H, N, w²]
    s_far = matmul(sharp, per_query_head(far_k, heads).mT) + far_bias(cfg, sides, p)
    a_near, a_far = torch.cat([s_near, s_far], dim=-1).softmax(-1).split([near, s_far.shape[-1]], dim=-1)
    learned = asked @ p["tokens"] + p["token_bias"][:, None]
    out = window_sums((a_near + learned).mT, v, sides, cfg.window) + mix(a_far, far_v)
    return out.to(v.dtype), None


def pooled(x: Tensor, cfg: Config, sides: Sides, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys [B, G, P, D] of length 1 and values [B, G, P, E] of the averages, in float32 at least."""
    p = {name: at_least_float32(t) for name, t in params.items()}
    bent = F.gelu(at_least_float32(matmul(x, params["pool"].mT)) + p["pool_bias"])
    means = as_tokens(F.adaptive_avg_pool2d(as_image(bent, sides), averages(cfg, sides)))
    means = F.layer_norm(means, means.shape[-1:], p["norm"], p["norm_bias"])[:, None]
    k, v = (means @ p[name].mT + p[f"{name}_bias"][:, None] for name in ("pool_k", "pool_v"))
    return F.normalize(k, dim=-1), v


def far_bias(cfg: Config, sides: Sides, p: dict[str, Tensor]) -> Tensor:
    """[H, N, P]: the MLP is asked once for every number of steps, of which few differ, and looked up."""
    lines, index = [], []
    for side, count, by in zip(sides, averages(cfg, sides), counted_by(cfg, sides), strict=True):
        j = torch.arange(count, device=p["mlp_1"].device)
        begin, end = j * side // count, -(-(j + 1) * side // count)
        # twice the steps, which are whole or halves; of averages of equal parts all are one or the other
        twice = 2 * torch.arange(side, device=j.device)[:, None] - (begin + end - 1)  # [side, count]
        most, each = 2 * side - 1 - -(-side // count), 2 if side % count == 0 else 1
        steps = torch.arange(-most, most + 1, each, device=j.device).to(p["mlp_1"].dtype)
        part = steps / (2 * max(1, by - 1)) * SPAN
        lines.append(part.sign() * (1 + part.abs()).log2() / math.log2(SPAN))
        index.append((twice + most) // each)
    table = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)  # [steps of y, of x, 2]
    bias = (table @ p["mlp_1"].mT + p["mlp_1_bias"]).relu() @ p["mlp_2"].mT + p["mlp_2_bias"]
    at = index[0][:, None, :, None] * len(lines[1]) + index[1][None, :, None]  # [y, x, P of y, P of x]
    return F.embedding(at, bias.flatten(0, 1)).flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    needs_x=True,
    patterns=("self",),
    unsupported=dict.fromkeys(
        ("causal_self", "cross", "causal_cross"), "averages of the image are for an image that attends to itself"
    ),
    grid=OnGrid(fits),
    order_aware=True,
    test_settings=(
        {"window": 1, "ratio": 1, "hidden": 4, "trained": 3},
        {"pool": 2, "window": 5, "hidden": 3, "length": 30.0, "trained": (4, 5)},
    ),
    exempt={"neutral": "scores are cosines times log N, beside learned weights that no softmax saw: never plain softmax"},
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
            "(pool_k, pool_v), as a page gets q, k and v made. Its sizes are fixed when it is built; here log N and the "
            "steps follow the image, `trained` counts steps as at training. An axis of one place has steps of 0 (there "
            "0/0). Its last stage, full attention with the same scores, and its channel mixer (ConvGLU) are the model's"
        ),
    ),
)
