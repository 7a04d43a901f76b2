"""ARFlow's hybrid attention: tokens of one image attend to each other freely, images read earlier ones by a state.

    S_n = γ_n S_{n-1} + Σ_{j in image n} k_jᵀ v_j / √D          a [D, E] state per head, after image n
    o_i = Σ_{j in image n} softmax_j(q_i·k_j / √D) v_j + e^{c_i} q_i S_{n-1}       token i of image n
    g_i = logsigmoid(x_i W_g) / 16,   γ_n = exp(mean of g over image n),   c_i = Σ of g over image n up to i

The images of a sequence are one denoising trajectory, the noisiest first. Each call begins with a new image, and its
last image may be smaller; a step of sampling costs the same however many images there were, as S does not grow.

Worked by hand: images of one token, W_g = 0, so g = -log(2)/16 and e^g = 0.9576; ones for q, k and v. The softmax
of one token gives 1. The second image reads S_1 = 1 as 0.9576; the third S_2 = 0.9576 + 1 as 1.8746.

>>> import torch
>>> one, cfg = torch.ones(1, 1, 3, 1, dtype=torch.float64), Config(tokens_per_image=1)
>>> call = Call(params={"w_gate": torch.zeros(1, 1)}, x=torch.ones(1, 3, 1))
>>> out, _ = reference(one, one, one, cfg, call)
>>> [round(o, 4) for o in out.flatten().tolist()]
[1.0, 1.9576, 2.8746]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.kinds.mechanism import Mechanism
from regard.ops import (
    at_least_float32,
    exact,
    explicit,
    heads_of,
    initial,
    per_query_head,
    quotient,
    rounded,
    shown,
    softmax_attention,
)
from regard.ops.features import pad_tokens

NO_ORDER = "images are ordered from noisy to clean: without that order the state has nothing to decay along"
NO_IMAGE = "half of the output is the attention of a token to its own image: a query outside has no image"
NO_BORDER = (
    "an image is seen as a whole: a text can be cut between images only, which the page's own tests do"
)


@dataclass(frozen=True)
class Config:
    tokens_per_image: int = 256  # 256 × 256 pixels in latent patches of two
    normalizer: float = 16.0  # the gate's logarithm is divided by it

    def __post_init__(self) -> None:
        size = self.tokens_per_image
        require(size >= 1, "tokens_per_image >= 1", tokens_per_image=size)
        require(self.normalizer > 0, "normalizer > 0", normalizer=self.normalizer)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    width = dims["width"]
    return {"w_gate": torch.empty(width, dims["heads"]).uniform_(-1, 1) * width**-0.5}


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor]:
    n, m, heads, size, scale = q.shape[2], k.shape[2], q.shape[1], cfg.tokens_per_image, k.shape[3] ** -0.5
    q_h, k_h, v_h = exact(q, heads_of(k, heads), heads_of(v, heads))
    x, w_gate = exact(call.x, call.params["w_gate"])
    key_mask = (
        torch.ones(1, 1, m, dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    )
    k_h, v_h = (torch.where(key_mask[..., None], t, 0.0) for t in (k_h, v_h))
    # a hidden token neither decays nor writes, and it does not count in the mean
    g = torch.where(key_mask, F.logsigmoid(torch.einsum("bmc,ch->bhm", x, w_gate)) / cfg.normalizer, 0.0)
    states = [initial(call, q, len(q), heads, k.shape[3], v.shape[3])]
    for first in range(0, m, size):
        image = slice(first, first + size)
        gamma = quotient(g[:, :, image].sum(-1), key_mask[:, :, image].sum(-1)).exp()
        written = torch.einsum("bhjd,bhje->bhde", k_h[:, :, image], v_h[:, :, image]) * scale
        states.append(gamma[..., None, None] * states[-1] + written)
    rows = []
    for i, token in enumerate(range(m - n, m)):
        first = token // size * size
        image = slice(first, first + size)
        s = torch.einsum("bhd,bhjd->bhj", q_h[:, :, i], k_h[:, :, image]) * scale
        inside = softmax_mean(s, v_h[:, :, image], key_mask[:, :, image])
        c = g[:, :, first : token + 1].sum(-1, keepdim=True)
        rows.append(inside + c.exp() * torch.einsum("bhd,bhde->bhe", q_h[:, :, i], states[token // size]))
    return rounded(torch.stack(rows, dim=2), states[-1], v)


def softmax_mean(s: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """Σ_j softmax_j(s_j) v_j over the tokens j of an image that are there; of the reference only."""
    s = s.masked_fill(~key_mask, -torch.inf)
    # cancels; keeps the exponentials below 1
    top = s.amax(-1, keepdim=True).detach()
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    return quotient(torch.einsum("bhj,bhje->bhe", e, v), e.sum(-1, keepdim=True))


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, Tensor]:
    n, m, heads, scale = q.shape[2], k.shape[2], q.shape[1], k.shape[-1] ** -0.5
    size = min(cfg.tokens_per_image, m)
    g, key_mask = gates(cfg, call)
    k, v = (shown(per_query_head(t, heads).expand(-1, heads, -1, -1), call.key_mask) for t in (k, v))
    # the last query is that of the last key
    q = pad_tokens(q, before=m - n)
    q, k, v = (images(t, size) for t in (q, k, v))  # [B, images, H, T, D | E]
    g, key_mask = (images(t[..., None], size)[..., 0] for t in (g, key_mask))
    seen = None if call.key_mask is None and m % size == 0 else key_mask.flatten(0, 1)[:, :, None]
    inside = softmax_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale=scale, mask=seen)
    decay = (g.sum(-1) / key_mask.sum(-1).clamp(min=1)).exp()  # [B, images, H]
    reading = at_least_float32(q) * g.cumsum(-1).exp()[..., None]
    writes = at_least_float32(k).mT @ at_least_float32(v) * scale  # [B, images, H, D, E]
    state = call.initial_state
    state = torch.zeros_like(writes[:, 0]) if state is None else state.to(writes.dtype)
    across = []
    for i in range(writes.shape[1]):
        across.append(reading[:, i] @ state)
        state = decay[:, i, :, None, None] * state + writes[:, i]
    out = inside.unflatten(0, (len(q), -1)) + torch.stack(across, dim=1)
    return out.transpose(1, 2).flatten(2, 3)[:, :, m - n : m].to(v.dtype), state


def gates(cfg: Config, call: Call) -> tuple[Tensor, Tensor]:
    """(log gates g [B, H, M], which tokens are there [B, 1|H, M]); a hidden token does not decay."""
    x = at_least_float32(call.x)
    # laid out before the sigmoid, whose gradient torch.compile and torch lay out differently after a transposition
    g = F.logsigmoid((x @ call.params["w_gate"].to(x.dtype)).mT.contiguous()) / cfg.normalizer
    if call.key_mask is None:
        return g, torch.ones_like(g[:, :1], dtype=torch.bool)
    return g.masked_fill(~call.key_mask, 0), call.key_mask.expand(len(g), -1, -1)


def images(t: Tensor, size: int) -> Tensor:
    """[B, H, M, D] -> [B, images, H, T, D], zeros behind the last token."""
    return pad_tokens(t, after=-t.shape[2] % size).unflatten(2, (-1, size)).transpose(1, 2)


def one_image(q: Q, k: K, v: V, call: Call) -> Out:
    """What one image of all tokens gives: softmax attention without causality."""
    seen = None if call.key_mask is None else call.key_mask[:, :, None]
    return explicit(q, k, v, scale=q.shape[-1] ** -0.5, mask=seen)


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    needs_x=True,
    order_aware=True,
    patterns=("causal_self",),
    unsupported={"self": NO_ORDER, "cross": NO_IMAGE, "causal_cross": NO_IMAGE},
    test_settings=({"tokens_per_image": 1}, {"tokens_per_image": 4}, {"tokens_per_image": 16}),
    neutral_base=one_image,
    state_size=lambda cfg, dims, n: dims["heads"] * dims["key"] * dims["value"],
    exempt={
        "influence": "causal over images: inside one, later tokens move earlier ones by design",
        "segments": NO_BORDER,
        "decode": NO_BORDER,
        "padded_state": NO_BORDER,
        "padding_left": "a token's image is known by its position; padding by whole images changes nothing",
    },
    card=Card(
        title="ARFlow's hybrid linear attention",
        paper="ARFlow: Autogressive Flow with Hybrid Linear Attention (arXiv:2501.16085)",
        year=2025,
        idea="softmax attention inside an image, a gated linear state across the images of a denoising trajectory",
        cost="O(N·T·(D + E) + N·D·E) time for images of T tokens",
        state="D·E numbers per head, whatever the number of images",
        needs=("diffusion", "qkv"),
        lineage=("softmax", "linear_attention"),
        neutral={"tokens_per_image": 1 << 20},
        caveat=(
            "the paper's text leaves gate and inner term open, so both are those of the released kernels: a softmax "
            "inside, a mean gate per image on the state, and a running sum of gates on the query, through which later "
            "tokens of an image read the past more weakly; x is to hold the embedding of time and class, which the "
            "released gate adds to it; norms of q, k and v over the full width belong to the layer; images are known "
            "by position, so a hidden token keeps its position, and a hidden image neither decays nor writes"
        ),
    ),
)
