"""LAWCAT: linear attention with a short convolution over time on queries and keys, a forget gate and a normaliser.

    q̃_t = Σ_{i=0..r} c_i ⊙ q_{t-i}                 k̃ likewise: depthwise, causal, r + 1 = 4 taps
    S_t = g_t S_{t-1} + φ(k̃_t)ᵀ v_t                z_t = g_t z_{t-1} + φ(k̃_t)
    o_t = φ(q̃_t) S_t / (φ(q̃_t) z_t)                φ(x) = [softmax(xW), softmax(-xW)]
    log g_t = log σ(w·x_t + b) / 16                 x the layer's input; one gate per KV head

Softmax can look for a run of tokens because layers below have mixed neighbours; the convolution gives the linear kernel
that group in the layer itself. The normaliser makes outputs means of values at any length, which is what lets a model
that was distilled on 1K tokens read 20K. W is shared by queries and keys. The convolutions begin as the identity, so
the state also holds the last r queries and keys.

A hidden token is as if it were not there: the taps pass it over, the tails do not keep it. Queries are convolved over
their own text in its order in all patterns, so cross and causal_cross are the same numbers; self weighs both ways.

Worked by hand: taps (1/2 now, 1/2 before), keys log 4 and log 4, queries 0: k̃ is log 2 and log 4; W = 1 and one
feature each way are softmaxes over one number, so φ = (1, 1), every weight is equal and values 2, 4 give 3.

>>> import math, torch
>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([0.0, 0.0], [math.log(4)] * 2, [2.0, 4.0]))
>>> convolved(k, torch.tensor([[[0.5], [0.5]]]), torch.zeros(1, 1, 1, 1), None)[0].exp().flatten()
tensor([2., 4.])
>>> params = init(Config(kernel=2, gate=False), {"heads": 1, "kv_heads": 1, "key": 1, "value": 1, "width": 1})
>>> round(reference(q, k, v, Config(kernel=2, gate=False), Call(params=params))[0][0, 0, 1].item(), 3)
3.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, at_least_float32, exact, heads_of, per_query_head, quotient, recurrence, rounded


@dataclass(frozen=True)
class Config:
    kernel: int = 4  # taps; 1 leaves the convolution out
    normalise: bool = True  # False: no denominator, outputs times a learned gain per head
    gate: bool = True  # False: nothing is forgotten
    width: int | None = None  # features each way; None: as wide as the keys
    slowness: float = 16.0  # the gate's logarithm is divided by it, as in gated linear attention
    bias: float = 5.0  # where the gate begins: a half-life of 1,650 tokens
    eps: float = 1e-12  # added to the denominator
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.kernel >= 1, "kernel >= 1", kernel=self.kernel)
        require(self.width is None or self.width >= 1, "width >= 1", width=self.width)
        require(self.slowness > 0, "slowness > 0", slowness=self.slowness)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    heads, groups, key = dims["heads"], dims["kv_heads"], dims["key"]
    params = {"w": torch.eye(key, cfg.width or key).repeat(groups, 1, 1)}
    if cfg.kernel > 1:
        # tap i is that of the token i before
        taps = F.pad(torch.ones(1, key), (0, 0, 0, cfg.kernel - 1))
        params |= {"conv_q": taps.repeat(heads, 1, 1), "conv_k": taps.repeat(groups, 1, 1)}
    if cfg.gate:
        params |= {"w_g": torch.zeros(groups, dims["width"]), "b_g": torch.full((groups,), cfg.bias)}
    return params if cfg.normalise else params | {"gain": torch.full((heads,), 0.1)}


def state_heads(q: Q, k: K, call: Call) -> int:
    """Heads of the state's sums and keys: H where each query head sees, or has seen, keys of its own, else G."""
    by_head = call.key_mask is not None and call.key_mask.shape[1] > 1
    by_head = by_head or (call.initial_state is not None and call.initial_state[0].shape[1] > k.shape[1])
    return q.shape[1] if by_head else k.shape[1]


