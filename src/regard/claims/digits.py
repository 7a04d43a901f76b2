"""Handwritten digits for claims: scikit-learn's 1,797 images of 8 x 8 pixels, and a small CNN that learned them.

The images are parted once: 1,000 to train on, 300 to choose settings on, 497 that only judge. The network is five
steps, each a callable of its own, so that what lies between them can be read and changed:

    [B, 1, 8, 8] -> conv, ReLU [B, 16, 8, 8] -> conv, ReLU, pool [B, 32, 4, 4] -> conv, ReLU [B, 32, 4, 4]
                 -> mean over places, linear, ReLU [B, 32] -> linear [B, 10]

`network(seed)` trains it once in a process; claims choose on seed 1 and judge on seed 0. It can have another bend than
ReLU, for claims that hang on it.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import generator, seeded, threads
from regard.train.digits import SIZES, Split, digits
from regard.train.loop import fit, one_cycle

__all__ = ["SIZES", "Split", "accuracy", "digits", "network", "untrained"]

STEPS, BATCH, RATE = 1200, 64, 5e-3


class MeanOverPlaces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def untrained(seed: int, bend: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Five steps, each of which takes what the one before gives."""
    with seeded(seed):
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), bend()),
            nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), bend(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), bend()),
            nn.Sequential(MeanOverPlaces(), nn.Linear(32, 32), bend()),
            nn.Linear(32, 10),
        )


@cache
def network(seed: int, bend: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """The trained network; its parameters ask for no gradients."""
    model, data, g = untrained(seed, bend), digits()["train"], generator(seed)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(len(data.images), (BATCH,), generator=g)
        return F.cross_entropy(model(data.images[rows]), data.labels[rows])

    with threads(1):
        fit(
            torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01),
            loss_at,
            STEPS,
            schedule=one_cycle(),
        )
    return model.requires_grad_(False).eval()


@torch.no_grad()
def accuracy(model: nn.Module, part: str) -> float:
    """Percent of right answers on a part."""
    images, labels = digits()[part]
    return 100 * (model(images).argmax(1) == labels).double().mean().item()
