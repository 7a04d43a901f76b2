"""Frame sink and short window (LongLive): a block of new frames reads the first frames of the video and the latest.

    f_i = ⌊i / frame⌋                      the frame of token i
    e_i = block (⌊f_i / block⌋ + 1) - 1    the last frame of its block
    i sees j  if  f_j ≤ e_i  and  (f_j < sinks  or  e_i - f_j < latest)

Frames of a block are generated together and see each other; blocks are causal. The latest frames end with the block
and count it, so a step reads sinks + latest frames however long the video: that many frames of K and V are all that is
kept. What lies further back is held together by the frame sink, the first frames of the video.

K and V of frames carry the prompt under which they were written: its words entered them by cross-attention in the
layers below. When the prompt changes they are written anew, by one pass over the finished frames under the new prompt
and this mask (KV-recache). One pass gives what frame by frame would have, since nothing here depends on later blocks.

>>> mask = build(Config(frame=1, sinks=1, latest=3, block=2))
>>> mask.dense(6).int()[0, 0]
tensor([[1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 1],
        [1, 0, 0, 1, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.errors import require
from regard.core.mask import Coordinates, Mask, Tiles, first, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    frame: int = 1560  # tokens of a frame
    sinks: int = 3  # frames at the start that stay visible
    latest: int = 9  # frames up to the end of the block, its own included
    block: int = 6  # frames that are generated together

    def __post_init__(self) -> None:
        require(
            self.frame >= 1 and self.sinks >= 0, "frame >= 1, sinks >= 0", frame=self.frame, sinks=self.sinks
        )
        require(1 <= self.block <= self.latest, "1 <= block <= latest", block=self.block, latest=self.latest)


def begun_tiles(at: Tiles, size: int) -> tuple[Tensor, Tensor]:
    return at.k0 // size <= at.q1 // size, at.k1 // size <= at.q0 // size


@predicate(tiles=begun_tiles)
def begun(at: Coordinates, size: int) -> Tensor:
    """Its own block of `size` tokens and all before."""
    return at.k // size <= at.q // size


def last_frame(q: Tensor, frame: int, block: int) -> Tensor:
    return block * (q // (frame * block) + 1) - 1


def recent_tiles(at: Tiles, frame: int, latest: int, block: int) -> tuple[Tensor, Tensor]:
    least = last_frame(at.q0, frame, block) - at.k1 // frame
    most = last_frame(at.q1, frame, block) - at.k0 // frame
    return least < latest, most < latest


@predicate(tiles=recent_tiles)
def recent(at: Coordinates, frame: int, latest: int, block: int) -> Tensor:
    """The `latest` frames up to the end of its block, and what lies after."""
    return last_frame(at.q, frame, block) - at.k // frame < latest


def build(cfg: Config) -> Mask:
    sinks, window = first(cfg.sinks * cfg.frame), recent(cfg.frame, cfg.latest, cfg.block)
    return begun(cfg.frame * cfg.block) & (sinks | window)


METHOD = MaskPage(
    config=Config,
    build=build,
    looks_ahead=True,
    patterns=("causal_self",),
    test_settings=({"frame": 1, "sinks": 1, "latest": 4, "block": 1},),
    card=Card(
        title="Frame sink and short window (LongLive)",
        paper="LongLive: Real-time Interactive Long Video Generation, arXiv:2509.22622",
        year=2025,
        idea="frames of a video read its first frames and the latest ones, whole frames at a time",
        cost="(sinks + latest) · frame keys per query",
        state="(sinks + latest) · frame keys",
        lineage=("sinks", "block_causal"),
        neutral={"frame": 1, "block": 1, "latest": 2**40},
        caveat=(
            "the mask alone; KV-recache, a pass of the whole model, is in the claim. Defaults are those of the first "
            "release's settings for inference, whose local attention of 12 frames counts the sink. That release "
            "recaches the last 12 frames only and leaves a global sink as the old prompt wrote it; the current one has "
            "blocks of 8, 32 frames in all, a sink of 8. Frames begin at token 0 of the text"
        ),
    ),
)
