"""Motion and appearance told apart in simulated voxels: flow is decoded, and helps to predict motion voxels alone.

    clip     a texture of 24 waves on 32 x 32 pixels, and the same a frame later under a motion x -> x + A x + b
    static   16 principal components of the first frame
    flow     the motion of each of 4 x 4 windows as the two frames show it: least squares on ∇I · d = -∂I/∂t
    voxel    static of all: w · static; of the motion voxels also w · (A, b), as strong; noise as strong as a part

    decoding    ridge from voxels to flow; r is the mean over the flow's 32 numbers of Pearson's r on new clips
    encoding    ridge from static, or from static and flow, to a voxel; what the flow adds to r is the gain

λ is chosen on the last fifth of the training clips, for each of these; all columns are z-scored with the training's own
numbers. The controls are flow shuffled over the training clips, and flow shuffled over all clips as a feature. The flow
has six degrees of freedom, so that r of one shuffle strays by 0.07: the mean of 20 counts.

There is no attention in this, and no brain: these voxels are linear in static and motion because they were made so.
What is checked is the analysis: that flow estimated from frames is decoded, that it says nothing of voxels that see
none, and that neither ridge nor the choice of λ lets test clips in. The paper's recordings, its videos drawn from the
decoded flow and its comparison of video encoders with image encoders are not here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured

CLIPS, TRAINED, CHOSEN_ON = 1000, 750, 150  # clips, those to fit on, the last of these that choose λ
SIDE, WINDOW, WAVES, STATIC = 32, 8, 24, 16
VOXELS, NOISE = 80, 1.0  # of each sort; the noise's standard deviation where each part has 1
LAMBDAS = tuple(10.0**n for n in range(-1, 5))
SEEDS, SHUFFLES = (0, 1, 2), 20


class Clips(NamedTuple):
    static: Tensor  # [CLIPS, STATIC]
    flow: Tensor  # [CLIPS, 32]
    motion: Tensor  # [CLIPS, 6] what moved it: A and b
    shown: Tensor  # [CLIPS, 32] the true motion in the middle of each window


def frames(g: torch.Generator, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Both frames [CLIPS, SIDE, SIDE]: waves of 8 to 24 pixels, their phases moved with the texture."""
    length = 8 + 16 * torch.rand(len(motion), WAVES, generator=g)
    angle = 2 * torch.pi * torch.rand(len(motion), WAVES, generator=g)
    k = 2 * torch.pi / length[..., None] * torch.stack([angle.cos(), angle.sin()], -1)  # [CLIPS, WAVES, 2]
    phase = 2 * torch.pi * torch.rand(len(motion), WAVES, generator=g)
    places = grid(SIDE).expand(len(motion), -1, -1)
    # what is seen at x after the motion d was at x - d(x) before it
    moved = places - displaced(places, motion)
    first, second = ((k @ x.mT + phase[..., None]).cos().mean(1) for x in (places, moved))
    return first.view(-1, SIDE, SIDE), second.view(-1, SIDE, SIDE)


def grid(count: int) -> Tensor:
    """[count², 2] the (x, y) of so many places a side, in pixels from the middle of the frame, row by row."""
    at = (torch.arange(count) + 0.5) * SIDE / count - SIDE / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


def displaced(places: Tensor, motion: Tensor) -> Tensor:
    """A x + b at places [CLIPS, P, 2]; A's numbers are at the frame's edge."""
    a, b = motion[:, :4].view(-1, 2, 2), motion[:, None, 4:]
    return places / (SIDE / 2) @ a.mT + b


def flow_of(first: Tensor, second: Tensor) -> Tensor:
    """[CLIPS, 2 · windows]: least squares of the two frames' gradients in each window, x before y."""
    middle = (first + second) / 2
    dy, dx = torch.gradient(middle, dim=(1, 2))
    parts = [windows(t) for t in (dx, dy, second - first)]  # [CLIPS, windows, pixels]
    slopes = torch.stack(parts[:2], -1)
    normal = slopes.mT @ slopes + 1e-6 * torch.eye(2)
    return torch.linalg.solve(normal, -slopes.mT @ parts[2][..., None])[..., 0].flatten(1)


def windows(t: Tensor) -> Tensor:
    return t.unfold(1, WINDOW, WINDOW).unfold(2, WINDOW, WINDOW).flatten(3).flatten(1, 2)


