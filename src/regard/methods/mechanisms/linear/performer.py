"""Performer (FAVOR+): softmax's exponential of a product as an average over positive random features.

    e^{q·k} = E_w[ e^{w·q - |q|²/2} e^{w·k - |k|²/2} ],   w ~ N(0, I)        queries and keys times D^(-1/4) before
    φ(x)_r = e^{w_r·x - |x|²/2} / √m                                         m features, all positive
    o_t = Σ_{s<=t} (φ(q_t)·φ(k_s)) v_s / Σ_{s<=t} φ(q_t)·φ(k_s)

so φ(q)·φ(k) is e^{q·k/√D} on average, and nearer to it the larger m is; blocks of D rows of w are orthogonal to each
other, which makes the error smaller at the same m. Rows have the lengths of normal draws, so that every one of them is
N(0, I) and nothing is biased. The largest exponent c of the keys up to t is taken out, and the sums are rescaled when
it grows, as in an online softmax; queries lose their own largest. No key that comes later is looked at, and
the state is (S [m, E + 1], c). `reference` keeps the logarithm of every feature's sum and the mean of the values under
it; `fast` keeps the sums, and a weight below 1e-30 of the largest that a query could have given counts as nothing.

Worked by hand: w = 1 and q = k = 1 with D = 1 have φ = e^(1 - 1/2), so φ(q)·φ(k) = e; a key 0 has φ(q)·φ(0) = e^(1/2).

>>> q, k, v = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.0], [1.0, 0.0], [1.0, 0.0]))
>>> round(reference(q, k, v, Config(), Call("cross", params={"w": torch.ones(1, 1)}))[0].item(), 5)
0.62246
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import Form, at_least_float32, exact, heads_of, per_query_head, quotient, recurrence, rounded

# added to the denominator: e^-69 of the largest product that a query could have had
TINY = 1e-30


@dataclass(frozen=True)
class Config:
    features: int = 256  # m
    # whether D rows of w at a time are orthogonal; False: normal draws, less exact at the same m
    orthogonal: bool = True
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        require(self.features >= 1, "features >= 1", features=self.features)
        require(self.chunk >= 1, "chunk >= 1", chunk=self.chunk)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    """w [m, D], drawn and not learned in the paper; the same for all heads."""
    m, width = cfg.features, dims["key"]
    draw = torch.randn(m, width)
    if not cfg.orthogonal:
        return {"w": draw}
    blocks = torch.randn(-(-m // width), width, width)
    axes, triangle = torch.linalg.qr(blocks)
    # without these signs the axes are not uniform, and φ is biased
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    rows = (axes * signs).flatten(0, 1)[:m]
    return {"w": rows * draw.norm(dim=-1, keepdim=True)}


def lowest(like: Tensor) -> float:
    """c where no key has been seen, in the dtype of the sums."""
    return torch.finfo(torch.promote_types(like.dtype, torch.float32)).min / 4


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, tuple | None]:
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    w, q_h, k_h, v_h = exact(call.params["w"], q, heads_of(k, heads), heads_of(v, heads))

    def log_phi(x: Tensor) -> Tensor:
        x = x / x.shape[-1] ** 0.25
        return torch.einsum("md,bhd->bhm", w, x) - (x * x).sum(-1, keepdim=True) / 2

    def write(state: tuple, t: int) -> tuple:
        mean, log_sum, c = state
        b = log_phi(k_h[:, :, t])
        total = torch.logaddexp(log_sum, b)
        mean = mean + (b - total).exp()[..., None] * (v_h[:, :, t, None] - mean)
        return mean, total, torch.maximum(c, b.detach().amax(-1))

    def read(state: tuple, i: int) -> Tensor:
        mean, log_sum, _ = state
        weight = log_phi(q_h[:, :, i]) + log_sum
        # cancels; keeps the exponentials below 1
        top = weight.detach().amax(-1, keepdim=True)
        e = (weight - top.masked_fill(top == -torch.inf, 0)).exp()
        return quotient(torch.einsum("bhm,bhme->bhe", e, mean), e.sum(-1, keepdim=True))

    s, c = call.initial_state or nothing(v_h, len(w), lowest(v))
    out, end = recurrence(logarithms(*exact(s, c)), write, read, n, m, call)
    return rounded(out, end if end is None else sums(*end), v)


def nothing(v: Tensor, features: int, low: float) -> tuple[Tensor, Tensor]:
    """The state (S, c) at the start of a text."""
    batch, heads, _, width = v.shape
    return v.new_zeros(batch, heads, features, width + 1), v.new_full((batch, heads), low)


def logarithms(s: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean value under each feature [B, H, m, E], logarithm of the feature's sum [B, H, m], c) of a state."""
    z = s[..., -1]
    log_z = torch.where(z > 0, z, 1.0).log().masked_fill(z <= 0, -torch.inf)
    return quotient(s[..., :-1], z[..., None]), log_z + c[..., None], c


