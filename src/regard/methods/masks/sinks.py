"""Sinks and window: the first tokens stay visible beside a sliding window.

    i sees j  if  j ≤ i  and  (i - j < window  or  j < sinks)

Softmax must put its weight somewhere, and trained models put what they do not need on the first tokens. A
window that drops these changes every weight; four of them kept beside the window restore the model.

>>> build(Config(sinks=2, window=3)).row(9)
tensor([[[0, 1, 7, 8, 9]]])
"""

from dataclasses import dataclass

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Mask, causal, first, window
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    sinks: int = 4  # first tokens, always seen; 0: the window alone
    window: int = 2000  # last tokens, the token itself included

    def __post_init__(self) -> None:
        require(
            self.sinks >= 0 and self.window >= 1,
            "sinks >= 0, window >= 1",
            sinks=self.sinks,
            window=self.window,
        )


def build(cfg: Config) -> Mask:
    return causal() & (window(cfg.window) | first(cfg.sinks))


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("causal_self",),
    card=Card(
        title="Sinks and window",
        paper="Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453",
        year=2023,
        idea="the first tokens, where softmax leaves its spare weight, and the latest",
        cost="sinks + window keys per query",
        state="sinks + window keys",
        lineage=("window",),
        neutral={"window": 2**40},
        caveat=(
            "the mask alone: positions stay those of the text, where the paper counts them within the cache"
        ),
    ),
)
