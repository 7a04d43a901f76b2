"""What claims share: seeds, random inputs, differences, times of sides that take turns, and small trainings.

Sides that are timed take turns, so that a busy machine slows all of them, and their medians count; `threads(1)` keeps
them to one core. Trainings use the loop of `train.loop`; `sweep` lets each side have the best of some learning rates.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core import require
from regard.ops.threads import threads
from regard.train.loop import fit, one_cycle

__all__ = [
    "Ratios",
    "alternate",
    "auroc",
    "count_parameters",
    "difference",
    "generator",
    "keep_freed_memory",
    "mean",
    "mean_loss",
    "median_time",
    "median_times",
    "paired_ratios",
    "points_apart",
    "random_qkv",
    "relative_difference",
    "right_answers",
    "seeded",
    "slope",
    "sweep",
    "threads",
    "token_loss",
    "trained",
]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
# floats, just below the 32 MB up to which glibc's threshold moves
KEPT = 7_500_000


# seeds and random inputs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own generator from this seed on; afterwards it stands where it stood."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def random_qkv(
    g: torch.Generator, heads: int, n: int, key: int, value: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k [1, heads, n, key] and v [1, heads, n, value] of a normal distribution, drawn in this order."""
    q, k, v = (torch.randn(1, heads, n, d, generator=g, dtype=dtype) for d in (key, key, value or key))
    return q, k, v


# numbers


def points_apart(a: Tensor, b: Tensor) -> list[float]:
    """Ends of the 95 % interval of the mean of a - b over pairs, in points (hundredths).

    >>> points_apart(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0]))
    [100.0, 100.0]
    """
    apart = 100 * (a.double() - b.double())
    half = 1.96 * apart.std().item() / len(apart) ** 0.5
    return [apart.mean().item() - half, apart.mean().item() + half]


def auroc(scores: Tensor, positive: Tensor) -> float:
    """How often one of the positive scores, bool like `scores`, is above one of the others; half for equal ones."""
    yes, no = scores[positive], scores[~positive].sort().values
    below, upto = (torch.searchsorted(no, yes, right=right).double() for right in (False, True))
    return ((below + upto) / 2 / len(no)).mean().item()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b|."""
    return (a - b).abs().max().item()


def relative_difference(a: Tensor, wanted: Tensor) -> float:
    """Largest |a - wanted| over the largest |wanted|."""
    return ((a - wanted).abs().max() / wanted.abs().max()).item()


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# times


def alternate(
    sides: Mapping[K, Callable[..., Any]],
    rounds: int,
    warm: int = 1,
    arguments: Callable[[K], tuple] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[K, list[float]]:
    """Seconds of each side in each round, one side after the other; `warm` rounds before these do not count.

    `arguments` makes what a side is called with, anew in every round and before its clock starts.
    """
    seconds: dict[K, list[float]] = {name: [] for name in sides}
    for i in range(warm + rounds):
        for name, side in sides.items():
            inputs = arguments(name) if arguments is not None else ()
            start = clock()
            side(*inputs)
            end = clock()
            if i >= warm:
                seconds[name].append(end - start)
    return seconds


def median_times(
    sides: Mapping[K, Callable[..., Any]], rounds: int, warm: int = 1, **how: Any
) -> dict[K, float]:
    """The median seconds of each side; see `alternate`."""
    return {name: median(seconds) for name, seconds in alternate(sides, rounds, warm, **how).items()}


def median_time(side: Callable[[], Any], rounds: int, warm: int = 1, **how: Any) -> float:
    return median_times({"": side}, rounds, warm, **how)[""]


@dataclass(frozen=True)
class Ratios:
    """The seconds of two sides that took turns, and the second's over the first's."""

    first: list[float]
    second: list[float]

    @property
    def medians(self) -> tuple[float, float]:
        return median(self.first), median(self.second)

    @property
    def of_medians(self) -> float:
        """The second's median over the first's: what a claim's bound is applied to."""
        first, second = self.medians
        return second / first

    @property
    def by_round(self) -> list[float]:
        return [b / a for a, b in zip(self.first, self.second, strict=True)]

    @property
    def median(self) -> float:
        """The median of the rounds' own ratios: a machine that slows down between rounds does not move it."""
        return median(self.by_round)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles between which half of the rounds' ratios lie."""
        low, _, high = quantiles(self.by_round, n=4, method="inclusive")
        return low, high


def paired_ratios(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int, warm: int = 1, **how: Any
) -> Ratios:
    """Both sides in each round, one after the other; see `alternate`."""
    return Ratios(*alternate({"first": first, "second": second}, rounds, warm, **how).values())


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent: least squares of log values over log sizes."""
    require(len(sizes) == len(values) >= 2, "two sizes or more, a value for each", sizes=sizes, values=values)
    line = torch.tensor([[float(size), 1.0] for size in sizes], dtype=torch.float64)
    line[:, 0].log_()
    return torch.linalg.lstsq(line.float(), torch.tensor(values).log()[:, None]).solution[0].item()


def keep_freed_memory() -> None:
    """From here on glibc returns no smaller block to the system.

    Otherwise long inputs alone pay for fresh pages in every run, and a slope is that of the allocator.
    """
    torch.empty(KEPT)  # made and freed


# small trainings


def token_loss(model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits [B, N, V] against labels [B, N], those of -100 left out."""
    return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())


def trained(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], rate: float, **adamw: Any
) -> nn.Module:
    """The model after a step of AdamW on each batch of (inputs, labels), the rate up in a tenth of them, then down."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.1, **adamw)
    fit(optimizer, lambda step: token_loss(model, *batches[step]), len(batches), schedule=one_cycle())
    return model


@torch.no_grad()
def mean_loss(model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    return mean(token_loss(model, x, y).item() for x, y in batches)


def sweep(rates: Sequence[float], train: Callable[[float], T]) -> dict[float, T]:
    """What each learning rate comes to, one after the other."""
    return {rate: train(rate) for rate in rates}


@torch.no_grad()
def right_answers(model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, batch: int) -> Tensor:
    """Booleans [B, N]: where the likeliest token is the label."""
    return torch.cat([model(x).argmax(-1) for x in inputs.split(batch)]) == labels


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
