"""Every n tokens: a method's cuts are put together, and the cache grows between them.

    a text of ℓ tokens is cut to the budget when ℓ passes a multiple of n        the method's own choice, made for once
    after a prompt it is cut as the method says, or not at all until then

where most methods let one token go for each that comes, and score all that is stored to find it. Once in n steps costs
an n-th, and what came since the last cut is judged by what followed it. Between cuts a head holds up to n tokens more.

>>> due(torch.tensor([11, 12, 13]), torch.tensor([1, 1, 1]), Config(n=4))
tensor([False,  True, False])
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from regard.core import Card, Unsupported, require
from regard.kinds.cache import CachePage
from regard.ops import View


@dataclass(frozen=True)
class Config:
    # tokens of the text between two cuts; larger: fewer cuts, and up to so many tokens more in between
    n: int = 512
    prompt: bool = True  # whether the end of a prompt is a cut too; False: multiples of n alone

    def __post_init__(self) -> None:
        require(self.n >= 1, "n >= 1", n=self.n)


def due(length: Tensor, fresh: Tensor, cfg: Config) -> Tensor:
    """[1|B] rows whose text is cut now, of so many tokens of which `fresh` came in this step."""
    passed = length // cfg.n > (length - fresh) // cfg.n
    return passed | (fresh > 1) if cfg.prompt else passed


def wrap(page: CachePage, cfg: Config) -> CachePage:
    if page.keep is None and page.score is None:
        raise Unsupported(f"every says when tokens go, and {page.card.title} lets none go")
    if page.due is not None:
        raise Unsupported(f"every says when tokens go, and {page.card.title} says so itself")

    def now(view: View, below: Any) -> Tensor:
        return due(view.length(), view.fresh(), cfg).expand(len(view.budget))

    return replace(page, due=now, phase="both", by_place=False)


METHOD = CachePage(
    config=Config,
    wrap=wrap,
    over="knorm",
    patterns=("causal_self",),
    card=Card(
        title="Every n tokens",
        paper="DecodingPress of NVIDIA/kvpress",
        year=2025,
        idea="tokens go once in n steps of decoding, several at a time, and the cache grows between",
        cost="that of the method below in one of n steps of decoding",
        state="that of the method below, and up to n tokens per head more",
        needs=("decoder-lm",),
        lineage=("knorm",),
        neutral={"n": 1 << 30, "prompt": False},
        caveat="kvpress counts the steps of decoding, all rows together; here each row counts its own tokens, so cuts "
        "come at multiples of n. Its DecodingPress leaves the prompt whole until the first cut (prompt=False), and "
        "scores with up to 256 of the latest hidden states; here a method has the queries that it asks for",
    ),
)
