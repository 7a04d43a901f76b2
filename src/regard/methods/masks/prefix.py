"""Prefix mask: the prompt is read in both directions, what follows it causally.

    i sees j  if  j ≤ i  or  j < prefix

The prompt is given, not predicted, so its tokens may look ahead within it; one decoder then encodes and
decodes.

>>> build(Config(prefix=2)).dense(4).int()[0, 0]
tensor([[1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Mask, causal, first
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    prefix: int = 128  # tokens of the prompt, which all tokens see; 0: the causal mask

    def __post_init__(self) -> None:
        require(self.prefix >= 0, "prefix >= 0", prefix=self.prefix)


def build(cfg: Config) -> Mask:
    return causal() | first(cfg.prefix)


METHOD = MaskPage(
    config=Config,
    build=build,
    looks_ahead=True,
    patterns=("causal_self",),
    card=Card(
        title="Prefix mask",
        paper=(
            "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, "
            "arXiv:1910.10683"
        ),
        year=2019,
        idea="both directions within the prompt, causal after it",
        cost="as causal, and the upper half of the prompt",
        state="all keys",
        lineage=("causal",),
        neutral={"prefix": 0},
        caveat=(
            "one prefix length for all rows; the paper gives each example its own. The default is a choice "
            "of ours. Not causal inside the prefix: do not train next-token prediction there"
        ),
    ),
)
