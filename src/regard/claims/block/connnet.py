"""The claim of ConnNet: masks come back from their connectivities, and connectivities stand label noise as masks do.

    round trip  random masks of 24 x 24 at nine densities, without their isolated pixels: IoU of what is decoded of
                their connectivities with the mask. With isolated pixels: what is lost is these and nothing else
    IoU         images of 20 x 20 with four discs of contrast 1 under noise of deviation 1. Three convolutions, the
                page's block and a linear head, of one logit for each pixel or of eight connectivities; all else, first
                numbers, images, labels and order, is the same. 300 images for training, whose labels are flipped pixel
                by pixel, one in five, once and for all; the mean over 200 images of IoU with clean labels, in points.
                Both sides are asked at 1/2
    beside it   the same at the bar that is best on 200 other images, with clean labels; both with labels
                without flips

The rate was chosen on another seed, of 0.003 and 0.01, by the sum of both sides after 200 steps.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalog import method
from regard.claims.lab import count_parameters, generator, mean, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.blocks.connnet import connectivity, decoded, logits, loss, neighbours
from regard.ops.grid import as_tokens
from regard.train.loop import fit, one_cycle

SIZE, DISCS, NOISE, WRONG = 20, 4, 1.0, 0.2
WIDTH, IMAGES = 16, 300
STEPS, BATCH, RATE, TESTED = 100, 16, 1e-2, 200
ERRORS = {"flipped": range(5), "none": range(2)}  # of labels, and the seeds of each
SIDES = ("binary", "connectivity")
BARS = [tenth / 20 for tenth in range(3, 14)]


class Network(nn.Module):
    """[B, 1 or 8, 20, 20] logits of images [B, 1, 20, 20]."""

    def __init__(self, directions: int) -> None:
        super().__init__()
        widths = [1, WIDTH, WIDTH, WIDTH]
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.features = nn.Sequential(
            *(step for conv in convolutions for step in (conv, nn.BatchNorm2d(WIDTH), nn.ReLU()))
        )
        self.page = method("connnet").page
        self.cfg = self.page.config()
        self.learned = nn.ParameterDict(self.page.init(self.cfg, {"width": WIDTH, "heads": 1}))
        self.head = nn.Linear(WIDTH, directions)

    def forward(self, images: Tensor) -> Tensor:
        sides = tuple(images.shape[2:])
        call = Call("self", params=dict(self.learned.items()), grid=sides)
        y = self.page.fast(as_tokens(self.features(images)), self.cfg, call)[0]
        return logits(y, self.head.weight, self.head.bias, sides)


def scenes(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(images [n, 1, 20, 20], masks of their discs [n, 4, 20, 20] of zeros and ones)."""
    line, (y, x) = torch.arange(SIZE), torch.randint(SIZE, (2, count, DISCS, 1, 1), generator=g)
    radius = 1.5 + 2 * torch.rand(count, DISCS, 1, 1, generator=g)
    discs = ((line[:, None] - y).square() + (line - x).square() <= radius.square()).float()
    return discs.amax(1, keepdim=True) + NOISE * torch.randn(count, 1, SIZE, SIZE, generator=g), discs


def labelled(discs: Tensor, errors: str, g: torch.Generator) -> Tensor:
    """[n, 20, 20] labels with these errors."""
    mask = discs.amax(1)
    if errors == "flipped":
        return torch.where(torch.rand(mask.shape, generator=g) < WRONG, 1 - mask, mask)
    return mask


def trained(side: str, seed: int, errors: str = "flipped", rate: float = RATE) -> Network:
    with seeded(seed):  # the head is drawn last
        model, g = Network(1 if side == "binary" else 8), generator(seed)
    seen, discs = scenes(IMAGES, g)
    labels = labelled(discs, errors, g)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(IMAGES, (BATCH,), generator=g)
        found = model(seen[rows])
        if side == "connectivity":
            return loss(found, labels[rows])
        return F.binary_cross_entropy_with_logits(found[:, 0], labels[rows])

    fit(torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01), loss_at, STEPS, schedule=one_cycle())
    return model.eval()


