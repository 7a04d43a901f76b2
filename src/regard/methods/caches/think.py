"""ThinK: channels of the keys that the last queries hardly use are not stored, by head.

    w_d = mean_t q_td² · mean_j k_jd²       over the first prompt's last w queries and all its keys
    the (1 - s) D channels with the largest w stay; a product q · k is the sum over these

where a few channels hold most of the norm of keys and queries, and which ones changes little through a text: each
row's first forward chooses them, its prompt. The newest tokens are stored whole. It takes away a part of every key and
no token, so it can be laid over any method that chooses tokens.
"""

from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage, storing
from regard.ops import View
from regard.ops.codec import Codec, Parts
from regard.ops.softmax import at_least_float32


@dataclass(frozen=True)
class Config:
    sparsity: float = 0.4  # share of the channels of keys that is not stored
    window: int = 32  # observing queries, and newest tokens that are stored whole

    def __post_init__(self) -> None:
        require(0 <= self.sparsity < 1, "0 <= sparsity < 1", sparsity=self.sparsity)
        require(self.window >= 1, "window >= 1", window=self.window)


def observe(view: View, cfg: Config) -> None:
    """Weigh the channels of each cache head by the first tokens of each row."""
    known, fresh = view.memory.get("channels"), view.fresh().expand(len(view.q)) > 0
    if known is not None and not bool((fresh & (known == 0).all(-1).all(-1)).any()):
        return
    asking = view.asking()
    asks = view.q.new_ones(1, view.new, dtype=torch.bool) if asking is None else asking
    last = asks & (asks.flip(-1).cumsum(-1).flip(-1) <= cfg.window)
    weights = squares(view.q, last[:, None]).unflatten(1, (view.groups, -1)).mean(2)
    weights = weights * squares(view.k, view.hold())
    new = known is None or (known == 0).all(-1).all(-1)[:, None, None]
    view.memory["channels"] = weights if known is None else torch.where(new, weights, known)


def squares(x: Tensor, real: Tensor) -> Tensor:
    """[B, h, D] mean squares of x [B, h, n, D] over the tokens that are `real` [.., .., n]."""
    share = real / real.sum(-1, keepdim=True).clamp(min=1)
    return (at_least_float32(x).square() * share[..., None]).sum(2)


def pack(k: Tensor, v: Tensor, shared: Parts, told: Parts, cfg: Config) -> tuple[Parts, Parts]:
    """Keys without the channels that are left out, which are chosen when the first tokens are packed."""
    new: Parts = {}
    if "channels" not in shared:
        count = k.shape[-1] - int(k.shape[-1] * cfg.sparsity)
        order = told["channels"].argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
        width = torch.full_like(order[..., :1], k.shape[-1])
        new = {"channels": torch.cat([order, width], -1)[:, :, None].to(torch.int16)}
    at = (new or shared)["channels"][..., :-1].long()
    return {"k": k.gather(-1, at.expand(-1, -1, k.shape[2], -1)), "v": v}, new


def unpack(slots: Parts, shared: Parts, chunk: Tensor | None) -> tuple[Tensor, Tensor]:
    k, at = slots["k"], shared["channels"].long()
    whole = k.new_zeros(*k.shape[:3], int(at[0, 0, 0, -1]))
    return whole.scatter(-1, at[..., :-1].expand(-1, -1, k.shape[2], -1), k), slots["v"]


def stored(page: CachePage, cfg: Config) -> CachePage:
    if cfg.sparsity == 0:
        return page
    codec = Codec(partial(pack, cfg=cfg), unpack, 1, cfg.window, ("think", asdict(cfg)))
    return storing("think", page, lambda: codec, partial(observe, cfg=cfg))


METHOD = CachePage(
    config=Config,
    wrap=stored,
    patterns=("causal_self",),
    test_settings=({"sparsity": 0.5, "window": 3},),
    card=Card(
        title="ThinK",
        paper="ThinK: Thinner Key Cache by Query-Driven Pruning",
        year=2024,
        idea="channels of keys that the last queries hardly use are left out, by head",
        cost="norms of keys and of the last queries, after the first prompt; fills the gaps of all keys at every step",
        state="all tokens, old keys with 1 - s of their channels",
        needs=("decoder-lm",),
        neutral={"sparsity": 0.0},
        caveat="channels are chosen before any of the prompt goes, and stay for later turns; of a prompt that is fed "
        "in chunks the first chooses. kvpress fills them with zeros and stores those",
    ),
)
