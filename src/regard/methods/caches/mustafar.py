"""Mustafar: of each old key and value only the largest numbers are stored, with a bit for each place.

    K̃_tc = K_tc   if |K_tc| is among the (1 - s) D largest of token t, else 0          Ṽ the same, with its own share

where single numbers are pruned and not whole tokens or channels: at half of them the products change little, though
which ones matter differs from token to token. The newest tokens are stored whole. Laid over another method, what it
keeps is stored so.
"""

from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage, storing
from regard.ops.codec import Codec, Parts, marked_bits, unpacked_bits


@dataclass(frozen=True)
class Config:
    keys: float = 0.5  # share of the numbers of a key that is left out
    values: float = 0.5  # share of the numbers of a value that is left out
    window: int = 32  # newest tokens that are stored whole

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            require(0 <= getattr(self, name) < 1, f"0 <= {name} < 1", **{name: getattr(self, name)})
        require(self.window >= 0, "window >= 0", window=self.window)


def largest(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The numbers [..., d (1 - share)] of x [..., d] that stay, in order, and a bit for each place."""
    count = x.shape[-1] - int(x.shape[-1] * share)
    # of equals the first, as a stable sort has it
    order = x.abs().argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
    marks = torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, True)
    return x.gather(-1, order), marked_bits(marks)


def whole(numbers: Tensor, marks: Tensor, width: int) -> Tensor:
    """x [..., width] with the numbers at the marked places, and zeros."""
    there = unpacked_bits(marks, 1)[..., :width].bool()
    place = (there.cumsum(-1) - 1).clamp(min=0)
    return numbers.gather(-1, place).masked_fill(~there, 0)


def pack(k: Tensor, v: Tensor, shared: Parts, told: Parts, cfg: Config) -> tuple[Parts, Parts]:
    (keys, key_marks), (values, value_marks) = largest(k, cfg.keys), largest(v, cfg.values)
    slots = {"k": keys, "k_marks": key_marks, "v": values, "v_marks": value_marks}
    widths = torch.tensor([k.shape[-1], v.shape[-1]], device=k.device)
    return slots, {} if shared else {"widths": widths.expand(*k.shape[:2], 1, 2)}


def unpack(slots: Parts, shared: Parts, chunk: Tensor | None) -> tuple[Tensor, Tensor]:
    width, value_width = shared["widths"][0, 0, 0].tolist()
    return whole(slots["k"], slots["k_marks"], width), whole(slots["v"], slots["v_marks"], value_width)


def stored(page: CachePage, cfg: Config) -> CachePage:
    codec = Codec(partial(pack, cfg=cfg), unpack, 1, cfg.window, ("mustafar", asdict(cfg)))
    return storing("mustafar", page, lambda: codec)


METHOD = CachePage(
    config=Config,
    wrap=stored,
    patterns=("causal_self",),
    test_settings=({"keys": 0.6, "values": 0.4, "window": 3},),
    card=Card(
        title="Mustafar",
        paper="Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
        year=2025,
        idea="the small numbers of each key and value are left out, those that stay lie behind a bitmap",
        cost="fills the gaps of all tokens at every step; no sparse kernel",
        state="all tokens, old ones with 1 - s of their numbers and a bit for each",
        needs=("decoder-lm",),
        neutral={"keys": 0.0, "values": 0.0},
        caveat="released code pads what stays of a token to a multiple that its kernel wants, and packs tokens in "
        "blocks; here every token is packed when it leaves the window",
    ),
)
