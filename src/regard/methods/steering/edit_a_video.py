"""Edit-A-Video: an image model's attention inflated to a video's frames, and edit masks that do not flicker.

    frame i sees the keys of frames 1 and i - 1 alone                                    sparse-causal attention
    B_i = w_1 Â_1 + w_p Â_{i-1} + w_c Â_i,    M_i = B_i >= θ                             sparse-causal blending
    x_i ← M_i ⊙ x_i + (1 - M_i) ⊙ source_i

Â_i is frame i's cross-attention to the edited word over its largest value; before the first frame stands the first
again. Frame 1 sees itself; of the others none sees itself beyond frame 2's look at frame 1. What one frame's map has by
chance is not edited unless the first or the frame before agree.

>>> import torch
>>> frames_seen(4).int()  # row: a frame; column: whose keys it sees
tensor([[1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0]], dtype=torch.int32)
>>> maps = torch.tensor([[[4.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 1.0, 2.0]]])  # three frames of three patches
>>> measure(maps, Config(blend=(0.25, 0.25, 0.5), threshold=0.5)).masks.int()
tensor([[[1, 0, 0],
         [1, 1, 0],
         [0, 1, 1]]], dtype=torch.int32)
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops.steered import Steered


@dataclass(frozen=True)
class Config:
    frames: int = 8  # as many, of equally many tokens, among the image's tokens in `scores`; 1: an image
    blend: tuple[float, float, float] = (
        1 / 3,
        1 / 3,
        1 / 3,
    )  # shares of the first, the previous and the own map
    threshold: float = 0.3  # θ, the blended value from which on a patch is edited; larger: fewer patches

    def __post_init__(self) -> None:
        require(self.frames >= 1, "a frame or more", frames=self.frames)
        whole = len(self.blend) == 3 and min(self.blend) >= 0 and abs(sum(self.blend) - 1) < 1e-6
        require(whole, "three shares that add up to 1", blend=self.blend)
        require(0 < self.threshold < 1, "0 < threshold < 1", threshold=self.threshold)


@dataclass(frozen=True)
class Blended:
    """masks [B, F, P] bool; maps [B, F, P] before the threshold; seen [F, F] bool: whose keys a frame sees."""

    masks: Tensor
    maps: Tensor
    seen: Tensor


def frames_seen(frames: int) -> Tensor:
    """[F, F] bool: row i sees frames 0 and i - 1."""
    seen = torch.ones(frames, frames, dtype=torch.bool).tril(-1).triu(-1)
    seen[:, 0] = True
    return seen


def frame_of(image: Tensor, frames: int) -> Tensor:
    """[B, n] the frame of each token, -1 for those of no image [B, n]; a text's image tokens are split evenly."""
    count = image.sum(-1, keepdim=True)
    require(
        bool((count % frames == 0).all()),
        "frames of equally many tokens",
        tokens=count.tolist(),
        frames=frames,
    )
    order = (image.long().cumsum(-1) - 1).clamp(min=0)
    return (order // (count // frames).clamp(min=1)).where(image, -1)


def scores(at: Steered, s: Tensor, cfg: Config) -> Tensor:
    """-inf between image tokens of frames that do not see each other; text is as it was."""
    if cfg.frames == 1:
        return s
    rows, keys = (frame_of(of("image"), cfg.frames) for of in (at.row_role, at.role))
    seen = frames_seen(cfg.frames).to(s.device)[rows[:, :, None], keys[:, None]]
    hidden = ~seen & (rows >= 0)[:, :, None] & (keys >= 0)[:, None]
    return s.masked_fill(hidden[:, None], -torch.inf)


def measure(maps: Tensor, cfg: Config) -> Blended:
    """Of a word's cross-attention maps [B, F, P], at zero or above."""
    require(maps.dim() == 3 and bool((maps >= 0).all()), "maps [B, F, P] >= 0", shape=tuple(maps.shape))
    wide = maps if maps.dtype == torch.float64 else maps.float()
    top = wide.amax(-1, keepdim=True)
    scaled = wide / top.where(top > 0, 1)  # a map of zeros stays one
    before = torch.cat([scaled[:, :1], scaled[:, :-1]], dim=1)
    first, previous, own = cfg.blend
    mixed = first * scaled[:, :1] + previous * before + own * scaled
    return Blended(mixed >= cfg.threshold, mixed.to(maps.dtype), frames_seen(maps.shape[1]))


def edited(x: Tensor, source: Tensor, masks: Tensor) -> Tensor:
    """x [B, F, P, d] where the masks [B, F, P] say so, the source's elsewhere, to the last bit."""
    return torch.where(masks[..., None], x, source)


def reference(maps: Tensor, cfg: Config) -> Blended:
    """Patch by patch."""
    mixed = torch.zeros_like(maps).double()
    frames = maps.shape[1]
    for b, video in enumerate(maps.tolist()):
        scaled = [[value / (max(frame) or 1.0) for value in frame] for frame in video]
        for i, frame in enumerate(scaled):
            parts = zip(scaled[0], scaled[max(i - 1, 0)], frame, strict=True)
            sums = [math.fsum(w * a for w, a in zip(cfg.blend, three)) for three in parts]
            mixed[b, i] = torch.tensor(sums, dtype=torch.float64)
    seen = [[j == 0 or j == i - 1 for j in range(frames)] for i in range(frames)]
    return Blended(mixed >= cfg.threshold, mixed, torch.tensor(seen))


def cases(seed: int) -> Iterable[tuple]:
    """Own maps alone, one frame, a frame of zeros, one patch, ties of large values, float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=dtype).square()

    yield drawn(2, 6, 9), Config()
    yield drawn(1, 4, 5), Config(blend=(0.0, 0.0, 1.0), threshold=0.5)
    yield drawn(1, 1, 7), Config(blend=(0.5, 0.25, 0.25))
    yield drawn(2, 3, 1), Config(threshold=0.9)
    yield drawn(1, 5, 6, dtype=torch.float32), Config(blend=(0.2, 0.3, 0.5), threshold=0.4)
    empty = drawn(1, 4, 6)
    empty[:, 2] = 0
    yield empty, Config(threshold=0.2)
    yield torch.randint(0, 3, (1, 5, 8), generator=g).double(), Config(blend=(0.25, 0.25, 0.5), threshold=0.6)


METHOD = SteeringPage(
    config=Config,
    scores=scores,
    measure=measure,
    reference=reference,
    cases=cases,
    acts_on_models=False,
    card=Card(
        title="Edit-A-Video",
        paper="Edit-A-Video: Single Video Editing with Object-Aware Consistency",
        year=2023,
        idea="frames attend to the first and the previous one; where a frame is edited, its own cross-attention, the "
        "previous frame's and the first's say together",
        cost="keys of two frames for each frame, whatever their number; a mean of three maps",
        needs=("diffusion", "video frames"),
        lineage=("Tune-A-Video", "Prompt-to-Prompt"),
        neutral={"frames": 1},
        caveat="no code was found and the blending formula is not settled: a weighted mean of the three maps, each "
        "over its largest value, before one threshold (that of Prompt-to-Prompt's local blend) is our reading; later "
        "versions of the paper call it temporal-consistent blending. Temporal attention, tuning on the video, "
        "inversion and the injection of attention maps are not on this page",
    ),
)
