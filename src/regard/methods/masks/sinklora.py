"""SinkLoRA's SF-Attn: attention within groups, some heads with shifted groups, and sinks that every group sees.

    i sees j for head h  if  j ≤ i  and  (⌊(i + s_h) / group⌋ = ⌊(j + s_h) / group⌋  or  j < sinks)
    s_h = ⌊group / 2⌋ for the last  kept - ⌊returned · kept⌋  heads, kept = heads - ⌊heads / 2⌋,  0 for the others

It is for fine-tuning to longer texts, by the cost of short ones; the tuned model then attends to everything. With
returned = 0 and sinks = 0 it is LongLoRA's S²-Attn: half of the heads have their groups shifted by half a group, so
that what one layer reads in a group goes on to the next group in the layer above. The heads that are returned have
plain groups again, and the sinks give every group the tokens on which a trained model leaves its spare weight.

Two heads, groups of 4, one sink: token 9 reads the group 8 to 11, and the shifted one 6 to 9.

>>> build(Config(heads=2, group=4, returned=0.0, sinks=1)).row(9)[0]
tensor([[ 0,  8,  9, -1, -1],
        [ 0,  6,  7,  8,  9]])
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, causal, first, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    heads: int = 32  # query heads of a layer
    group: int = 2048  # a quarter of the longer text
    returned: float = 0.5  # share of the shifted heads
    sinks: int = 4  # first tokens, which every group sees

    def __post_init__(self) -> None:
        require(self.heads >= 1 and self.group >= 1, "heads, group >= 1", heads=self.heads, group=self.group)
        require(0 <= self.returned <= 1, "0 <= returned <= 1", returned=self.returned)
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)

    @property
    def shifted(self) -> int:
        """How many heads have shifted groups: the last ones."""
        half = self.heads - self.heads // 2
        return half - int(self.returned * half)


@predicate()
def same_group(at: Coordinates, heads: int, group: int, shifted: int) -> Tensor:
    shift = (at.h >= heads - shifted) * (group // 2)
    return (at.q + shift) // group == (at.k + shift) // group


def build(cfg: Config) -> Mask:
    return causal() & (same_group(cfg.heads, cfg.group, cfg.shifted) | first(cfg.sinks))


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("causal_self",),
    test_settings=(
        {"heads": 4, "group": 6, "returned": 0.5, "sinks": 2},
        {"heads": 3, "group": 5, "returned": 0.0},
    ),
    card=Card(
        title="SinkLoRA (SF-Attn)",
        paper="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models, "
        "arXiv:2406.05678",
        year=2024,
        idea="groups with some heads shifted by half a group, and sinks seen by all of them, for fine-tuning",
        cost="at most group + sinks keys per query and head",
        state="all keys: the tuned model attends to everything",
        lineage=("sinks", "window"),
        neutral={"group": 2**40},
        caveat=(
            "how many heads return and how many sinks there are is not said in what could be read of the paper: the "
            "defaults are choices of ours. Its repository holds LongLoRA's S²-Attn alone (group = a quarter of the "
            "text, the last half of the heads), neither returned heads nor sinks. There the shift is cyclic, and the "
            "first half group shares a group with the end of the text, which it sees; here the two are groups of "
            "their own and nobody sees later tokens. LoRA, and H2O at inference, are not part of the mask"
        ),
    ),
)
