"""FIT's layers: attention inside groups of tokens, and among a few latents of each group, by turns.

    x_t ← x_t + MHA(LN x_t), then x_t + MLP(LN x_t)        local: group t alone, n tokens
    z_t ← z_t + MHA(LN z_t, LN x_t)                        read: the m latents of a group ask its tokens
    z   ← z + MHA(LN z), then z + MLP(LN z)                global: the latents of all groups
    x_t ← x_t + MHA(LN x_t, LN z_t)                        write: tokens ask the latents of their group

That is a round. All that a group learns of another one passes through its latents, so L tokens cost L·n + (L·m/n)²
scores beside 2·L·m: L^(4/3) of them where n grows as the cube root of L and m does not.

Latents begin as learned vectors plus sines and cosines of the number of their group. They live inside this page: all of
its rounds share them, and the next layer of a model starts anew. With `causal` (FITAR) tokens see those before them in
their group, latents those of their own and earlier groups, and a group is written by the latents of the group before
it, the first one by zeros: a token then sees its group's past and what all earlier groups say.

Worked by hand, by counting: eight tokens in groups of four with two latents ask for 2·4² scores inside groups, 2·2·4 to
read, 4² among the latents, and 2·4·2 to write: 80, where full attention has 64.

>>> pairs(Config(group=4, latents=2, rounds=1), 8)
80
>>> slow_code(1, 4)[::2]  # sin and cos of the number itself
[0.8414709848078965, 0.5403023058681398]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, product_dtype
from regard.ops.prenorm import (
    Params,
    code,
    drawn_layers,
    exchange,
    layer,
    layer_of,
    slow_code,
    slow_exchange,
    slow_layer,
)


@dataclass(frozen=True)
class Config:
    group: int = 16  # n, the last group may be shorter
    latents: int = 4  # m
    rounds: int = 1  # times local layers, reading, global layers and writing follow each other
    local_layers: int = 1  # of a round, each inside the groups; 0: none
    global_layers: int = 1  # 0: nothing is read or written either
    causal: bool = False  # FITAR: tokens see none after them, latents no later groups
    expand: int = 4  # width of the MLPs' middle, in widths of the layer
    eps: float = 1e-6  # of the norms

    def __post_init__(self) -> None:
        least = min(self.group, self.latents, self.rounds, self.expand)
        require(least >= 1, "group, latents, rounds and expand are at least 1", cfg=self)
        require(min(self.local_layers, self.global_layers) >= 0, "0 layers or more", cfg=self)


def init(cfg: Config, dims: dict) -> Params:
    """Stacked by round, and by layer of a round; the norms of an exchange are those of who asks and who is asked."""
    c, heads = dims["width"], dims["heads"]
    params = drawn_layers("local", (cfg.rounds, cfg.local_layers), c, heads, cfg.expand * c)
    if not cfg.global_layers:
        return params
    params |= drawn_layers("global", (cfg.rounds, cfg.global_layers), c, heads, cfg.expand * c)
    for name in ("read", "write"):
        params |= drawn_layers(name, (cfg.rounds,), c, heads, None)
    return params | {"latents": 0.02 * torch.randn(cfg.latents, c)}


def pairs(cfg: Config, tokens: int) -> int:
    """How many scores a head computes for so many tokens, a whole number of groups."""
    groups = tokens // cfg.group
    exchange = 2 * tokens * cfg.latents + cfg.global_layers * (groups * cfg.latents) ** 2
    return cfg.rounds * (cfg.local_layers * tokens * cfg.group + (exchange if cfg.global_layers else 0))


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    """Text by text, of the tokens that are there, group by group."""
    p, rows = {name: t.double() for name, t in call.params.items()}, []
    for b, text in enumerate(x.double()):
        mask = call.key_mask
        at = torch.arange(len(text), device=x.device)
        at = at if mask is None else at[mask[b % len(mask), 0]]
        rows.append(torch.zeros_like(text).index_copy(0, at, one_text(text[at], p, cfg)))
    return torch.stack(rows).to(x.dtype), None


def one_text(x: Tensor, p: Params, cfg: Config) -> Tensor:
    groups = list(x.split(cfg.group))
    numbers = range(len(groups)) if cfg.global_layers else ()
    z = [p["latents"] + x.new_tensor(slow_code(t, x.shape[1])) for t in numbers]
    of = torch.arange(len(groups), device=x.device).repeat_interleave(cfg.latents)
    earlier = of[:, None] >= of if cfg.causal else None
    lower = torch.ones(cfg.group, cfg.group, dtype=torch.bool).tril() if cfg.causal else None
    for r in range(cfg.rounds):
        for i in range(cfg.local_layers):
            own = layer_of(p, "local", (r, i))
            masks = [lower if lower is None else lower[: len(g), : len(g)] for g in groups]
            groups = [slow_layer(g, own, cfg.eps, mask) for g, mask in zip(groups, masks, strict=True)]
        if not cfg.global_layers:
            continue
        read, write = layer_of(p, "read", (r,)), layer_of(p, "write", (r,))
        every = torch.cat([slow_exchange(own, g, read, cfg.eps) for own, g in zip(z, groups, strict=True)])
        for i in range(cfg.global_layers):
            every = slow_layer(every, layer_of(p, "global", (r, i)), cfg.eps, earlier)
        z = list(every.split(cfg.latents))
        told = [torch.zeros_like(z[0]), *z[:-1]] if cfg.causal else z
        groups = [slow_exchange(g, y, write, cfg.eps) for g, y in zip(groups, told, strict=True)]
    return torch.cat(groups)


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    """All groups at once; tokens that are there come first, what fills the last group is hidden."""
    (batch, n, width), low = x.shape, product_dtype(x)
    p = {name: t.to(low) for name, t in call.params.items()}
    tokens, there, order = at_least_float32(x), torch.ones(batch, n, dtype=torch.bool, device=x.device), None
    if call.key_mask is not None:
        there = call.key_mask[:, 0].expand(batch, n)
        order = (~there).int().argsort(dim=1, stable=True)
        tokens = tokens.masked_fill(~there[..., None], 0).take_along_dim(order[..., None], 1)
        there = there.take_along_dim(order, 1)
    count, fill = -(-n // cfg.group), -n % cfg.group
    tokens = F.pad(tokens, (0, 0, 0, fill)).unflatten(1, (count, cfg.group)).flatten(0, 1)
    there = F.pad(there, (0, fill)).view(batch, count, cfg.group)
    tokens = rounds(tokens, None if order is None and not fill else there, count, p, cfg)
    out = tokens.view(batch, -1, width)[:, :n]
    if order is not None:
        out = torch.zeros_like(out).scatter(1, order[..., None].expand_as(out), out)
    return out.to(x.dtype), None


def rounds(x: Tensor, there: Tensor | None, count: int, p: Params, cfg: Config) -> Tensor:
    """[B·T, n, C] tokens of T groups; there [B, T, n], None: all of them are."""
    m, width = cfg.latents, x.shape[2]
    inside = None if there is None else there.flatten(0, 1)[:, None, None]
    t = torch.arange(count, device=x.device)
    if cfg.global_layers:
        z = (at_least_float32(p["latents"]) + code(t, width)[:, None]).to(x.dtype)  # [T, m, C]
        z = z.expand(len(x) // max(count, 1), -1, -1, -1).flatten(0, 1)
        blocks = t.repeat_interleave(m)
        among = blocks[:, None] >= blocks if cfg.causal else None
        if there is not None:
            full = there.any(-1).repeat_interleave(m, 1)[:, None, None]
            among = full if among is None else full & among
    lower = torch.ones(cfg.group, cfg.group, dtype=torch.bool, device=x.device).tril()
    local = inside if not cfg.causal else lower if inside is None else inside & lower
    for r in range(cfg.rounds):
        for i in range(cfg.local_layers):
            x = layer(x, layer_of(p, "local", (r, i)), cfg.eps, local)
        if not cfg.global_layers:
            continue
        z = exchange(z, x, layer_of(p, "read", (r,)), cfg.eps, inside)
        z = z.unflatten(0, (-1, count)).flatten(1, 2)
        for i in range(cfg.global_layers):
            z = layer(z, layer_of(p, "global", (r, i)), cfg.eps, among)
        z = z.unflatten(1, (count, m))
        told = F.pad(z, (0, 0, 0, 0, 1, 0))[:, :-1] if cfg.causal else z
        x = exchange(x, told.flatten(0, 1), layer_of(p, "write", (r,)), cfg.eps)
        z = z.flatten(0, 1)
    return x


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    test_settings=(
        {"group": 4, "latents": 2, "causal": True, "expand": 1},
        {"group": 5, "latents": 1, "rounds": 2, "local_layers": 0, "expand": 1, "eps": 1e-3},
        {"group": 3, "global_layers": 0, "expand": 1},
    ),
    card=Card(
        title="FIT: interleaved local and global layers",
        paper="FIT: Far-reaching Interleaved Transformers (2023), arXiv:2305.12689",
        year=2023,
        idea="tokens attend inside their group, a few latents of each group to those of all, and hand it on",
        cost="O(L·n + L·m + (L·m/n)²) scores a round for L tokens; L^(4/3) for n = L^(1/3)",
        state="none: it is asked whole texts",
        needs=("qkv", "vit"),
        lineage=("softmax", "perceiver"),
        caveat=(
            "tokens and latents have one width here. Latents begin as m learned vectors plus a code of their group's "
            "number, so that any length can be asked; the paper learns those of each group, or has codes of both. "
            "Every round writes, as a layer follows; the paper's last does not, its encoder answers with the latents. "
            "Positions inside a group are the model's to add. causal=True is FITAR's masks and shift, but without a "
            "state: a text that grows is asked anew. Groups are runs of tokens: put patches of a group together"
        ),
    ),
)
