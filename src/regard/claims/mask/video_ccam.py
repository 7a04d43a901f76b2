"""Video-CCAM's claim, on a projector with random weights: does it know the order of frames, for any number of them?

The projector is one cross-attention layer with a residual and a feed-forward layer over N learned queries, without
positions. The same weights read 16 frames and 96.
"""

import torch
from torch import Tensor, nn

from regard.claims.lab import difference, generator, seeded
from regard.core.claim import Claim, Measured
from regard.methods.masks import video_ccam as page
from regard.nn.attention import Attention
from regard.nn.layers import RMSNorm, SwiGLU

QUERIES, PATCHES, WIDTH, HEADS = 128, 9, 64, 4
LENGTHS = (16, 96)  # frames in the paper's training, and in its long videos


class Projector(nn.Module):
    """Patches [B, T · P, C] -> [B, N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, QUERIES, WIDTH))
        self.norms = nn.ModuleList(RMSNorm(WIDTH) for _ in range(3))
        self.attention = Attention(WIDTH, HEADS, "softmax", "cross")
        self.mlp = SwiGLU(WIDTH, 2 * WIDTH)

    def forward(self, frames: Tensor, masked: bool) -> Tensor:
        """frames [B, T, P, C]"""
        mask, roles = None, page.video_roles(QUERIES, *frames.shape[1:3])
        if masked:
            mask = page.build(page.Config())
        queries = self.queries.expand(len(frames), -1, -1)
        asked, patches = self.norms[0](queries), self.norms[1](frames.flatten(1, 2))
        x = queries + self.attention(asked, patches, mask=mask, roles=roles)[0]
        return x + self.mlp(self.norms[2](x))


def horizon_kept(projector: Projector, frames: Tensor) -> tuple[float, float]:
    """(largest change of a query whose part ends before the edited frame, smallest of the last query)."""
    out, before, last = projector(frames, masked=True), 0.0, []
    count = frames.shape[1]
    for t in range(count):
        edited = frames.clone()
        edited[:, t] = frames[:, t] + 1
        change = (projector(edited, masked=True) - out).abs().amax((0, 2))  # [N]
        # by the definition: query n of N, from 1, ends at n / N; frame t, from 0, begins at t / T
        ends_before = torch.arange(1, QUERIES + 1) * count <= t * QUERIES
        before = max(before, float(change[ends_before].max())) if t else before
        last.append(float(change[-1]))
    return before, min(last)


@torch.no_grad()
def measure() -> Measured:
    with seeded(0):
        projector = Projector().double()
    numbers: dict[str, float] = {}
    parts = {"blind without": True, "order with": True, "before the edit": True, "last query": True}
    for count in LENGTHS:
        g = generator(count)
        frames = torch.randn(1, count, PATCHES, WIDTH, generator=g, dtype=torch.float64)
        shuffled = frames[:, torch.randperm(count, generator=g)]
        plain, masked = (
            difference(projector(shuffled, masked), projector(frames, masked)) for masked in (False, True)
        )
        before, last = horizon_kept(projector, frames)
        numbers |= {f"shuffle_plain_{count}": plain, f"shuffle_masked_{count}": masked}
        numbers |= {f"queries_before_the_edit_{count}": before, f"last_query_{count}": last}
        now = zip(parts, (plain < 1e-6, masked > 1e-2, before == 0, last > 0), strict=True)
        parts = {name: parts[name] and holds for name, holds in now}
    image = torch.randn(1, 1, PATCHES, WIDTH, generator=generator(1), dtype=torch.float64)
    numbers["one_frame"] = difference(projector(image, True), projector(image, False))
    return Measured.by(parts | {"one frame": numbers["one_frame"] == 0}, numbers)


CLAIM = Claim(
    name="video_ccam",
    statement=(
        "without the mask the projector does not see the order of frames, with it it does; a query depends on no frame "
        "that begins after its part of the video, for 16 frames and, with the same weights, for 96"
    ),
    bound=(
        "change under a shuffle of frames < 1e-6 plain, > 1e-2 masked; change of queries before the edited frame == 0; "
        "T = 96 runs with the weights of T = 16"
    ),
    measure=measure,
)
