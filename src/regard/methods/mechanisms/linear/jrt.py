"""Prefix linear attention (JRT-RNN): the prompt is read twice, once all at once and once in order, into one state.

    S_i = Σ_{j<=i} φ(k_j)ᵀ [v_j, 1] + Σ_{j<=M} φ(k^e_j)ᵀ [v^e_j, 1]       k^e = x W_k^e, v^e = x W_v^e
    o_i = φ(q_i) S_i, its last column the one denominator of both sums
    φ(q)·φ(k) = 1 + s + s²/2,  s = q·k / √D,  with 1 + D + D² features    the Taylor series of e^s; at least 1/2

A causal state has to choose what to keep before it is asked. Here every token of the first M, the prefix, is already
in the state when the first of them is read, so what is stored can depend on what follows. The prefix is the first M
tokens of the first call, those that are hidden not counted: of a prompt shorter than M, all of it. What comes with a
state is generated text and never joins the prefix. In self, cross and causal_cross the queries read both whole sums.

Worked by hand: q = 1, k = 0, v = 7 has weight 1; x = 1 gives k^e = 1, with weight 1 + 1 + 1/2, and v^e = 0: 7 / 3.5.

>>> import torch
>>> q, k, v = (torch.tensor(a).view(1, 1, 1, 1) for a in (1.0, 0.0, 7.0))
>>> params = {"k_enc": torch.ones(1, 1, 1), "v_enc": torch.zeros(1, 1, 1)}
>>> round(reference(q, k, v, Config(), Call(params=params, x=torch.ones(1, 1, 1)))[0].item(), 6)
2.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import PATTERNS, Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    Form,
    at_least_float32,
    dense_linear,
    exact,
    heads_of,
    per_query_head,
    quotient,
    rounded,
    shown,
    taylor,
)


@dataclass(frozen=True)
class Config:
    prefix: int = 1024  # M, tokens that are read all at once; 0: plain linear attention with Taylor features
    features: int = 16  # q and k that are wider are mapped down to it by params
    chunk: int = 64  # changes the speed, never the result

    def __post_init__(self) -> None:
        for name, least in {"prefix": 0, "features": 1, "chunk": 1}.items():
            require(getattr(self, name) >= least, f"{name} >= {least}", **{name: getattr(self, name)})


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    width, h, g = min(cfg.features, dims["key"]), dims["heads"], dims["kv_heads"]
    shapes = {}
    if cfg.prefix:
        shapes |= {"k_enc": (g, dims["width"], width), "v_enc": (g, dims["width"], dims["value"])}
    if width < dims["key"]:
        shapes |= {"q_map": (h, dims["key"], width), "k_map": (g, dims["key"], width)}
    return {name: torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}


def phi(t: Tensor) -> Tensor:
    """[..., 1 + D + D²], whose product is 1 + s + s²/2: what a state is made of."""
    t = t * t.shape[-1] ** -0.25
    squares = torch.einsum("...i,...j->...ij", t, t).flatten(-2) / 2**0.5
    return torch.cat([torch.ones_like(t[..., :1]), t, squares], dim=-1)


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor | None]:
    """Every pair of a query and a key, with its weight; sums of features are for the state alone."""
    heads, n, m, like = q.shape[1], q.shape[2], k.shape[2], v
    q, k, v = exact(q, heads_of(k, heads), F.pad(heads_of(v, heads), (0, 1), value=1.0))
    p = {name: heads_of(t.double()[None], heads)[0] for name, t in call.params.items()}
    if "q_map" in p:
        q, k = q @ p["q_map"], k @ p["k_map"]
    key_mask = (
        torch.ones(1, 1, m, dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    )
    k, v = (torch.where(key_mask[..., None], t, 0.0) for t in (k, v))
    seen = key_mask[:, :, None] & torch.ones(n, m, dtype=torch.bool, device=q.device)
    seen = seen.tril(m - n) if call.pattern == "causal_self" else seen

    def pairs(k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        s = q @ k.mT / q.shape[-1] ** 0.5
        return torch.where(seen, 1 + s + s**2 / 2, 0) @ v

    def sums(k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
        return (phi(k) * key_mask[..., None]).mT @ v

    total, end = pairs(k, v, seen), sums(k, v, key_mask)
    if call.initial_state is not None:
        state = call.initial_state.double()
        total, end = total + phi(q) @ state, end + state
    elif cfg.prefix:
        x = torch.where(key_mask[..., None], call.x_of_keys.double()[:, None], 0.0)
        first = key_mask & (key_mask.cumsum(-1) <= cfg.prefix)
        k, v = x @ p["k_enc"], F.pad(x @ p["v_enc"], (0, 1), value=1.0)
        total, end = total + pairs(k, v, first[:, :, None]), end + sums(k, v, first)
    out = quotient(total[..., :-1], total[..., -1:])
    return rounded(out, end if call.pattern == "causal_self" else None, like)


def features(x: Tensor) -> Tensor:
    return taylor(x * x.shape[-1] ** -0.25)


def prefix_sums(heads: int, cfg: Config, call: Call) -> Tensor | None:
    """[B, H, 1 + D + D², E + 1]: Σ φ(k^e)ᵀ [v^e, 1] over the first `prefix` keys that are there."""
    if cfg.prefix == 0:
        return None
    x, first = at_least_float32(call.x_of_keys)[:, None], call.key_mask  # [B, 1, M, C]
    if first is None:
        x = x[:, :, : cfg.prefix]
    else:
        x = x.masked_fill(~first.any(1, keepdim=True)[..., None], 0)
        first = first & (first.cumsum(-1) <= cfg.prefix)
    k, v = (x @ call.params[name].to(x.dtype) for name in ("k_enc", "v_enc"))  # [B, G, n, D], [B, G, n, E]
    k, v = features(k), F.pad(v, (0, 1), value=1.0)
    k, v = (per_query_head(t, heads).expand(-1, heads, -1, -1) for t in (k, v))
    return shown(k, first).mT @ v


def form(q: Q, k: K, v: V, cfg: Config, call: Call) -> Form:
    """The state that the prefix leaves is the one that causal linear attention starts from."""
    dtype = v.dtype
    q, k, v = (at_least_float32(t) for t in (q, k, v))
    if "q_map" in call.params:
        q, k = (t @ call.params[name].to(t.dtype) for name, t in (("q_map", q), ("k_map", k)))
    q, k = features(q), features(k)
    begin = prefix_sums(q.shape[1], cfg, call) if call.initial_state is None else call.initial_state

    def finish(out: Tensor, end: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # without an order the sums of the keys begin with nothing
        out = out if begin is None or call.pattern == "causal_self" else out + q @ begin
        total = out[..., -1:]
        return (out[..., :-1] / total.masked_fill(total == 0, 1)).to(dtype), end

    return Form(q, k, F.pad(v, (0, 1), value=1.0), state=begin, finish=finish)


def plain(q: Q, k: K, v: V, call: Call) -> Out:
    """Linear attention with Taylor features: no prefix."""
    q, k = (features(at_least_float32(t)) for t in (q, k))
    return dense_linear(q, k, v, pattern=call.pattern, key_mask=call.key_mask, normalise=True, eps=0.0)[0]


def state_size(cfg: Config, dims: dict, n: int) -> int:
    width = min(cfg.features, dims["key"])
    return dims["heads"] * (1 + width + width * width) * (dims["value"] + 1)


WHOLE = (
    "tokens of the prefix see those after them, so a first call that is cut inside the prefix has another one"
)
METHOD = Mechanism(
    config=Config,
    reference=reference,
    form=form,
    init=init,
    patterns=PATTERNS,
    needs_x=lambda cfg: cfg.prefix > 0,
    speed_settings=("chunk",),
    test_settings=({"prefix": 4}, {"prefix": 1, "features": 2}, {"prefix": 0}),
    neutral_base=plain,
    state_size=state_size,
    exempt={
        "influence": "a query within the prefix sees all of the prefix, also what follows it: not causal there",
        "prefix": WHOLE,
        "segments": WHOLE,
        "decode": WHOLE,
        "padded_state": WHOLE,
    },
    card=Card(
        title="Prefix linear attention (JRT-RNN)",
        paper="Just read twice: closing the recall gap for recurrent language models, arXiv:2407.05483",
        year=2024,
        idea="the prompt's sums, read all at once by maps of their own, are the state that causal reading starts from",
        cost="O((N + M)·f²·E) time with f = min(D, features): Taylor features of a width f are 1 + f + f²",
        state="(1 + f + f²)·(E + 1) numbers per head, whatever the length",
        needs=("qkv", "decoder-lm"),
        lineage=("linear_attention",),
        neutral={"prefix": 0},
        caveat=(
            "the paper pads a prompt shorter than M on the left and masks the padding, which is the same as a prefix "
            "as long as the prompt; the released code masks only prompts of at most M tokens, here hidden tokens never "
            "count; its projections give 16 features directly, here a map after q and k does; its eps of 1e-12 is left "
            "out, as the weights are at least 1/2. Training adds 0.25 of a masked-token loss on the prefix"
        ),
    ),
)
