"""Document mask: texts packed into one row do not see each other.

    i sees j  if  document_i = document_j

Short texts are packed end to end to waste no padding; each must come out as if it were alone. Compose it with
causality: `causal() & document`.

>>> from regard.core.roles import Roles
>>> build(Config()).dense(4, roles=Roles(document=[0, 0, 1, 1])).int()[0, 0]
tensor([[1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.mask import Coordinates, Mask, Tiles, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    """Nothing to set: the role `document` numbers the text that a token belongs to."""


def document_tiles(at: Tiles) -> tuple[Tensor, Tensor]:
    (q0, q1), (k0, k1) = at.q_role("document"), at.k_role("document")
    return (q0 <= k1) & (k0 <= q1), (q0 == q1) & (q0 == k0) & (q0 == k1)


@predicate("document", tiles=document_tiles)
def same_document(at: Coordinates) -> Tensor:
    return at.q_role("document") == at.k_role("document")


def build(cfg: Config) -> Mask:
    return same_document()


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("self", "causal_self"),
    card=Card(
        title="Document mask",
        paper="Efficient Sequence Packing without Cross-contamination (2021)",
        year=2021,
        idea="texts packed into one row do not see each other",
        cost="the sum of the squares of the documents' lengths",
        state="one label per token",
        needs=("document",),
        lineage=("causal",),
        caveat="positions go on through the row unless they are started anew for each document",
    ),
)
