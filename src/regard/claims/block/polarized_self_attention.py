"""The claim of polarized self-attention: it knows no places, and a CNN that finds keypoints finds them better with it.

    permutation  pixels of random features change places, outputs change theirs back: the largest difference over the
                 largest output, in float32; ELA's beside it, which does know places
    error        scenes of 16 x 16 with a plus, a cross and a ring, each somewhere, under noise, in an exposure
                 (contrast and brightness) that differs from scene to scene; wanted are three heatmaps, a Gaussian at
                 the middle of each. Three convolutions with batch norms, and a linear map of each pixel; with attention
                 after each convolution, or without. The mean square over pixels of 1,000 scenes, new scenes in every
                 step, the same for all sides, as are the numbers that convolutions begin with

The rate, of 0.005 and 0.01, was chosen on another seed. In shorter trainings the layouts are further apart: by 0.46 of
the gain after 400 steps on scenes of 20 x 20, one seed.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalog import method
from regard.claims.lab import count_parameters, generator, mean, relative_difference, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.ops.grid import as_image, as_tokens
from regard.train.loop import fit, one_cycle

SCENE, NOISE, SHAPES = 16, 0.3, 3
WIDTH, LAYERS = 16, 3
STEPS, BATCH, RATE, SEEDS = 600, 32, 1e-2, range(5)
SIDES = ("none", "parallel", "sequential")


class Polarized(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.page = method("polarized_self_attention").page
        self.cfg = self.page.configure(layout=layout)
        self.learned = nn.ParameterDict(self.page.init(self.cfg, {"width": WIDTH, "heads": 1}))

    def forward(self, image: Tensor) -> Tensor:
        call = Call("self", params=dict(self.learned.items()), grid=tuple(image.shape[2:]))
        return as_image(self.page.fast(as_tokens(image), self.cfg, call)[0], image.shape[2:])


def network(side: str, seed: int) -> nn.Sequential:
    """Convolutions and the last map are the same numbers on all sides."""
    steps: list[nn.Module] = []
    for i in range(LAYERS):
        with seeded(10 * seed + i):
            conv = nn.Conv2d(1 if i == 0 else WIDTH, WIDTH, 3, padding=1)
            steps += [conv, nn.BatchNorm2d(WIDTH), nn.ReLU()]
            steps += [] if side == "none" else [Polarized(side)]
    with seeded(10 * seed + LAYERS):
        return nn.Sequential(*steps, nn.Conv2d(WIDTH, SHAPES, 1))


def stencils() -> Tensor:
    """[3, 1, 5, 5]: a plus, a cross, a ring."""
    plus, line, ring = torch.zeros(5, 5), torch.eye(5), torch.ones(5, 5)
    plus[2], plus[:, 2], ring[1:4, 1:4] = 1.0, 1.0, 0.0
    return torch.stack([plus, line.maximum(line.flip(1)), ring])[:, None]


def scenes(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(scenes [n, 1, 16, 16], heatmaps [n, 3, 16, 16])."""
    at = torch.randint(2, SCENE - 2, (2, count, SHAPES), generator=g)
    middles = F.one_hot(at[0] * SCENE + at[1], SCENE**2).float().unflatten(2, (SCENE, SCENE))
    drawn = F.conv2d(middles, stencils(), padding=2, groups=SHAPES).amax(1, keepdim=True)
    contrast, brightness = torch.rand(2, count, 1, 1, 1, generator=g)
    seen = (0.3 + 1.7 * contrast) * (drawn + NOISE * torch.randn(drawn.shape, generator=g))
    away = torch.arange(-4.0, 5.0).square()
    spot = (-(away[:, None] + away) / 4.5).exp().expand(SHAPES, 1, 9, 9)
    return seen + 2 * brightness - 1, F.conv2d(middles, spot, padding=4, groups=SHAPES)


def trained(side: str, seed: int, rate: float = RATE, steps: int = STEPS) -> nn.Sequential:
    model, g = network(side, seed), generator(seed)

    def loss_at(step: int) -> Tensor:
        images, heatmaps = scenes(BATCH, g)
        return F.mse_loss(model(images), heatmaps)

    fit(torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01), loss_at, steps, schedule=one_cycle())
    return model.eval()


@torch.no_grad()
def error(model: nn.Module, seed: int = 1000) -> float:
    """Mean square on scenes of another seed."""
    images, heatmaps = scenes(1000, generator(seed))
    pairs = zip(images.split(100), heatmaps.split(100), strict=True)
    return mean(F.mse_loss(model(x), y).item() for x, y in pairs)


def change_under_permutation(name: str, **settings: str) -> float:
    page = method(name).page
    cfg, x = page.configure(**settings), torch.randn(2, 400, 32, generator=generator())
    order = torch.randperm(400, generator=generator(1))
    with seeded(0):
        call = Call("self", params=page.init(cfg, {"width": 32, "heads": 1}), grid=(20, 20))
    out, moved = (page.fast(tokens, cfg, call)[0] for tokens in (x, x[:, order]))
    return relative_difference(moved[:, order.argsort()], out)


def measure() -> Measured:
    with threads(1):
        found = {side: [error(trained(side, seed)) for seed in SEEDS] for side in SIDES}
    plain, parallel, sequential = (mean(found[side]) for side in SIDES)
    gain, apart = plain - (parallel + sequential) / 2, abs(parallel - sequential)
    moved = {
        layout: change_under_permutation("polarized_self_attention", layout=layout) for layout in SIDES[1:]
    }
    numbers = {
        **{f"change_under_permutation_{layout}": change for layout, change in moved.items()},
        "change_under_permutation_ela": change_under_permutation("ela"),
        **{f"mse_{side}": mean(values) for side, values in found.items()},
        "cut_parallel_percent": 100 * (1 - parallel / plain),
        "cut_sequential_percent": 100 * (1 - sequential / plain),
        "apart_over_gain": apart / gain,
        "parameters": [count_parameters(network(side, 0)) for side in SIDES],
        **{f"mse_{side}_by_seed": values for side, values in found.items()},
    }
    parts = {
        "outputs permute": max(moved.values()) < 1e-5,
        "lower error": max(parallel, sequential) <= 0.95 * plain,
        "layouts nearly equal": apart < gain / 2,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="polarized_self_attention",
    statement=(
        "polarized self-attention commutes with any permutation of pixels, and lowers the error of a CNN that "
        "regresses heatmaps of keypoints, in parallel and in sequence by nearly as much"
    ),
    bound=(
        "change under a permutation < 1e-5; mean square error at least 5 % lower than without, in both layouts; their "
        "difference less than half of their mean gain; means of 5 seeds"
    ),
    measure=measure,
)
