"""Sliding window: a token sees `window` keys, itself included.

    i sees j  if  -ahead ≤ i - j < window - ahead

L layers pass information over L · (window - 1) tokens, although each reads only its neighbourhood.
`ahead` of the keys lie after the token, for encoders; 0 is the causal window.

>>> build(Config(window=3)).row(9)
tensor([[[7, 8, 9]]])
>>> build(Config(window=3, ahead=1)).row(5, 10)
tensor([[[4, 5, 6]]])
"""

from dataclasses import dataclass

from regard.core import Card, mask
from regard.core.errors import require
from regard.core.mask import Mask
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    window: int = 4096  # keys that a token sees, itself included
    ahead: int = 0  # of these, the keys after the token; 0: the causal window

    def __post_init__(self) -> None:
        require(0 <= self.ahead < self.window, "0 <= ahead < window", ahead=self.ahead, window=self.window)


def build(cfg: Config) -> Mask:
    return mask.window(cfg.window, cfg.ahead)


METHOD = MaskPage(
    config=Config,
    build=build,
    looks_ahead=lambda cfg: cfg.ahead > 0,
    patterns=("self", "causal_self"),
    card=Card(
        title="Sliding window",
        paper="Longformer: The Long-Document Transformer, arXiv:2004.05150",
        year=2020,
        idea="a token sees its neighbourhood; depth carries information further",
        cost="`window` keys per query",
        state="`window` keys",
        neutral={"window": 2**40},
        caveat=(
            "the default is Mistral 7B's (arXiv:2310.06825). Longformer's window is centred: ahead = window "
            "// 2. Libraries count differently: for window = 8 some show 9 keys, or 17"
        ),
    ),
)
