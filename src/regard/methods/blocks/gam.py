"""Gated Associative Memory: a decoder layer of a short causal convolution and a learned memory bank, both gated.

    y      = LN(x)
    local  = Σ_i w_i ⊙ y_{t-i} + b            i = 0 .. kernel - 1, one weight per channel
    global = softmax(y Mᵀ) M                  a learned bank M [slots, C], no scale, no heads
    x'     = x + σ(g_1) ⊙ local + σ(g_2) ⊙ global          [g_1, g_2] = y W_g + b_g
    out    = x' + W_2 gelu(W_1 LN(x') + b_1) + b_2

The bank does not depend on the text: a token asks what training has stored, never what another token said. Tokens
mix through the convolution alone, so L layers see the last (kernel - 1) L + 1 tokens, and time grows with N.

Worked by hand: one channel, where LN gives its bias, here 1; weights 1, 2 and 4 from the token itself backwards, gates
σ(0) = 1/2, a bank of zeros and an FFN of zeros: 1/2 · 1, then 1/2 · 3, then 1/2 · 7 beside x = 0.

>>> import torch
>>> params = {name: torch.zeros_like(p) for name, p in init(Config(slots=2), {"width": 1}).items()}
>>> params |= {"ln_1_bias": torch.ones(1), "conv": torch.tensor([[1.0, 2.0, 4.0]])}
>>> reference(torch.zeros(1, 3, 1), Config(slots=2), Call(params=params))[0].flatten()
tensor([0.5000, 1.5000, 3.5000])
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, exact, for_products, initial, rounded


@dataclass(frozen=True)
class Config:
    slots: int = 512  # rows of the bank M; more store more
    kernel: int = 3  # tokens of the convolution, the token itself included
    expand: int = 4  # width of the FFN's middle, in widths of the layer
    eps: float = 1e-5  # added to the variance in the norms

    def __post_init__(self) -> None:
        smallest = min(self.slots, self.kernel, self.expand)
        require(smallest >= 1, "slots, kernel and expand are at least 1", cfg=self)


def init(cfg: Config, dims: dict) -> dict[str, Tensor]:
    c = dims["width"]

    def uniform(*shape: int, fan: int) -> Tensor:
        return torch.empty(*shape).uniform_(-1, 1) * fan**-0.5

    return {
        # conv[:, i] weighs the token i places back
        "conv": uniform(c, cfg.kernel, fan=cfg.kernel),
        "conv_bias": uniform(c, fan=cfg.kernel),
        "bank": torch.nn.init.xavier_uniform_(torch.empty(cfg.slots, c)),
        "gate": uniform(2 * c, c, fan=c),
        "gate_bias": uniform(2 * c, fan=c),
        "up": uniform(cfg.expand * c, c, fan=c),
        "up_bias": uniform(cfg.expand * c, fan=c),
        "down": uniform(c, cfg.expand * c, fan=cfg.expand * c),
        "down_bias": uniform(c, fan=cfg.expand * c),
        "ln_1": torch.ones(c),
        "ln_1_bias": torch.zeros(c),
        "ln_2": torch.ones(c),
        "ln_2_bias": torch.zeros(c),
    }


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Tensor]:
    """Token by token, each with the norms of the kernel - 1 tokens before it, which are the state."""
    names = list(call.params)
    p = dict(zip(names, exact(*(call.params[name] for name in names)), strict=True))
    outs, past = [], initial(call, x, len(x), cfg.kernel - 1, x.shape[2])
    for t, token in enumerate(x.double().unbind(1)):
        out, after = one_token(token, past, p, cfg)
        outs.append(out)
        # a hidden token is as if it were not there
        token_mask = None if call.key_mask is None else call.key_mask[:, 0, t, None, None]
        past = after if token_mask is None else torch.where(token_mask, after, past)
    return rounded(torch.stack(outs, dim=1), past, x)


def one_token(x: Tensor, past: Tensor, p: dict[str, Tensor], cfg: Config) -> tuple[Tensor, Tensor]:
    """(out [B, C], the last norms with its own) of x [B, C] and the norms before it [B, kernel - 1, C]."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = ((centred**2).mean(-1, keepdim=True) + cfg.eps).sqrt()
        return centred / spread * p[name] + p[name + "_bias"]

    y = norm(x, "ln_1")
    line = torch.cat([past, y[:, None]], dim=1)
    local = sum(p["conv"][:, i] * line[:, cfg.kernel - 1 - i] for i in range(cfg.kernel)) + p["conv_bias"]
    match = torch.einsum("bc,sc->bs", y, p["bank"]).softmax(-1)
    stored = torch.einsum("bs,sc->bc", match, p["bank"])
    g_1, g_2 = (torch.einsum("bc,dc->bd", y, p["gate"]) + p["gate_bias"]).sigmoid().chunk(2, dim=-1)
    x = x + g_1 * local + g_2 * stored
    middle = torch.einsum("bc,dc->bd", norm(x, "ln_2"), p["up"]) + p["up_bias"]
    gelu = middle * (1 + torch.erf(middle / 2**0.5)) / 2
    return x + torch.einsum("bd,cd->bc", gelu, p["down"]) + p["down_bias"], line[:, 1:]


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, Tensor]:
    """All tokens at once, the products in the dtype of x where it is multiplied."""
    dtype, (x,) = x.dtype, for_products(x)
    p = {name: t.to(x.dtype) for name, t in call.params.items()}
    wide = layer_norm(x, call, "ln_1", cfg)
    line, position, state = lined_up(wide, call, cfg.kernel - 1)
    y = wide.to(x.dtype)
    local = F.conv1d(line.to(x.dtype).mT, p["conv"].flip(1)[:, None], p["conv_bias"], groups=x.shape[2]).mT
    if position is not None:
        local = local.gather(1, position[..., None].expand_as(local))
    stored = (y @ p["bank"].mT).softmax(-1) @ p["bank"]
    g_1, g_2 = F.linear(y, p["gate"], p["gate_bias"]).sigmoid().chunk(2, dim=-1)
    x = x + g_1 * local + g_2 * stored
    y = layer_norm(x, call, "ln_2", cfg).to(x.dtype)
    x = x + F.linear(F.gelu(F.linear(y, p["up"], p["up_bias"])), p["down"], p["down_bias"])
    return x.to(dtype), state