def clips(seed: int) -> Clips:
    g = generator(seed)
    motion = torch.randn(CLIPS, 6, generator=g) / 2
    first, second = frames(g, motion)
    flat = first.flatten(1) - first[:TRAINED].flatten(1).mean(0)
    axes = torch.linalg.svd(flat[:TRAINED], full_matrices=False).Vh[:STATIC]
    shown = displaced(grid(SIDE // WINDOW).expand(CLIPS, -1, -1), motion)
    return Clips(flat @ axes.T, flow_of(first, second), motion, shown.flatten(1))


def voxels(at: Clips, seed: int) -> tuple[Tensor, Tensor]:
    """(static voxels, motion voxels), both [CLIPS, VOXELS]"""
    g = generator(100 + seed)

    def part(features: Tensor) -> Tensor:
        return zscored(zscored(features) @ torch.randn(features.shape[1], VOXELS, generator=g))

    static, both = part(at.static), part(at.static) + part(at.motion)
    static, both = (x + NOISE * torch.randn(x.shape, generator=g) for x in (static, both))
    return static, both


# the analysis


def zscored(x: Tensor) -> Tensor:
    """Columns less the mean of the training clips, over their standard deviation."""
    return (x - x[:TRAINED].mean(0)) / x[:TRAINED].std(0)


def ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """W [D, E] with the least |x W - y|² + strength |W|²"""
    return torch.linalg.solve(x.mT @ x + strength * torch.eye(x.shape[1]), x.mT @ y)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each column."""
    a, b = (x - x.mean(0) for x in (a, b))
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))


def predicted(x: Tensor, y: Tensor, fitted_to: Tensor | None = None) -> Tensor:
    """r of each column of y on the test clips, by a ridge from x; `fitted_to` stands for y in the training."""
    x, y = zscored(x), zscored(y)
    wanted = y if fitted_to is None else zscored(fitted_to)
    fit, choice, test = slice(TRAINED - CHOSEN_ON), slice(TRAINED - CHOSEN_ON, TRAINED), slice(TRAINED, None)

    def worth(strength: float) -> float:
        return correlation(x[choice] @ ridge(x[fit], wanted[fit], strength), wanted[choice]).mean().item()

    best = max(LAMBDAS, key=worth)
    return correlation(x[test] @ ridge(x[:TRAINED], wanted[:TRAINED], best), y[test])


def shuffled(x: Tensor, g: torch.Generator, count: int = TRAINED) -> Tensor:
    """The rows of the first `count` clips among each other."""
    order = torch.cat([torch.randperm(count, generator=g), torch.arange(count, len(x))])
    return x[order]


def findings(seed: int) -> dict[str, float]:
    at, g = clips(seed), generator(200 + seed)
    static, moving = voxels(at, seed)
    brain = torch.cat([static, moving], 1)
    beside = shuffled(at.flow, g, CLIPS)
    found = {
        "flow_estimate_r": correlation(at.flow, at.shown),
        "flow_r": predicted(brain, at.flow),
        "flow_r_shuffled": torch.cat(
            [predicted(brain, at.flow, shuffled(at.flow, g)) for _ in range(SHUFFLES)]
        ),
        "flow_r_static_voxels": predicted(static, at.flow),
    }
    for name, group in (("static", static), ("motion", moving)):
        alone = predicted(at.static, group)
        found[f"{name}_voxels_r"] = alone
        found[f"{name}_voxels_gain"] = predicted(torch.cat([at.static, at.flow], 1), group) - alone
        found[f"{name}_voxels_gain_shuffled"] = predicted(torch.cat([at.static, beside], 1), group) - alone
    return {name: value.mean().item() for name, value in found.items()}


def measure() -> Measured:
    with threads(1):
        rows = [findings(seed) for seed in SEEDS]
    numbers = {name: [row[name] for row in rows] for name in rows[0]}
    parts = {
        "flow decoded": min(numbers["flow_r"]) >= 0.5,
        "shuffled flow not decoded": max(map(abs, numbers["flow_r_shuffled"])) < 0.1,
        "gain in motion voxels": min(numbers["motion_voxels_gain"]) > 0.1,
        "no gain in static voxels": max(numbers["static_voxels_gain"]) < 0.02,
    }
    means = {f"{name}_mean": mean(values) for name, values in numbers.items()}
    return Measured.by(parts, {**numbers, **means})


CLAIM = Claim(
    name="fmri_motion_decoding",
    statement=(
        "on simulated voxels that mix static and flow features, ridge decodes optical flow well above shuffled "
        "controls, and flow beside static features predicts motion voxels better than static ones alone, and no others"
    ),
    bound=(
        "on each of three seeds: r of decoded flow >= 0.5, |r| < 0.1 where the training's flow is shuffled; the flow "
        "adds > 0.1 to r in motion voxels and < 0.02 in static voxels"
    ),
    measure=measure,
)
