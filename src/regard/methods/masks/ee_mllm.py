"""Composite attention: words ask, image tokens do not.

    word i   sees  every image token, and word j if j ≤ i
    image i  sees  itself alone ("value"), nothing ("nothing"), or as in causal attention ("causal")

Most tokens of a prompt are of images, and most scores are between them. Here no image token has a score: words read
images as in cross-attention, with the keys and values of the layer's own weights, so that no weights are added.

What updates an image token is `visual`. "value": it sees itself alone, its weight is 1, and attention gives W_o W_v x
of itself, without a query or a score; the feed-forward layer follows. "nothing": attention gives 0, and the
feed-forward layer alone moves it. Two patches, then two words:

>>> from regard.core.roles import Roles
>>> build(Config()).dense(4, roles=Roles(image=[1, 1, 0, 0])).int()[0, 0]
tensor([[1, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, causal, predicate
from regard.kinds.mask import MaskPage

VISUAL = ("value", "nothing", "causal")


@dataclass(frozen=True)
class Config:
    visual: str = "value"  # what an image token sees: itself alone, nothing, or all before it
    ahead: bool = True  # words see images that stand after them too; False: only those before

    def __post_init__(self) -> None:
        require(self.visual in VISUAL, f"visual is one of {', '.join(VISUAL)}", visual=self.visual)


@predicate("image")
def word_asks(at: Coordinates) -> Tensor:
    return at.q_role("image") <= 0


@predicate("image")
def word_asks_image(at: Coordinates) -> Tensor:
    return (at.q_role("image") <= 0) & (at.k_role("image") > 0)


@predicate()
def itself(at: Coordinates) -> Tensor:
    return at.q == at.k


def build(cfg: Config) -> Mask:
    asking = {"value": word_asks() | itself(), "nothing": word_asks()}
    seen = causal() if cfg.visual == "causal" else causal() & asking[cfg.visual]
    return seen | word_asks_image() if cfg.ahead else seen


METHOD = MaskPage(
    config=Config,
    build=build,
    looks_ahead=lambda cfg: cfg.ahead,
    patterns=("causal_self",),
    test_settings=({"ahead": False}, {"visual": "causal"}),
    card=Card(
        title="Composite attention (EE-MLLM)",
        paper="EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model, arXiv:2408.11795",
        year=2024,
        idea="image tokens attend to nothing; words attend to images and to past words with the layer's own weights",
        cost="words times all tokens",
        state="all keys",
        needs=("image",),
        lineage=("causal",),
        neutral={"visual": "causal", "ahead": False},
        caveat=(
            "EE-MLLM is trained with it; the paper's EE-MLLM-F, which is not, was not tried here. No code was "
            "found, and which weights update an image token is not known for sure: `visual` says it. Where images "
            "stand first `ahead` changes nothing; with ahead=False the mask is causal, for several turns, for "
            "decoding, and for models that are causal themselves. With visual='nothing' the queries of images see no "
            "key, and give zeros"
        ),
    ),
)
