"""Sublayers of a pre-norm transformer with their residual: attention to itself or to others, and an MLP.

Parameters are a dict: norm [2, C] and norm_bias (of who asks or of attention, and of who is asked or of the MLP), qkv
[3, H, C, D], out [H, D, C], up [C, I], down [I, C], a `_bias` for each. Those of many layers are stacked in front and
named after their part of a page, "local_qkv"; `layer_of` takes one out.

Each is written twice: `slow_*` as the equations say, of one text [N, C], for references, and quick, of a batch.

>>> p = drawn_layers("a", (2,), 4, 2, 8)
>>> {name: tuple(t.shape) for name, t in layer_of(p, "a", (1,)).items() if not name.endswith("bias")}
{'qkv': (3, 2, 4, 2), 'out': (2, 2, 4), 'up': (4, 8), 'down': (8, 4), 'norm': (2, 4)}
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import require
from regard.ops.softmax import softmax_attention

Params = dict[str, Tensor]


def drawn_layers(name: str, stack: tuple[int, ...], width: int, heads: int, inner: int | None) -> Params:
    """What layers begin with; inner: the width of the MLP's middle, None: attention alone. None of 0 layers."""
    require(width % heads == 0, "the width is a multiple of the heads", width=width, heads=heads)
    if 0 in stack:
        return {}
    shapes = {"qkv": (3, heads, width, width // heads), "out": (heads, width // heads, width)}
    biases = {"qkv": (3, heads, width // heads), "out": (width,)}
    if inner is not None:
        shapes |= {"up": (width, inner), "down": (inner, width)}
        biases |= {"up": (inner,), "down": (width,)}
    params = {part: 0.02 * torch.randn(*stack, *shape) for part, shape in shapes.items()}
    params |= {f"{part}_bias": torch.zeros(*stack, *shape) for part, shape in biases.items()}
    params |= {"norm": torch.ones(*stack, 2, width), "norm_bias": torch.zeros(*stack, 2, width)}
    return {f"{name}_{part}": p for part, p in params.items()}


def layer_of(p: Params, name: str, at: tuple[int, ...]) -> Params:
    """The parameters of one layer, without the name of their part."""
    return {n.removeprefix(f"{name}_"): t[at] for n, t in p.items() if n.startswith(f"{name}_")}


def slow_norm(x: Tensor, p: Params, i: int, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / spread * p["norm"][i] + p["norm_bias"][i]


def slow_exchange(
    x: Tensor, source: Tensor | None, p: Params, eps: float, mask: Tensor | None = None
) -> Tensor:
    """x [N, C] plus what it takes from a source [M, C], None: from itself. mask [N, M], True = attend."""
    y = slow_norm(x, p, 0, eps)
    asked = y if source is None else slow_norm(source, p, 1, eps)
    for h in range(len(p["out"])):
        (w_q, w_k, w_v), (b_q, b_k, b_v) = p["qkv"][:, h], p["qkv_bias"][:, h]
        q, k, v = y @ w_q + b_q, asked @ w_k + b_k, asked @ w_v + b_v
        s = q @ k.mT / q.shape[1] ** 0.5
        s = s if mask is None else s.masked_fill(~mask.to(s.device), -torch.inf)
        x = x + s.softmax(-1) @ v @ p["out"][h]
    return x + p["out_bias"]


def slow_layer(x: Tensor, p: Params, eps: float, mask: Tensor | None = None) -> Tensor:
    x = slow_exchange(x, None, p, eps, mask)
    middle = slow_norm(x, p, 1, eps) @ p["up"] + p["up_bias"]
    return x + (middle * (1 + torch.erf(middle / 2**0.5)) / 2) @ p["down"] + p["down_bias"]


def norm(x: Tensor, p: Params, i: int, eps: float) -> Tensor:
    """In the dtype of x, then in that of the weights, in which products are made."""
    weight, bias = (p[name][i].to(x.dtype) for name in ("norm", "norm_bias"))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(p["out"].dtype)


def exchange(x: Tensor, source: Tensor | None, p: Params, eps: float, mask: Tensor | None = None) -> Tensor:
    """As slow_exchange, of x [B, N, C] and a source [B, M, C]; mask [B|1, 1, N|1, M]. Rows may see nothing."""
    y = norm(x, p, 0, eps)
    asked = y if source is None else norm(source, p, 1, eps)
    weights, biases = p["qkv"], p["qkv_bias"][:, :, None]
    q, k, v = (t[:, None] @ weights[i] + biases[i] for i, t in enumerate((y, asked, asked)))
    out = softmax_attention(q, k, v, scale=q.shape[3] ** -0.5, mask=mask)
    return x + (out @ p["out"]).sum(1) + p["out_bias"]


def layer(x: Tensor, p: Params, eps: float, mask: Tensor | None = None) -> Tensor:
    x = exchange(x, None, p, eps, mask)
    return x + F.gelu(norm(x, p, 1, eps) @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def code(number: Tensor, width: int) -> Tensor:
    """[..., width] sines, then cosines, of numbers [...]."""
    half = (width + 1) // 2
    rates = 10000.0 ** (-torch.arange(half, device=number.device, dtype=torch.float64) / half)
    turns = number[..., None] * rates
    return torch.cat([turns.sin(), turns.cos()], -1)[..., :width]


def slow_code(number: int, width: int) -> list[float]:
    """Of one number, sine by sine."""
    half = (width + 1) // 2
    turns = [number / 10000 ** (i / half) for i in range(half)]
    return [*map(math.sin, turns), *map(math.cos, turns)][:width]
