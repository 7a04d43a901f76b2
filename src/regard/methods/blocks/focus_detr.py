"""Focus-DETR's encoder layer: only tokens that a learned score calls foreground are refined, those of objects twice.

    T_l = LN(W (pool_l(x) + e_l) + b)              level l: the image's tokens, means of 2^l x 2^l of them
    S_l = MLP(T_l ⊙ (1 + α_l Up(S_{l+1})))         from the coarsest level down, that one without a factor
    F   = the share r_layer of tokens whose S_0 is largest
    O   = the k tokens of F whose max_c (C x)_c · S_0 is largest, of classes c
    y_O = LN(x_O + Attention(x_O; x_O))            y_F = x_F elsewhere
    z_F = LN(y_F + Attention(y_F; x))              out_F = LN(z_F + W_2 relu(W_1 z_F + b_1) + b_2)

All other tokens are keys alone and leave as they came, bit for bit. A coarse token sees a whole object, so what it
says, drawn out over its places, tells a fine one whether what it sees is part of one. The MLP is four linear maps with
GELU; after the first, half of the channels become their mean over the level. Shares shrink from layer to layer.

A choice has no slope: the task teaches S and C nothing. `foreground` gives the scores of all levels and `categories`
the logits of classes; losses of their own, on boxes in the paper, are asked of these.

Worked by hand: half of 100 tokens, times 1, 0.8, 0.6, 0.6, 0.4 and 0.2 in six layers, is 30 in the mean. Of four
tokens one is kept, its score the first channel of a norm that maps 2, 0, 0, 0 to 1.732, -0.577, -0.577, -0.577 (mean
1/2, variance 3/4). With attention and MLP of zero the norms are all that is left: this is what the token becomes.

>>> [kept(Config(layer=layer, layers=6), 100) for layer in range(6)]
[50, 40, 30, 30, 20, 10]
>>> cfg = Config(keep=0.25, levels=1)
>>> params = {name: 0 * p for name, p in init(cfg, {"width": 4, "heads": 1}).items()}
>>> params |= {"memory": torch.eye(4), "memory_norm": torch.ones(4), "norm": torch.ones(3, 4)}
>>> params |= {f"score_{i}": torch.eye(*params[f"score_{i}"].shape) for i in (1, 2, 3, 4)}
>>> x = 2 * torch.eye(4)[[1, 0, 2, 3]]
>>> reference(x[None], cfg, Call("self", params=params, grid=(2, 2)))[0][0].round(decimals=3)
tensor([[ 0.0000,  2.0000,  0.0000,  0.0000],
        [ 1.7320, -0.5770, -0.5770, -0.5770],
        [ 0.0000,  0.0000,  2.0000,  0.0000],
        [ 0.0000,  0.0000,  0.0000,  2.0000]])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.block import BlockPage
from regard.ops import at_least_float32, for_products, softmax_attention
from regard.ops.grid import any_grid
from regard.ops.grid.foreground import drawn_scores, scores, slow_linear, slow_scores
from regard.ops.precision import as_written
from regard.ops.prenorm import norm, slow_norm

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    keep: float = 0.5  # of the tokens, in a layer whose step of the cascade is 1
    # drawn out over the layers, if they are not as many
    cascade: tuple[float, ...] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)
    layer: int = 0  # number of this one, from 0: where it stands in the cascade
    layers: int = 1  # of the encoder, over which the cascade is drawn out
    objects: int = 300  # k
    levels: int = 4  # that are scored, the image's own included; each has half the sides of the one before
    classes: int = 80  # c, kinds of objects that C tells apart
    expand: int = 4  # width of the last MLP's middle, in widths of the layer
    eps: float = 1e-5  # added to the variance in the norms

    def __post_init__(self) -> None:
        require(0 <= self.layer < self.layers, "0 <= layer < layers", layer=self.layer, layers=self.layers)
        shares = (self.keep, *self.cascade)
        require(
            len(shares) > 1 and all(0 < s <= 1 for s in shares), "keep and cascade are in (0, 1]", cfg=self
        )
        for name in ("objects", "levels", "classes", "expand"):
            require(getattr(self, name) >= 1, f"{name} >= 1", **{name: getattr(self, name)})


def kept(cfg: Config, n: int) -> int:
    """How many of n tokens are foreground."""
    share = cfg.keep * cfg.cascade[cfg.layer * len(cfg.cascade) // cfg.layers]
    return max(1, math.floor(n * share + 1e-6))  # 0.29 * 100 is a little less than 29


def init(cfg: Config, dims: dict) -> Params:
    """Of qkv and out the first is among objects; norm is after each of the three steps."""
    c, heads, inner = dims["width"], dims["heads"], cfg.expand * dims["width"]
    require(c % heads == 0, "the width is a multiple of the heads", width=c, heads=heads)
    shapes = {"class": (cfg.classes, c), "qkv": (2, 3, heads, c // heads, c), "out": (2, c, c)}
    shapes |= {"up": (inner, c), "down": (c, inner)}
    params = {name: torch.empty(shape).uniform_(-1, 1) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    params |= {f"{name}_bias": torch.zeros(shape[:-1]) for name, shape in shapes.items()}
    # a class is as rare as one in a hundred to begin with
    params["class_bias"] -= math.log(99)
    return drawn_scores(c, cfg.levels) | params | {"norm": torch.ones(3, c), "norm_bias": torch.zeros(3, c)}


def reference(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    p = {name: t.double() for name, t in call.params.items()}
    return torch.stack([slow_layer(tokens, p, cfg, call.sides) for tokens in x.double()]).to(x.dtype), None


def slow_layer(x: Tensor, p: Params, cfg: Config, sides: Sides) -> Tensor:
    """Of one image, x [N, C]."""

    def best(of: Iterable[int], value: Tensor, count: int) -> list[int]:
        return sorted(sorted(of, key=lambda i: -value[i].item())[:count])  # sorted is stable

    s, tokens = slow_scores(x.mT.unflatten(1, sides), p, cfg.levels, cfg.eps), list(x)
    bound = len(x) * cfg.keep * cfg.cascade[cfg.layer * len(cfg.cascade) // cfg.layers]
    front = best(range(len(x)), s, max(1, sum(i <= bound + 1e-6 for i in range(1, len(x) + 1))))
    named = slow_linear(x, p, "class").amax(1) * s
    objects = best(front, named, cfg.objects)
    y = x[objects]
    for i, token in zip(objects, slow_norm(y + slow_attention(y, y, p, 0), p, 0, cfg.eps), strict=True):
        tokens[i] = token
    y = torch.stack([tokens[i] for i in front])
    y = slow_norm(y + slow_attention(y, x, p, 1), p, 1, cfg.eps)
    middle = slow_linear(y, p, "up").clamp(min=0)
    y = slow_norm(y + slow_linear(middle, p, "down"), p, 2, cfg.eps)
    for i, token in zip(front, y, strict=True):
        tokens[i] = token
    return torch.stack(tokens)


def slow_attention(x: Tensor, source: Tensor, p: Params, which: int) -> Tensor:
    (w_q, w_k, w_v), (b_q, b_k, b_v) = p["qkv"][which], p["qkv_bias"][which][:, :, None]
    q, k, v = (
        torch.einsum("nc,hdc->hnd", t, w) + b
        for t, w, b in ((x, w_q, b_q), (source, w_k, b_k), (source, w_v, b_v))
    )
    weights = (torch.einsum("hnd,hmd->hnm", q, k) / q.shape[2] ** 0.5).softmax(2)
    heads = torch.einsum("hnm,hmd->nhd", weights, v).flatten(1)
    return torch.einsum("nc,dc->nd", heads, p["out"][which]) + p["out_bias"][which]


def fast(x: Tensor, cfg: Config, call: Call) -> tuple[Tensor, None]:
    s = foreground(x, cfg, call)[0]
    places = best_places(s, kept(cfg, x.shape[1]))  # [B, |F|]
    (keys,) = for_products(x)
    p = {name: t.to(keys.dtype) for name, t in call.params.items()}
    y = rows_at(keys, places)
    named = categories(rows_at(x, places), call).amax(2) * s.gather(1, places)
    objects = best_places(named, min(cfg.objects, places.shape[1]))
    own = rows_at(y, objects)
    y = y.scatter(1, wide(objects, y), norm(own + attention(own, own, p, 0), p, 0, cfg.eps))
    y = norm(y + attention(y, keys, p, 1), p, 1, cfg.eps)
    middle = F.linear(y, p["up"], p["up_bias"]).relu()
    y = norm(y + F.linear(middle, p["down"], p["down_bias"]), p, 2, cfg.eps)
    return x.scatter(1, wide(places, x), y.to(x.dtype)), None


def best_places(value: Tensor, count: int) -> Tensor:
    """[B, count] ascending places of the largest of [B, N]; of equals the first."""
    return value.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values


def wide(places: Tensor, x: Tensor) -> Tensor:
    return places[..., None].expand(-1, -1, x.shape[2])


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, wide(places, x))


@as_written
def foreground(x: Tensor, cfg: Config, call: Call) -> list[Tensor]:
    """S_l [B, places of level l], the finest first, in float32 at least: a choice should not hang on roundings."""
    return scores(x, call.sides, dict(call.params), cfg.levels, cfg.eps)


@as_written
def categories(x: Tensor, call: Call) -> Tensor:
    """Logits of classes [B, n, classes] of tokens [B, n, C] as they come into the layer."""
    x = at_least_float32(x)
    return F.linear(x, *(call.params[name].to(x.dtype) for name in ("class", "class_bias")))


def attention(x: Tensor, source: Tensor, p: Params, which: int) -> Tensor:
    weights, biases = p["qkv"][which], p["qkv_bias"][which][:, :, None]
    q, k, v = (t[:, None] @ weights[i].mT + biases[i] for i, t in enumerate((x, source, source)))
    out = softmax_attention(q, k, v, scale=q.shape[3] ** -0.5)
    return F.linear(out.transpose(1, 2).flatten(2), p["out"][which], p["out_bias"][which])


METHOD = BlockPage(
    config=Config,
    reference=reference,
    fast=fast,
    init=init,
    patterns=("self",),
    grid=OnGrid(any_grid),
    exempt={"residual": "what is refined is normed last, as in DETR: weights of zero make it zero"},
    test_settings=(
        {"objects": 3, "levels": 2, "classes": 3, "expand": 1},
        {"keep": 0.3, "objects": 2, "levels": 1, "classes": 2, "expand": 1},
        {"keep": 1.0, "cascade": (0.5, 1.0), "objects": 4, "levels": 3, "classes": 5, "expand": 1},
    ),
    card=Card(
        title="Focus-DETR: foreground tokens are refined, those of objects twice",
        paper="Less is More: Focus Attention for Efficient DETR (2023), arXiv:2307.12612",
        year=2023,
        idea="scores of coarse levels modulate finer ones; the best tokens ask all, the best of these each other first",
        cost="O(N·C²) time for scores, keys and values, O(F·N·C + k²·C + F·C²) for F foreground tokens",
        state="none",
        needs=("cnn-features", "vit"),
        lineage=("softmax",),
        caveat=(
            "The paper's four levels are a backbone's and all their tokens are chosen from; here they are the grid and "
            "its means over 2 x 2, 4 x 4 and 8 x 8 places, and tokens are those of the grid. Softmax attention over "
            "all tokens stands where deformable attention does; positions are in x. The released code scores once, "
            "before the first layer, so that its choices are nested: here each layer scores what it gets. It keeps one "
            "token more, and its MLP begins with a norm, under which a factor common to a token's channels is lost but "
            "for its sign: here, as in the equation, it is not. A product of a logit and a score, both negative, is "
            "large, as released; W, its norm and e are the released code's, where C is the detector's map. In small "
            "images all foreground tokens are among 300 objects. Losses and their labels are not here. Where the loss "
            "of scores reaches the features, their norms come to say the same: see the claim"
        ),
    ),
)
