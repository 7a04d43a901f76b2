"""Frame-wise block causal attention: the patches of a frame see each other, and everything before the frame.

    i sees j  if  j ≤ i  or  frame_i = frame_j ≥ 0

Patches of one frame are there at once: a causal order among them is an accident of the raster. Frames stay causal among
each other, so what comes later changes no frame before it, and words see what they would see anyway.

The role `frame` numbers frames from 0, through all videos of a text; words have -1. Two frames of two patches, then a
word:

>>> from regard.core.roles import Roles
>>> build(Config()).dense(5, roles=Roles(frame=[0, 0, 1, 1, -1])).int()[0, 0]
tensor([[1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.mask import Coordinates, Mask, causal, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    """Nothing to set: the role `frame` numbers the frame that a token belongs to."""


@predicate("frame")
def same_frame(at: Coordinates) -> Tensor:
    frame = at.q_role("frame")
    return (frame >= 0) & (frame == at.k_role("frame"))


def build(cfg: Config) -> Mask:
    return causal() | same_frame()


METHOD = MaskPage(
    config=Config,
    build=build,
    looks_ahead=True,
    patterns=("causal_self",),
    card=Card(
        title="Frame-wise block causal mask (TC-LLaVA)",
        paper="TC-LLaVA: Rethinking the Transfer from Image to Video Understanding with Temporal Considerations, "
        "arXiv:2409.03206",
        year=2024,
        idea="both directions within a frame, causal between frames and in text",
        cost="as causal, and the upper half of every frame",
        state="all keys",
        needs=("frame",),
        lineage=("causal", "block_causal"),
        caveat=(
            "no code of the authors was found. A prompt is read by whole frames: a chunk that ends inside a frame "
            "misses its rest. Two videos number their frames on, else they share them. The paper's other half, "
            "Temporal-Aware Dual RoPE, is not here: public comparison code adds the temporal index to the global one "
            "(position + γ · frame, γ = 1) and disagrees on what the index of words is"
        ),
    ),
)
