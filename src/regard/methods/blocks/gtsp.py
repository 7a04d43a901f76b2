"""GTSP: a transformer layer with masks on its tokens, heads, weights and on itself, learned with the task, then hard.

    m = σ((s - bar) / τ)    for scores s of which k are kept; bar lies halfway between the k-th and the next one
    tokens   s_i = w · LN(x_i)           heads   s_h, learned           weights   s = |W| / mean |W|, by matrix and head
    layer    m = σ(g / τ), g learned
    A_ij = m_j exp(q_i k_j / √D) / Σ_l m_l exp(q_i k_l / √D)
    x_i ← x_i + m · m_i · (Σ_h m_h (A v)_i W_h + b),        x_i ← x_i + m · m_i · MLP(LN x_i)

with (W ⊙ m) for all matrices. While the masks are soft, gradients say of every token, head, weight and layer whether
the loss would miss it. The lower the temperature τ, the nearer they are to 0 and 1. `hard` sets them there: what is
left out is not computed. Tokens that are left out neither ask nor answer and pass on as they are, and a layer with
g <= 0 is none. All that is kept and g > 0 is a plain pre-norm layer, whichever way the masks are read: a share of 1
has a mask of ones. Where a mask is soft, nothing is saved.

Worked by hand: of scores 0, 1, 2 and 3 two are kept, the bar is 3/2, and the masks are σ(∓3/2) and σ(∓1/2). A layer
of width 4 on four tokens multiplies 4·4·4 times for each of q, k, v, the output and both products of attention, and
4·4·8 times for each half of an MLP of twice the width: 640, with as many additions. Two of the tokens take 2·4·4 for
each of four, 2·2·4 for each of two, 2·4·8 for each half, and 4·4 to choose them: 304.

>>> log_mask(torch.tensor([0.0, 1.0, 2.0, 3.0]), 2, 4, 1.0).exp()
tensor([0.1824, 0.3775, 0.6225, 0.8176])
>>> whole = Config(tokens=1.0, heads=1.0, weights=1.0)
>>> flops(whole, 4, width=4, heads=2), flops(Config(tokens=0.5, heads=1.0, weights=1.0), 4, width=4, heads=2)
(1280, 608)

Two of four tokens, chosen by their first number, take what one bias of 1 adds to attention that gives nothing; the
others stay as they are.

>>> cfg = Config(tokens=0.5, heads=1.0, weights=1.0, hard=True)
>>> p = {name: torch.zeros_like(t) for name, t in init(cfg, {"width": 2, "heads": 1}).items()}
>>> p |= {"layer_norm": torch.ones(2, 2), "layer_out_bias": torch.ones(2), "gate": torch.ones(1)}
>>> p["score"][0] = 1.0
>>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]])
>>> reference(x, cfg, Call("self", params=p))[0].tolist()
[[[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 3.0]]]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, best, product_dtype, slots_of, softmax_attention
from regard.ops.prenorm import Params, drawn_layers, layer, layer_of, norm, slow_norm
from regard.ops.soft_topk import kept, kept_of, log_mask, slow_mask

MATRICES = ("qkv", "out", "up", "down")


@dataclass(frozen=True)
class Config:
    tokens: float = 0.5  # share that is kept, here and below; rounded down, one at least
    heads: float = 0.75  # share that is kept, rounded down, one at least
    weights: float = 0.5  # of each matrix, those of attention by head
    temperature: float = 1.0  # of masks that are soft
    hard: bool = False  # whether masks are 0 or 1, and what is left out is not computed
    expand: int = 2  # width of the MLP's middle, in widths of the layer
    eps: float = 1e-5  # added to the variance in the norms

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "weights"):
            require(0 < getattr(self, name) <= 1, f"0 < {name} <= 1", **{name: getattr(self, name)})
        require(self.temperature > 0, "temperature > 0", temperature=self.temperature)
        require(self.expand >= 1, "expand >= 1", expand=self.expand)


def init(cfg: Config, dims: dict) -> Params:
    c, heads = dims["width"], dims["heads"]
    scores = {"score": 0.02 * torch.randn(c, 1), "head_score": 0.02 * torch.randn(heads)}
    return drawn_layers("layer", (), c, heads, cfg.expand * c) | scores | {"gate": torch.ones(1)}


def flops(cfg: Config, tokens: int, *, width: int, heads: int) -> int:
    """Of the products of a hard layer that is not left out, two for a multiplication and its addition."""
    n, h, d = kept(cfg.tokens, tokens), kept(cfg.heads, heads), width // heads
    weights = 4 * h * kept(cfg.weights, width * d) + 2 * kept(cfg.weights, cfg.expand * width * width)
    choice = tokens * width if n < tokens else 0
    return 2 * (choice + n * weights + 2 * n * n * h * d)


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    """Text by text, of the tokens that are there."""
    p = {name: t.double() for name, t in call.params.items()}
    own, rows, temperature = layer_of(p, "layer", ()), [], None if cfg.hard else cfg.temperature
    for name in MATRICES:
        own[name] = slow_weights(own[name], cfg.weights, temperature)
    m_heads = slow_mask(p["head_score"], cfg.heads, temperature)
    opened = (p["gate"] > 0).double() if cfg.hard else (p["gate"] / cfg.temperature).sigmoid()
    for b, text in enumerate(x.double()):
        mask = call.key_mask
        at = torch.arange(len(text), device=x.device)
        at = at if mask is None else at[mask[b % len(mask), 0]]
        there = text[at]
        if len(at):
            m = slow_mask((slow_norm(there, own, 0, cfg.eps) @ p["score"])[:, 0], cfg.tokens, temperature)
            there = one_text(there, m, m_heads, opened, own, cfg)
        rows.append(torch.zeros_like(text).index_copy(0, at, there))
    return torch.stack(rows).to(x.dtype), None


def slow_weights(w: Tensor, share: float, temperature: float | None) -> Tensor:
    matrices = []
    for matrix in w.reshape(-1, w.shape[-2] * w.shape[-1]):
        size = matrix.abs()
        matrices.append(matrix * slow_mask(size / (size.mean() + 1e-12), share, temperature))
    return torch.stack(matrices).view_as(w)


def one_text(x: Tensor, m: Tensor, m_heads: Tensor, opened: Tensor, p: Params, cfg: Config) -> Tensor:
    y, added = slow_norm(x, p, 0, cfg.eps), p["out_bias"]
    for h in range(len(m_heads)):
        q, k, v = (y @ p["qkv"][i, h] + p["qkv_bias"][i, h] for i in range(3))
        s = q @ k.mT / q.shape[1] ** 0.5
        there = m * (s - torch.where(m > 0, s, -torch.inf).amax(1, keepdim=True).detach()).clamp(max=0).exp()
        added = added + m_heads[h] * (there / there.sum(1, keepdim=True)) @ v @ p["out"][h]
    x = x + opened * m[:, None] * added
    middle = slow_norm(x, p, 1, cfg.eps) @ p["up"] + p["up_bias"]
    middle = middle * (1 + torch.erf(middle / 2**0.5)) / 2
    return x + opened * m[:, None] * (middle @ p["down"] + p["down_bias"])


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    there = x.new_ones(x.shape[:2], dtype=torch.bool)
    if call.key_mask is not None:
        there = there & call.key_mask[:, 0]
    tokens = at_least_float32(x).masked_fill(~there[..., None], 0)
    if cfg.hard and not bool(call.params["gate"] > 0):
        return tokens.to(x.dtype), None
    p = layer_of(dict(call.params), "layer", ())
    for name in MATRICES if cfg.weights < 1 else ():
        p[name] = masked(p[name], cfg)
    p = {name: t.to(product_dtype(x)) for name, t in p.items()}
    out = (skipping if cfg.hard else softly)(tokens, there, p, call.params, cfg)
    return out.to(x.dtype), None


def masked(w: Tensor, cfg: Config) -> Tensor:
    """The weights [..., rows, columns] times their masks."""
    size = at_least_float32(w).abs().flatten(-2)
    k, n = kept(cfg.weights, size.shape[-1]), size.shape[-1]
    if cfg.hard:
        return w * best(size, k).view_as(w)
    score = size / (size.mean(-1, keepdim=True) + 1e-12)
    return w * log_mask(score, k, n, cfg.temperature).exp().view_as(w)


def token_scores(x: Tensor, there: Tensor, p: Params, params: Params, cfg: Config) -> Tensor:
    """[B, N] in the dtype of x, -inf where no token is."""
    weight, bias = (p[name][0].to(x.dtype) for name in ("norm", "norm_bias"))
    score = F.layer_norm(x, x.shape[-1:], weight, bias, cfg.eps) @ params["score"].to(x.dtype)
    return score[..., 0].masked_fill(~there, -torch.inf)


def softly(x: Tensor, there: Tensor, p: Params, params: Params, cfg: Config) -> Tensor:
    n, heads = there.sum(-1), len(p["out"])
    log_m = log_mask(token_scores(x, there, p, params, cfg), kept_of(cfg.tokens, n), n, cfg.temperature)
    chances = at_least_float32(params["head_score"])
    m_heads = log_mask(chances, kept(cfg.heads, heads), heads, cfg.temperature).exp()[:, None, None]
    scale = (log_m.exp() * (at_least_float32(params["gate"]) / cfg.temperature).sigmoid())[..., None]
    y = norm(x, p, 0, cfg.eps)
    q, k, v = (y[:, None] @ p["qkv"][i] + p["qkv_bias"][i, :, None] for i in range(3))
    seen = {"mask": there[:, None, None], "bias": log_m[:, None, None]}
    mixed = m_heads.to(v.dtype) * softmax_attention(q, k, v, scale=q.shape[3] ** -0.5, **seen)
    x = x + scale * ((mixed @ p["out"]).sum(1) + p["out_bias"])
    return x + scale * (F.gelu(norm(x, p, 1, cfg.eps) @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"])


def skipping(x: Tensor, there: Tensor, p: Params, params: Params, cfg: Config) -> Tensor:
    """A plain layer of the heads and tokens that are kept; the others' rows are those of x."""
    at = best(params["head_score"], kept(cfg.heads, len(p["out"]))).nonzero()[:, 0]
    p = {**p, "qkv": p["qkv"][:, at], "qkv_bias": p["qkv_bias"][:, at], "out": p["out"][at]}
    chosen = there
    if cfg.tokens < 1:
        chosen = best(token_scores(x, there, p, params, cfg), kept_of(cfg.tokens, there.sum(-1)))
    slots = slots_of(chosen[:, None])[:, 0]  # [B, k], -1 where a row keeps fewer
    rows = torch.where(slots < 0, x.shape[1], slots)[..., None].expand(-1, -1, x.shape[2])
    wide = F.pad(x, (0, 0, 0, 1))
    done = layer(wide.gather(1, rows), p, cfg.eps, (slots >= 0)[:, None, None])
    return wide.scatter(1, rows, done)[:, :-1]


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    test_settings=(
        {"hard": True},
        {"hard": True, "tokens": 1.0, "heads": 0.5, "expand": 1},
        {"tokens": 1.0, "heads": 1.0, "weights": 1.0, "expand": 1},
        {"tokens": 0.3, "weights": 0.8, "temperature": 0.3, "expand": 1, "eps": 1e-2},
    ),
    card=Card(
        title="GTSP: masks on tokens, heads, weights and layers",
        paper="Exploring Sparsity in Graph Transformers (2023), arXiv:2312.05479",
        year=2023,
        idea="soft masks on tokens, heads, weights and the layer are learned with the task, then left out for good",
        cost="hard: that of a plain layer of k tokens and h heads, and O(N·C) to choose; soft: that of all, and more",
        state="none",
        needs=("qkv", "vit", "graph"),
        lineage=("softmax",),
        neutral={"tokens": 1.0, "heads": 1.0, "weights": 1.0, "hard": True},
        caveat=(
            "of the paper only abstract and released code were at hand: this form of the masks is the page's, and all "
            "four in one layer; the code has a program for each. There tokens are chosen by a straight-through top k "
            "with Gumbel noise, also when tested, and set to zero, not left out; the last place is always kept. Heads "
            "are chosen anew every few steps by the gradient times the activation, which is the gradient of m_h here; "
            "weights by their size, ever fewer; heads and weights come back by their gradient; layers are dropped at "
            "random in training alone. Here all are sigmoids around a bar, without noise. Shares of tokens and heads "
            "are the code's defaults, that of weights one of three that it runs. GraphGPS's message passing, batch "
            "norms and ReLU are not here: the graph enters by the features of its nodes. Weights that are left out "
            "are counted as saved, but products are no faster"
        ),
    ),
)