def sums(mean: Tensor, log_sum: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The state (S, c) of those logarithms."""
    z = (log_sum - c[..., None]).exp()[..., None]
    return torch.cat([z * mean, z], dim=-1), c


def exponents(x: Tensor, w: Tensor) -> Tensor:
    """[B, H, n, m] w·x - |x|²/2 of x times D^(-1/4)."""
    x = at_least_float32(x) * x.shape[-1] ** -0.25
    return x @ w.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2


def running_top(b: Tensor, before: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """(c [B, H, M] that the sums are taken out by at each key, log decays of the sums where it grows, or None)."""
    # what is taken out of both sums changes no output
    top = b.detach().amax(-1)
    if call.key_mask is not None:
        top = top.masked_fill(~call.key_mask, lowest(top))
    if call.pattern != "causal_self":
        return top.amax(-1, keepdim=True).expand_as(top), None
    c = torch.maximum(top.cummax(-1).values, before[..., None])
    fade = torch.cat([before[..., None], c[..., :-1]], dim=-1) - c
    return c, fade.clamp(min=-60)


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    a, b = (exponents(t, call.params["w"]) for t in (q, k))
    b = per_query_head(b, q.shape[1]).expand(-1, q.shape[1], -1, -1)
    kv, before = call.initial_state or (None, b.new_full(b.shape[:2], lowest(v)))
    c, fade = running_top(b, before.to(b.dtype), call)
    queries = (a - a.detach().amax(-1, keepdim=True)).exp()
    keys = (b - c[..., None]).clamp(max=0).exp()

    def finish(out: Tensor, end: Tensor | None) -> tuple[Out, tuple | None]:
        return out.to(v.dtype), None if end is None else (end, c[..., -1])

    return Form(queries, keys, at_least_float32(v), fade, normalise=True, eps=TINY, state=kv, finish=finish)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    patterns=PATTERNS,
    speed_settings=("chunk",),
    test_settings=({"features": 3, "orthogonal": False},),
    state_size=lambda cfg, dims, n: dims["heads"] * (cfg.features * (dims["value"] + 1) + 1),
    exempt={
        "neutral": "random features equal softmax on average only; the error falls as 1/√m and is 0 for no finite m"
    },
    card=Card(
        title="Performer (FAVOR+)",
        paper="Rethinking Attention with Performers (ICLR 2021)",
        year=2021,
        idea="positive orthogonal random features whose products are softmax's weights on average",
        cost="O((N + M)·m·(D + E)) time",
        state="m·(E + 1) + 1 numbers per head, whatever the length",
        needs=("qkv",),
        lineage=("softmax", "linear_attention"),
        caveat=(
            "released code takes the largest exponent over all keys, those to come too, and adds 1e-4 to all features, "
            "which pulls weights towards the average; here neither. The error grows as e^{|q + k|²}: scores of some "
            "tens need more features than there are"
        ),
    ),
)
