"""LinFusion: non-causal linear attention whose sums are means, so that an image of more pixels looks the same to it.

    q' = elu(q + f_q(x)) + 1        f(x) = W_out LeakyReLU(LayerNorm(W_in x)), learned; q = W_q x, k = W_k x
    k' = elu(k + f_k(x)) + 1
    o_i = q'_i (Σ_j k'_jᵀ v_j / n) / (q'_i·(Σ_j k'_j / n) + eps)

over the n keys that are there, in causal_self over those up to i, as running means. The paper adds its correction to
the layer's input, W_q (x + f(x)); as W_q is linear that is q + W_q f(x), and W_q joins the correction's last map.

Worked by hand, without correction: query 0 has q' = 1, keys 0 and 2 have k' = 1 and 3, values are 4 and 8: the means
are 14 and 2, and 14 / (2 + 0.0001) = 6.9997. Each token twice leaves the means as they are.

>>> import torch
>>> q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, -1, 1) for x in ([0.0], [0.0, 2.0], [4.0, 8.0]))
>>> round(reference(q, k, v, Config(correct=False), Call("cross"))[0].item(), 4)
6.9997
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, at_least_float32, elu_plus_one, exact, heads_of, quotient, recurrence, rounded


@dataclass(frozen=True)
class Config:
    correct: bool = True  # whether queries and keys get a learned correction of the layer's input
    hidden: int | None = None  # width of the correction; None: the layer's
    eps: float = 1e-4  # added to the denominator
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.eps > 0 and self.chunk >= 1, "eps > 0 and chunk >= 1", eps=self.eps, chunk=self.chunk)
        require(self.hidden is None or self.hidden >= 1, "hidden >= 1, or None", hidden=self.hidden)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    if not cfg.correct:
        return {}
    width, hidden, params = dims["width"], cfg.hidden or dims["width"], {}
    for name, heads in (("q", dims["heads"]), ("k", dims["kv_heads"])):
        params[f"{name}_in"] = torch.randn(hidden, width) * width**-0.5
        params[f"{name}_in_bias"] = torch.zeros(hidden)
        params[f"{name}_norm"], params[f"{name}_norm_bias"] = torch.ones(hidden), torch.zeros(hidden)
        params[f"{name}_out"] = torch.randn(heads * dims["key"], hidden) * hidden**-0.5 / 2
        params[f"{name}_out_bias"] = torch.zeros(heads * dims["key"])
    return params


def f(x: Tensor, name: str, heads: int, params: Mapping[str, Tensor]) -> Tensor:
    """The correction as it reads, in float64: [B, n, C] -> [B, heads, n, D]."""
    p = {part.removeprefix(f"{name}_"): t.double() for part, t in params.items()}
    y = x.double() @ p["in"].T + p["in_bias"]
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y * p["norm"] + p["norm_bias"]
    y = torch.where(y > 0, y, 0.01 * y) @ p["out"].T + p["out_bias"]
    return torch.stack(y.chunk(heads, dim=-1), dim=1)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    heads, (query, key, value) = q.shape[1], exact(q, k, heads_of(v, q.shape[1]))
    if cfg.correct:
        query = query + f(call.x_of_queries[:, -q.shape[2] :], "q", heads, call.params)
        key = key + f(call.x_of_keys, "k", k.shape[1], call.params)
    query, key = (torch.where(t > 0, t + 1, t.clamp(max=0).exp()) for t in (query, heads_of(key, heads)))

    def write(state: tuple, j: int) -> tuple:
        s, z, n = state
        return s + key[:, :, j, :, None] * value[:, :, j, None], z + key[:, :, j], n + 1

    def read(state: tuple, i: int) -> Tensor:
        s, z, n = state
        values, keys = quotient(s, n[..., None, None]), quotient(z, n[..., None])
        total = (query[:, :, i] * keys).sum(-1, keepdim=True) + cfg.eps
        return torch.einsum("bhd,bhde->bhe", query[:, :, i], values) / total

    zero = q.new_zeros(*q.shape[:2], k.shape[3], v.shape[3] + 1), q.new_zeros(q.shape[:2])
    sums, n = exact(*(zero if call.initial_state is None else call.initial_state))
    begin = sums[..., :-1], sums[..., -1], n
    out, end = recurrence(begin, write, read, q.shape[2], k.shape[2], call)
    return rounded(out, None if end is None else (torch.cat([end[0], end[1][..., None]], -1), end[2]), v)


def corrected(t: Tensor, x: Tensor, name: str, params: Mapping[str, Tensor]) -> Tensor:
    """t + f(x), [B, heads, n, D]; in float32 at least, as e^t feels what bfloat16 would round away."""
    w = {part: at_least_float32(p) for part, p in params.items()}
    inner = F.linear(at_least_float32(x), w[f"{name}_in"], w[f"{name}_in_bias"])
    inner = F.layer_norm(inner, inner.shape[-1:], w[f"{name}_norm"], w[f"{name}_norm_bias"])
    change = F.linear(F.leaky_relu(inner), w[f"{name}_out"], w[f"{name}_out_bias"])
    return at_least_float32(t) + change.unflatten(-1, (t.shape[1], -1)).transpose(1, 2)


def counts(q: Q, k: K, call: Call) -> tuple[Tensor, Tensor]:
    """(keys behind each query [B, H, N|1, 1], keys so far [B, H])."""
    key_mask = k.new_ones(1, 1, k.shape[2], dtype=torch.bool) if call.key_mask is None else call.key_mask
    count = key_mask.to(at_least_float32(k).dtype).cumsum(2).expand(k.shape[0], q.shape[1], -1)
    count = count if call.initial_state is None else count + call.initial_state[1][..., None]
    return count[:, :, -q.shape[2] if call.pattern == "causal_self" else -1 :, None], count[:, :, -1]


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    """A column of ones beside the values sums the keys; in a quotient of means their number cancels but for eps."""
    behind, so_far = counts(q, k, call)

    def finish(out: Tensor, sums: Tensor | None) -> tuple[Tensor, tuple | None]:
        total = out[..., -1:] + cfg.eps * behind
        mixed = out[..., :-1] / total.masked_fill(total == 0, 1)
        return mixed.to(v.dtype), None if sums is None else (sums, so_far)

    if cfg.correct:
        q = corrected(q, call.x_of_queries[:, -q.shape[2] :], "q", call.params)
        k = corrected(k, call.x_of_keys, "k", call.params)
    q, k = (elu_plus_one(at_least_float32(t)) for t in (q, k))
    values = torch.cat([at_least_float32(v), torch.ones_like(v[..., :1])], dim=-1)
    return Form(q, k, values, state=call.initial_state and call.initial_state[0], finish=finish)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    patterns=PATTERNS,
    needs_x=lambda cfg: cfg.correct,
    speed_settings=("chunk",),
    test_settings=({"correct": False}, {"hidden": 3, "eps": 0.5}),
    state_size=lambda cfg, dims, n: dims["heads"] * (dims["key"] * (dims["value"] + 1) + 1),
    exempt={"neutral": "no setting turns it into softmax attention"},
    card=Card(
        title="LinFusion",
        paper="LinFusion: 1 GPU, 1 Minute, 16K Image, arXiv:2409.02097",
        year=2024,
        idea="linear attention over means, not sums, so that a model distilled at one resolution serves a larger one",
        cost="O((N + M)·(D·E + C·hidden)) time",
        state="D·(E + 1) + 1 numbers per head, whatever the length",
        needs=("qkv", "x"),
        lineage=("linear_attention",),
        caveat=(
            "the correction is added after W_q and W_k, which is the paper's where they are linear maps of x; after "
            "a rotary position or a norm of q and k it is not. The paper has no causal form: causal_self takes the "
            "means over the tokens so far. The distillation from a softmax model is a recipe and not on this page"
        ),
    ),
)
