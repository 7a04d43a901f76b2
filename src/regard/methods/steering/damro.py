"""DAMRO: decoding away from what the model says of the few patches that the tower's class token attends to most.

    outliers = the k patches of highest mean_h A_h[class token, patch]        at the tower's last layer but one
    ℓ' = (1 + α) ℓ(all patches) - α ℓ(outliers alone)        only tokens with ℓ >= max ℓ + log β stay

In large towers these patches lie in the background and hold what the tower has made of the whole image; the decoder
attends to them too, and then says what is not there.

>>> import torch
>>> A = torch.tensor([[[0.1, 0.5, 0.2, 0.2], [0.3, 0.1, 0.4, 0.2]]])  # means 0.2, 0.3, 0.3, 0.2
>>> outliers(A, 3)  # of equal ones the first
tensor([[ True,  True,  True, False]])
>>> contrasted(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 3.0]]), 2.0, 0.1)  # 3·2 - 2·1, 3·1 - 2·3
tensor([[ 4., -3.]])
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Stream, contrasted, plainly_contrasted

OUTLIERS = "outliers"


@dataclass(frozen=True)
class Config:
    patches: int = 10  # k; all, where an image has fewer
    strength: float = 2.0  # α
    cut: float = 0.1  # β; 0 keeps every token
    layer: int = -2  # of the tower

    def __post_init__(self) -> None:
        require(self.patches >= 1, "a patch or more", patches=self.patches)
        require(self.strength >= 0, "strength >= 0", strength=self.strength)
        require(0 <= self.cut <= 1, "0 <= cut <= 1", cut=self.cut)


def outliers(attention: Tensor, patches: int) -> Tensor:
    """[B, P] which patches the class token attends to most, from its weights [B, H, P]; of equal ones the first."""
    require(attention.dim() == 3, "weights of the class token, [B, H, P]", weights=tuple(attention.shape))
    order = at_least_float32(attention).mean(1).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[:, :patches], True)


def prepare(runs: Any, at: Any, cfg: Config) -> Tensor:
    return outliers(at.class_attention(cfg.layer), cfg.patches)


def streams(cfg: Config) -> tuple[Stream, ...]:
    return (Stream(OUTLIERS, hide="image", show=lambda memory: memory),) if cfg.strength else ()


def logits(at: Any, logits: Mapping[str, Tensor], cfg: Config) -> Tensor:
    return contrasted(logits["main"], logits.get(OUTLIERS, logits["main"]), cfg.strength, cfg.cut)


def measure(attention: Tensor, said: Tensor, by_outliers: Tensor, cfg: Config) -> dict:
    """The outliers [B, P], and the probabilities of the next token from what both passes say [B, V]."""
    given = {"main": said, OUTLIERS: by_outliers}
    return {"outliers": outliers(attention, cfg.patches), "next": logits(None, given, cfg).softmax(-1)}


def reference(attention: Tensor, said: Tensor, by_outliers: Tensor, cfg: Config) -> dict:
    """The most attended patch taken out again and again; token by token of what is said."""
    rows = [
        plainly_contrasted(row, [other], cfg.strength, cfg.cut)
        for row, other in zip(said.tolist(), by_outliers.tolist())
    ]
    found = [plain_outliers(text, cfg.patches) for text in attention.tolist()]
    return {"outliers": torch.tensor(found), "next": torch.tensor(rows, dtype=torch.float64)}


def plain_outliers(heads: list[list[float]], patches: int) -> list[bool]:
    total = [math.fsum(column) for column in zip(*heads)]
    left = list(range(len(total)))
    while left and len(total) - len(left) < patches:
        left.remove(max(left, key=lambda p: total[p]))  # the first of equal ones
    return [p not in left for p in range(len(total))]


def cases(seed: int) -> Iterable[tuple]:
    """Defaults; fewer patches than k; one patch; equal patches; heads that disagree; float32; no cut; no strength."""
    g = torch.Generator().manual_seed(seed)

    def drawn(batch: int, heads: int, patches: int, words: int, dtype: torch.dtype = torch.float64) -> list:
        attention = (2 * torch.randn(batch, heads, patches, generator=g, dtype=dtype)).softmax(-1)
        return [attention, *(2 * torch.randn(batch, words, generator=g, dtype=dtype) for _ in range(2))]

    yield *drawn(2, 4, 64, 9), Config()
    yield *drawn(2, 4, 6, 5), Config(patches=9, strength=0.5)
    yield *drawn(1, 1, 1, 1), Config(patches=1)
    yield *drawn(3, 2, 20, 5, torch.float32), Config(patches=4)
    yield *drawn(2, 3, 12, 5), Config(cut=0.0)
    yield *drawn(2, 3, 12, 5), Config(strength=0.0)
    attention, said, other = drawn(2, 2, 8, 6)
    attention[0] = 0.125
    yield attention, said.round(), other, Config(patches=3, cut=1.0)


METHOD = SteeringPage(
    config=Config,
    prepare=prepare,
    streams=streams,
    logits=logits,
    measure=measure,
    reference=reference,
    cases=cases,
    needs_image=True,
    test_settings=({"patches": 2, "strength": 0.5},),
    card=Card(
        title="DAMRO",
        paper="DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
        year=2024,
        idea="decode away from what the model says of the patches that the tower's class token attends to most",
        cost="a second pass at every step, with its own cache",
        needs=("decoder-lm", "a vision tower with a class token"),
        lineage=("vcd", "registers"),
        neutral={"strength": 0.0, "cut": 0.0},
        caveat="the released LLaVA path ranks by one softmax over the full width in the place of the heads' mean, "
        "which its InstructBLIP path takes, and gives the outliers in the order of their scores at new positions; here "
        "they stay where they are, and the other patches are hidden. k = 10 and α = 2 are the code's for LLaVA-1.5; "
        "for InstructBLIP k = 4 and α = 0.5 or 1.5. Whether such patches lie in the background depends on the tower: "
        "in small ones they may not",
    ),
)