def iou(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each image of masks [B, rows, columns]; 1 where both are empty."""
    found, wanted = found > 0, wanted > 0
    both, any_of = ((found & wanted).sum((1, 2)), (found | wanted).sum((1, 2)))
    return torch.where(any_of > 0, both / any_of.clamp(min=1), 1.0)


@torch.no_grad()
def scores(model: Network, seed: int, bars: list[float]) -> list[float]:
    """Mean IoU with clean masks of new images, in points, at each bar."""
    seen, discs = scenes(TESTED, generator(seed))
    answers, mask = torch.cat([model(part).sigmoid() for part in seen.split(100)]), discs.amax(1)
    found = [answers[:, 0] >= bar if answers.shape[1] == 1 else decoded(answers, bar) for bar in bars]
    return [100 * iou(one, mask).mean().item() for one in found]


def one_model(side: str, seed: int, errors: str) -> tuple[float, float, float]:
    """(IoU at 1/2, IoU at the bar that is best on other images, that bar)."""
    model = trained(side, seed, errors)
    elsewhere = scores(model, 2000, BARS)
    best = BARS[elsewhere.index(max(elsewhere))]
    at_half, at_best = scores(model, 1000, [0.5, best])
    return at_half, at_best, best


def masks() -> Iterator[tuple[Tensor, Tensor]]:
    """(100 masks, the same without isolated pixels) at nine densities."""
    g = generator()
    for tenth in range(1, 10):
        mask = (torch.rand(100, 24, 24, generator=g) < tenth / 10).float()
        yield mask, mask * (neighbours(mask).amax(1) > 0)


def round_trips() -> dict[str, float]:
    pairs = list(masks())
    return {
        "iou_round_trip_smallest": min(
            iou(decoded(connectivity(kept)), kept).min().item() for _, kept in pairs
        ),
        "iou_with_isolated_pixels_to_without_smallest": min(
            iou(decoded(connectivity(mask)), kept).min().item() for mask, kept in pairs
        ),
        "isolated_share_at_density_0.1": 1 - (pairs[0][1].sum() / pairs[0][0].sum()).item(),
    }


def measure() -> Measured:
    numbers: dict = round_trips()
    back = min(list(numbers.values())[:2])
    with threads(1):
        for errors, seeds in ERRORS.items():
            for side in SIDES:
                at_half, best, bars = zip(*(one_model(side, seed, errors) for seed in seeds), strict=True)
                numbers[f"iou_{errors}_{side}"] = mean(at_half)
                numbers[f"iou_{errors}_{side}_by_seed"] = [*at_half]
                numbers[f"iou_{errors}_{side}_best_bar"] = mean(best)
                numbers[f"bars_{errors}_{side}"] = [*bars]
    numbers["parameters"] = [count_parameters(Network(1)), count_parameters(Network(8))]
    noise = numbers["iou_flipped_connectivity"] >= numbers["iou_flipped_binary"]
    return Measured.by({"round trip": back == 1, "label noise": noise}, numbers)


CLAIM = Claim(
    name="connnet",
    statement=(
        "masks come back from their connectivities but for isolated pixels, and under label noise a network that is "
        "taught connectivities finds discs at least as well as one that is taught masks"
    ),
    bound=(
        "IoU of every round trip 1 on masks without isolated pixels, and exactly these are lost of others; with one "
        "label in five flipped, IoU with clean labels at least that of the network taught masks, mean of five seeds"
    ),
    measure=measure,
    contradicted=(
        "with flips and asked at 1/2, connectivities come to IoU 39.5, masks to 58.6, and are behind in each of five "
        "seeds. Two salient neighbours are both labelled so with 0.8 x 0.8 = 0.64, a pixel with 0.8, so doubt takes an "
        "answer below 1/2 sooner. Each at the bar that is best on other images, 0.2 to 0.3 and 0.4 to 0.45, they are "
        "half a point apart, 59.3 and 59.8; without flips, at 1/2, 57.3 and 59.0 (two seeds). So most of what this "
        "noise costs is the bar, and at its best one connectivities are not ahead either. On the rate's seed 400 steps "
        "in place of 200 changed either side by no more than 2 points at 1/2"
    ),
    fails=("label noise",),
)
