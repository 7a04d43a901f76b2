"""What fast paths of the TransNormer family share: decays by head and layer, and positions as waves (LRPE)."""

import math

import torch
from torch import Tensor

from regard.core.call import Call
from regard.ops.softmax import per_query_head

DECAYS = ("paper", "slopes")


def layer_decay(q: Tensor, decay: str, layer: int, layers: int) -> Tensor:
    """[H] log λ of head h of H in layer l of L, in float32 at least.

    "paper"   -8h/H · (1 - l/L), all counted from 0, so head 0 never forgets
    "slopes"  -2^(-8(h + 1)/H) · (1 - l/(L - 1) + 1e-5), that of the released models; with one layer its second
              term is 0. Heads beyond a power of two lie between those before
    """
    heads = q.shape[1]
    h = torch.arange(heads, device=q.device).to(q.dtype if q.dtype == torch.float64 else torch.float32)
    if decay == "paper":
        return -8 * h / heads * (1 - layer / layers)
    power = 2 ** int(math.log2(heads))
    slope = 2 ** (-8 / power * torch.where(h < power, h + 1, h - power + 0.5))
    return -slope * (1 - layer / max(layers - 1, 1) + 1e-5)


def with_waves(q: Tensor, k: Tensor, theta: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(q and k as waves [B, H, n, 2D], the position of the last key [B|1, H|1, 1]).

    A position is the count of the tokens that are there, from 1, so that an incoming state stands at 0.
    """
    n, m, heads = q.shape[2], k.shape[2], q.shape[1]
    key_mask = call.key_mask
    if key_mask is None:
        key_mask = torch.ones(1, 1, m, dtype=torch.bool, device=k.device)
    position = key_mask.cumsum(-1).to(q.dtype)
    last = position[..., -1:]
    k = per_query_head(k, heads).expand(-1, heads, -1, -1)
    return waves(q, last if call.cross else position[..., m - n :], theta), waves(k, position, theta), last


def waves(t: Tensor, position: Tensor, theta: Tensor) -> Tensor:
    """[B, H, n, 2D]: t [B, H, n, D] times the cosine, and times the sine, of position [B|1, H|1, n] times θ [H, D]."""
    # in float32 an angle of 100,000 is off by 0.004
    angle = position[..., None].double() * theta[:, None].double()  # [B|1, H, n, D]
    return torch.cat([t * angle.cos().to(t.dtype), t * angle.sin().to(t.dtype)], dim=-1)


def waves_moved(state: Tensor, steps: Tensor, theta: Tensor) -> Tensor:
    """The state [B, H, 2D, E] of keys as waves, seen from a token `steps` [B|1, H|1, 1] further on."""
    angle = (steps.double() * theta.double())[..., None]  # [B|1, H, D, 1]
    turn, shift = angle.cos().to(state.dtype), angle.sin().to(state.dtype)
    cos, sin = state.chunk(2, dim=2)
    return torch.cat([cos * turn + sin * shift, sin * turn - cos * shift], dim=2)
