"""Causal cross-attention mask: early queries of a video projector read early frames, the last ones read all.

    query n of N sees frame t of T  if  (t - 1) / T < n / N          n and t counted from 1
                                    or  t ≤ ⌈n T / N⌉                the same, in whole numbers

N learned queries ask the patches of any number of frames. Without a mask, and without positions, their answer is that
of a bag of frames: no order. With it query n is a summary of the video up to its n-th part, for 16 frames as for 96,
and every query sees the first frame; one frame, an image, is unmasked.

A mask of two texts reads one role on both sides: `frame` of a key is its frame, from 0, and `frame` of a query the last
frame that it sees. `video_roles` gives both. Four queries; two frames of two patches, then three frames of one:

>>> build(Config()).dense(4, 4, roles=video_roles(queries=4, frames=2, patches=2)).int()[0, 0]
tensor([[1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1]], dtype=torch.int32)
>>> build(Config()).dense(4, 3, roles=video_roles(queries=4, frames=3)).int()[0, 0]
tensor([[1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [1, 1, 1]], dtype=torch.int32)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, predicate
from regard.core.roles import Roles
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    """Nothing to set: the roles say how many queries and frames there are."""


def video_roles(queries: int, frames: int | Sequence[int], patches: int = 1) -> tuple[Roles, Roles]:
    """The roles (of the queries, of the keys) of one video, or of a batch of videos whose last frames are padding.

    frames: how many each video has; the keys are those of the longest, its patches frame by frame.
    """
    count = torch.as_tensor(frames).view(-1, 1)  # [B, 1]
    least = min(queries, patches, int(count.min()))
    require(least >= 1, "queries, frames, patches >= 1", queries=queries, frames=frames, patches=patches)
    part = torch.arange(1, queries + 1)  # n
    last = (part * count + queries - 1) // queries - 1  # [B, N]: ⌈n T / N⌉, from 0
    frame = torch.arange(int(count.max())).repeat_interleave(patches)  # [M]
    return Roles(frame=last if len(last) > 1 else last[0]), Roles(frame=frame)


@predicate("frame")
def begun(at: Coordinates) -> Tensor:
    return at.k_role("frame") <= at.q_role("frame")


def build(cfg: Config) -> Mask:
    return begun()


METHOD = MaskPage(
    config=Config,
    build=build,
    patterns=("cross",),
    card=Card(
        title="Causal cross-attention mask (Video-CCAM)",
        paper="Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short and "
        "Long Videos, arXiv:2408.14023",
        year=2024,
        idea="query n of N reads the frames up to the n-th part of the video: order in a projector, for any length",
        cost="about half of queries times patches",
        needs=("frame",),
        lineage=("causal",),
        caveat=(
            "the released wrapper loads the projector from elsewhere, and its rounding at the borders was not to be "
            "found: here a frame is seen by the query in whose part it begins, and by all later ones, so that the last "
            "frame is not left to the last query alone. No temporal embedding. Of a batch, frames after a video's own "
            "are seen by no query of it"
        ),
    ),
)
