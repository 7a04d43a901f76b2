"""Uni-Encoder: one encoder reads a context and all candidate replies, which do not see each other.

    row        context, candidate 1, candidate 2, ...
    arrow      the context sees all; a candidate sees the context and itself
    diag       the context sees itself, a candidate itself: two encoders that never meet
    square     all see all
    position   candidates all start where the context ends

A reply is ranked by a linear map of the mean of its last states. A cross-encoder reads the context once more for every
candidate; here it is read once, and since candidates share positions and are hidden from each other, their order does
not matter.

>>> roles = Roles(candidate=[-1, -1, 0, 0, 1])
>>> build(Config()).dense(5, roles=roles).int()[0, 0]
tensor([[1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1]], dtype=torch.int32)
>>> positions(roles, Config())
tensor([0, 1, 2, 3, 2])
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, predicate
from regard.core.roles import Roles
from regard.kinds.position import PositionPage

SHAPES = ("arrow", "diag", "square")


@dataclass(frozen=True)
class Config:
    """The role `candidate` numbers the candidates from 0; it is -1 in the context."""

    # arrow: candidates see the context and themselves; diag: no text sees another; square: all see all
    shape: Literal["arrow", "diag", "square"] = "arrow"

    def __post_init__(self) -> None:
        require(self.shape in SHAPES, f"shape is one of {', '.join(SHAPES)}", shape=self.shape)


@predicate("candidate")
def shaped(at: Coordinates, shape: str) -> Tensor:
    q, k = at.q_role("candidate"), at.k_role("candidate")
    same_text = q == k
    return same_text if shape == "diag" else same_text | (q < 0) | (k < 0) | (shape == "square")


def build(cfg: Config) -> Mask:
    return shaped(cfg.shape)


def positions(roles: Roles, cfg: Config) -> Tensor:
    """Positions of the roles' shape: tokens of the context so far, and of the own candidate; padding is not counted."""
    candidate = roles["candidate"].clamp(min=-1)
    real = roles["padding"] == 0 if "padding" in roles else torch.ones_like(candidate, dtype=torch.bool)
    candidate, real = torch.broadcast_tensors(candidate, real)
    # [.., N, 1 + candidates]: tokens so far of the context and of each candidate
    so_far = (torch.nn.functional.one_hot(candidate + 1) * real[..., None]).cumsum(-2)
    own = so_far.gather(-1, candidate[..., None] + 1)[..., 0] - 1
    return (own + so_far[..., 0] * (candidate >= 0)).clamp(min=0)


METHOD = PositionPage(
    config=Config,
    positions=positions,
    build=build,
    looks_ahead=True,
    patterns=("self",),
    test_settings=({"shape": "diag"},),
    card=Card(
        title="Uni-Encoder",
        paper="Uni-Encoder: A Fast and Accurate Response Selection Paradigm for Generation-Based Dialogue Systems, "
        "arXiv:2106.01263",
        year=2021,
        idea="context and all candidates in one pass; candidates share positions and are hidden from each other",
        cost="context · (context + candidates) + candidates · (context + candidate) pairs",
        needs=("candidate",),
        lineage=("document",),
        neutral={"shape": "square"},
        caveat=(
            "the context sees every candidate, so a score depends on which others stand in the row: only their order "
            "does not matter. Scoring and its losses are not part of the mask. Padding is left out as by the authors' "
            "code, where padding rows see nothing"
        ),
    ),
)
