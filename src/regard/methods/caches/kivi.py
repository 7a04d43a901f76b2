"""KIVI: old keys and values in 2 bits, keys quantised by channel, values by token, the newest tokens as they are.

    K̂ = min + s · round((K - min) / s)      in each channel, over `group` tokens     s = (max - min) / (2^bits - 1)
    V̂ = the same                            in each token, over `group` channels

where keys have a few channels of large numbers, which a scale by channel keeps to themselves, and values have none:
there an error in one token stays with that token. The newest `residual` tokens are stored as they are; whenever `group`
more have come, the oldest of these are packed. Laid over another method, what it keeps is stored so.
"""

from dataclasses import asdict, dataclass
from functools import partial

from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage, storing
from regard.ops.codec import Codec, Parts, coded, restored, scales


@dataclass(frozen=True)
class Config:
    bits: int = 2  # 2, 4, 8, or 16: nothing is packed
    group: int = 32  # tokens that share a key's scale in a channel; channels that share a value's scale
    residual: int = 128  # newest tokens that are stored as they are

    def __post_init__(self) -> None:
        require(self.bits in (2, 4, 8, 16), "bits is 2, 4, 8 or 16", bits=self.bits)
        require(self.group >= 1, "group >= 1", group=self.group)
        require(self.residual >= 0, "residual >= 0", residual=self.residual)


def pack(k: Tensor, v: Tensor, shared: Parts, told: Parts, cfg: Config) -> tuple[Parts, Parts]:
    """Codes of m tokens, m a multiple of the group; scales of keys by chunk of tokens, of values by token."""
    chunks = k.unflatten(2, (-1, cfg.group))  # [B, g, c, group, D]
    scale, zero = scales(chunks, cfg.bits, dim=3)
    keys = coded(chunks, scale, zero, cfg.bits).flatten(2, 3)
    parts = v.unflatten(-1, (-1, channels(v.shape[-1], cfg)))  # [B, g, m, E / group, group]
    v_scale, v_zero = scales(parts, cfg.bits, dim=-1)
    values = coded(parts, v_scale, v_zero, cfg.bits).flatten(3)
    slots = {"k": keys, "v": values, "v_scale": v_scale.flatten(3), "v_zero": v_zero.flatten(3)}
    return slots, {"k_scale": scale.squeeze(3), "k_zero": zero.squeeze(3)}


def unpack(slots: Parts, shared: Parts, chunk: Tensor | None, cfg: Config) -> tuple[Tensor, Tensor]:
    """Keys [B, g, n, D] and values [B, g, n, E] of what `pack` made."""
    scale, zero = (of_chunks(shared[name], chunk, cfg.group) for name in ("k_scale", "k_zero"))
    keys = restored(slots["k"], scale, zero, cfg.bits)
    codes = slots["v"].unflatten(-1, (slots["v_scale"].shape[-1], -1))
    values = restored(codes, slots["v_scale"][..., None], slots["v_zero"][..., None], cfg.bits)
    return keys, values.flatten(3)


def of_chunks(x: Tensor, chunk: Tensor | None, size: int) -> Tensor:
    """[B, g, n, D] entries of x [B, g, c, D] for the chunk of each slot."""
    if chunk is None:
        return x.repeat_interleave(size, 2)
    return x.take_along_dim(chunk.long()[..., None], 2)


def channels(width: int, cfg: Config) -> int:
    """Channels of a value that share a scale: the group, or all where a head has fewer."""
    size = min(cfg.group, width)
    rule = "a head's width is a multiple of the group, and a group's codes fill whole bytes"
    fits = width % size == 0 and size * cfg.bits % 8 == 0
    require(fits, rule, width=width, group=cfg.group, bits=cfg.bits)
    return size


def stored(page: CachePage, cfg: Config) -> CachePage:
    if cfg.bits == 16:
        return page
    method = ("kivi", asdict(cfg))
    codec = Codec(partial(pack, cfg=cfg), partial(unpack, cfg=cfg), cfg.group, cfg.residual, method)
    return storing("kivi", page, lambda: codec)


METHOD = CachePage(
    config=Config,
    wrap=stored,
    patterns=("causal_self",),
    test_settings=({"group": 4, "residual": 3},),
    card=Card(
        title="KIVI",
        paper="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        year=2024,
        idea="2-bit codes with scales by channel for keys and by token for values, beside a window of exact tokens",
        cost="unpacks all codes at every step; no fused kernel",
        state="all tokens, old ones in bits / 16 of their bytes and two scales for each group",
        needs=("decoder-lm",),
        neutral={"bits": 16},
        caveat="released code packs keys whenever a whole residual is full, so that 0 to 128 of the newest are exact, "
        "and values one by one; here both keep the newest 128 to 159. Tokens are grouped in the order of each row's "
        "text, padding left out. Scales are in the model's dtype",
    ),
)