def convolved(t: Tensor, taps: Tensor, last: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(t̃ [B, h, n, D], the last r tokens that are there), token by token; zero where hidden."""
    token_mask = torch.ones_like(t[:1, :1, :, 0], dtype=torch.bool) if token_mask is None else token_mask
    rows = []
    for i in range(t.shape[2]):
        here, text = token_mask[:, :, i, None], torch.cat([last, t[:, :, i, None]], dim=2)  # [B, h, r + 1, D]
        rows.append(torch.where(here, (taps.flip(1) * text).sum(2), 0))
        last = torch.where(here[..., None], text[:, :, 1:], last)
    return torch.stack(rows, dim=2), last


def phi(t: Tensor, w: Tensor) -> Tensor:
    y = torch.einsum("bhnd,hdf->bhnf", t, w)
    up, down = (y - y.amax(-1, keepdim=True)).exp(), (y.amin(-1, keepdim=True) - y).exp()
    return torch.cat([up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)], dim=-1)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    n, m, heads, step, like = q.shape[2], k.shape[2], q.shape[1], q.shape[1] // state_heads(q, k, call), v
    q, k, v = exact(q, heads_of(k, heads), F.pad(heads_of(v, heads), (0, int(cfg.normalise)), value=1.0))
    p = {name: heads_of(t.double()[None], heads)[0] for name, t in call.params.items()}
    tail = q.new_zeros(*q.shape[:2], cfg.kernel - 1, q.shape[3])
    begin = call.initial_state or (q.new_zeros(*q.shape[:2], 2 * p["w"].shape[2], v.shape[3]), tail, tail)
    s, last_q, last_k = exact(*(heads_of(t, heads) for t in begin))
    if cfg.kernel > 1:
        query_mask = None if call.key_mask is None or call.cross else call.key_mask[..., m - n :]
        q, last_q = convolved(q, p["conv_q"], last_q, query_mask)
        k, last_k = convolved(k, p["conv_k"], last_k, call.key_mask)
    q, k, gate = phi(q, p["w"]), phi(k, p["w"]), q.new_ones(1, heads, m)
    if cfg.gate:
        score = torch.einsum("bmc,hc->bhm", call.x_of_keys.double(), p["w_g"]) + p["b_g"][:, None]
        gate = score.sigmoid() ** (1 / cfg.slowness)

    def write(s: Tensor, t: int) -> Tensor:
        return gate[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None]

    def read(s: Tensor, i: int) -> Tensor:
        o = torch.einsum("bhf,bhfe->bhe", q[:, :, i], s)
        return quotient(o[..., :-1], o[..., -1:] + cfg.eps) if cfg.normalise else o * p["gain"][:, None]

    out, end = recurrence(s, write, read, n, m, call, two_sided=True)
    return rounded(out, None if end is None else (end[:, ::step], last_q, last_k[:, ::step]), like)


def convolved_at_once(t: Tensor, taps: Tensor, last: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `convolved`: hidden tokens are sorted to the front, one depthwise convolution, and back."""
    r, (batch, heads, n, width) = taps.shape[1] - 1, t.shape
    text = torch.cat([last.to(t.dtype), t], dim=2)
    if mask is not None:
        held = F.pad(mask.expand(batch, heads, n), (r, 0), value=True)
        order = held.int().argsort(dim=-1, stable=True)[..., None].expand_as(text)
        text = text.masked_fill(~held[..., None], 0).gather(2, order)
    kernel = taps.flip(1).mT.flatten(0, 1)[:, None]  # [h·D, 1, r + 1]
    rows = F.conv1d(text.mT.flatten(1, 2), kernel, groups=heads * width).unflatten(1, (heads, width)).mT
    if mask is not None:
        rows = torch.zeros_like(text).scatter(2, order[:, :, r:], rows)[:, :, r:]
    # not a part that keeps the text in memory
    return rows, text[:, :, n:].clone()


def features(t: Tensor, w: Tensor) -> Tensor:
    y = t @ w
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


def spread(t: Tensor, heads: int) -> Tensor:
    """[B, G, ...] -> [B, heads, ...]"""
    return per_query_head(t, heads).expand(-1, heads, *t.shape[2:])


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    n, heads, held = q.shape[2], q.shape[1], state_heads(q, k, call)
    q, k = at_least_float32(q), at_least_float32(spread(k, held))
    p = {name: t.to(q.dtype)[None] for name, t in call.params.items()}
    tails = (t.new_zeros(*t.shape[:2], cfg.kernel - 1, t.shape[3]) for t in (q, k))
    s, last_q, last_k = call.initial_state or (None, *tails)
    s, last_k = None if s is None else spread(s, heads), spread(last_k, held)
    if cfg.kernel > 1:
        query_mask = None if call.key_mask is None or call.cross else call.key_mask[..., -n:]
        q, last_q = convolved_at_once(q, p["conv_q"][0], last_q, query_mask)
        k, last_k = convolved_at_once(k, spread(p["conv_k"], held)[0], last_k, call.key_mask)
    gates = None
    if cfg.gate:
        score = call.x_of_keys.to(q.dtype) @ p["w_g"].mT + p["b_g"]
        gates = spread(F.logsigmoid(score).mT / cfg.slowness, heads)

    def finish(out: Tensor, end: Tensor | None) -> tuple[Tensor, tuple | None]:
        if not cfg.normalise:
            out = (at_least_float32(out) * p["gain"][..., None, None]).to(v.dtype)
        return out, None if end is None else (end[:, :: heads // held], last_q, last_k)

    phi_q, phi_k = features(q, spread(p["w"], heads)), features(k, spread(p["w"], held))
    return Form(phi_q, phi_k, v, gates, cfg.normalise, cfg.eps, s, finish)


def state_size(cfg: Config, dims: dict, n: int) -> int:
    memory = dims["kv_heads"] * 2 * (cfg.width or dims["key"]) * (dims["value"] + cfg.normalise)
    return memory + (cfg.kernel - 1) * dims["key"] * (dims["heads"] + dims["kv_heads"])


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    needs_x=lambda cfg: cfg.gate,
    patterns=PATTERNS,
    speed_settings=("chunk",),
    test_settings=(
        {"kernel": 3, "width": 3, "bias": 0.0},
        {"kernel": 1, "normalise": False},
        {"gate": False},
    ),
    state_size=state_size,
    exempt={
        "neutral": "no setting turns it into softmax attention",
        "queries": "the convolution mixes a query into the next ones: that is the method",
    },
    card=Card(
        title="LAWCAT",
        paper=(
            "LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution across Tokens for Long "
            "Context Modeling, arXiv:2509.18467"
        ),
        year=2025,
        idea="a short causal convolution on queries and keys, and a gate with a normaliser, make distilled linear "
        "attention retrieve beyond the length that it was distilled on",
        cost="O((N + M)·D·(F + E)) time, with F = D by default",
        state="2F·(E + 1) numbers per KV head, and 3·D for each query head and KV head, whatever the length",
        needs=("qkv", "x", "learned maps"),
        lineage=("hedgehog", "linear_attention"),
        caveat=(
            "the paper's summaries give the convolution, the shared map and the normaliser; the map's nonlinearity, "
            "here a softmax each way as in LoLCATs, and the gate, here GLA's with one number per KV head, are not in "
            "them, and the released code was not at hand. Queries and keys come as attention sees them, after rotary "
            "positions. Without the normaliser a gain per head, begun at 0.1, stands in its place"
        ),
    ),
)
