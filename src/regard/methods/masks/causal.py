"""Causal mask: a token sees itself and what came before.

    i sees j  if  j ≤ i

A decoder that predicts token i + 1 from row i must not have read it. With fewer queries than keys the
last query sees the end of the keys, as in a decode step.

>>> build(Config()).dense(2, 4).int()[0, 0]
tensor([[1, 1, 1, 0],
        [1, 1, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from regard.core import Card
from regard.core.mask import Mask, causal
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    """Nothing to set."""


def build(cfg: Config) -> Mask:
    return causal()


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("causal_self",),
    card=Card(
        title="Causal mask",
        paper="Attention Is All You Need, arXiv:1706.03762, section 3.2.3",
        year=2017,
        idea="a token sees itself and everything before it",
        cost="N / 2 keys per query on average",
        state="all keys",
        caveat=(
            "fewer queries than keys are aligned at the end; `is_causal` of scaled_dot_product_attention "
            "aligns them at the start"
        ),
    ),
)