def layer_norm(x: Tensor, call: Call, name: str, cfg: Config) -> Tensor:
    x = at_least_float32(x)
    weight, bias = (call.params[n].to(x.dtype) for n in (name, name + "_bias"))
    return F.layer_norm(x, x.shape[-1:], weight, bias, cfg.eps)


def lined_up(y: Tensor, call: Call, back: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(what the convolution reads [B, back + N, C], where each token stands in its result [B, N], the state after it).

    Tokens close up to the state, hidden ones go behind them: so padding, wherever it stands, is as if not there.
    """
    state = call.initial_state
    state = y.new_zeros(len(y), back, y.shape[2]) if state is None else state.to(y.dtype)
    if call.key_mask is None:
        line = torch.cat([state, y], dim=1)
        return line, None, line[:, y.shape[1] :]
    mask = call.key_mask[:, 0].expand(len(y), -1)
    # the tokens first
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    line = torch.cat([state, y.gather(1, order[..., None].expand_as(y))], dim=1)
    last = mask.sum(1, keepdim=True) + torch.arange(back, device=y.device)
    return line, order.argsort(dim=1), line.gather(1, last[..., None].expand(-1, -1, y.shape[2]))


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("causal_self",),
    test_settings=({"slots": 5}, {"slots": 3, "kernel": 1}, {"slots": 7, "kernel": 4, "expand": 2}),
    state_size=lambda cfg, dims, n: (cfg.kernel - 1) * dims["width"],
    card=Card(
        title="GAM: gated associative memory",
        paper=(
            "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling, arXiv:2509.00605"
        ),
        year=2025,
        idea="a short causal convolution sees the neighbours, a learned bank answers each token, gates add the two",
        cost="O(N·C·(slots + C)) time",
        state="the last kernel - 1 normed tokens: (kernel - 1)·C numbers, whatever the length",
        needs=("decoder-lm",),
        lineage=("softmax",),
        caveat=(
            "the bank is the same for every text, so nothing but the convolution moves between tokens: recall over "
            "more than (kernel - 1)·layers tokens is out of its reach, whatever its loss on text; dropout is left out"
        ),
    ),
)
