"""What edits did to a metric: a grid of sites with named axes, by pair, with intervals over the pairs.

    effect = mean (m_edited - m_base) / mean (m_clean - m_corrupt)        1: what was corrupted is restored, or undone

Numerator and denominator are means of their own, so that pairs which hardly differ do not count most. The interval is
the percentile bootstrap over pairs; with one pair there is none, and it is NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import require
from regard.core.errors import NotInstalled

DRAWS = 2000


@dataclass(frozen=True)
class Effects:
    """The change of a metric by pair and site.

    values     [pairs, *sites] m_edited - m_base, in the direction that restores (denoise) or its negative (noise)
    dims       names of the axes of sites: "layer", "head", "token"
    coords     what each axis counts: numbers of layers and heads
    span       [pairs] m_clean - m_corrupt
    exact      [*sites] bool: measured by an edit, not estimated from gradients
    settings   what was done: quantity, direction, method, ablation, ...
    """

    values: Tensor
    dims: tuple[str, ...]
    coords: Mapping[str, Sequence[Any]]
    span: Tensor
    exact: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(len(self.coords[d]) for d in self.dims)
        ok = tuple(self.values.shape) == (len(self.span), *shape) and tuple(self.exact.shape) == shape
        require(ok, "effects are [pairs, *sites]", values=tuple(self.values.shape), sites=shape)

    @property
    def mean(self) -> Tensor:
        """[*sites] normalised effects."""
        return self.values.mean(0) / self.span.mean()

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[Tensor, Tensor]:
        """([*sites] low, high) of the normalised effects; NaN for a single pair."""
        return bootstrap(self.values, self.span, level, seed)

    def top(self, k: int, signed: bool = False) -> list[tuple[Any, ...]]:
        """Coordinates of the k sites of the largest effect; by their size, or signed."""
        mean = self.mean if signed else self.mean.abs()
        order = mean.flatten().argsort(descending=True, stable=True)[:k].tolist()
        return [self.coordinates(i) for i in order]

    def coordinates(self, flat: int) -> tuple[Any, ...]:
        where = torch.unravel_index(torch.tensor(flat), self.exact.shape)
        return tuple(self.coords[d][int(i)] for d, i in zip(self.dims, where, strict=True))

    def index(self, site: Sequence[Any]) -> tuple[int, ...]:
        return tuple(list(self.coords[d]).index(c) for d, c in zip(self.dims, site, strict=True))

    def flat(self, site: Sequence[Any]) -> int:
        """The number of a site in the order of a flat tensor."""
        number = 0
        for i, n in zip(self.index(site), self.exact.shape, strict=True):
            number = number * n + i
        return number

    def at(self, site: Sequence[Any]) -> Tensor:
        """[pairs] changes of the metric at one site."""
        return self.values.flatten(1)[:, self.flat(site)]

    def summed(self, dim: str) -> "Effects":
        """Effects added up along an axis."""
        at = self.dims.index(dim)
        rest = tuple(d for d in self.dims if d != dim)
        coords = {d: self.coords[d] for d in rest}
        return replace(
            self, values=self.values.sum(at + 1), exact=self.exact.all(at), dims=rest, coords=coords
        )

    def with_exact(self, other: "Effects") -> "Effects":
        """These with what another measured exactly in its place."""
        require(
            self.dims == other.dims and self.values.shape == other.values.shape, "effects of the same sites"
        )
        values = torch.where(other.exact, other.values, self.values)
        return replace(self, values=values, exact=self.exact | other.exact)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval()
        return {
            "dims": list(self.dims), "coords": {d: list(c) for d, c in self.coords.items()},
            "mean": finite(self.mean), "low": finite(low), "high": finite(high), "exact": self.exact.tolist(),
            "pairs": len(self.span), **self.settings,
        }  # fmt: skip

    def to_xarray(self) -> Any:
        """An xarray.Dataset with `mean`, `low`, `high`, `exact` on named axes, and `values` by pair."""
        try:
            import xarray
        except ImportError as error:
            raise NotInstalled("effects as xarray: pip install xarray") from error
        low, high = self.interval()
        grids = {"mean": self.mean, "low": low, "high": high, "exact": self.exact}
        data = {name: (self.dims, x.numpy()) for name, x in grids.items()}
        data["values"] = (("pair", *self.dims), self.values.numpy())
        data["span"] = (("pair",), self.span.numpy())
        coords = {d: list(c) for d, c in self.coords.items()}
        return xarray.Dataset(data, coords=coords, attrs=dict(self.settings))


def finite(x: Tensor) -> Any:
    """Numbers as lists, None where one is not finite."""
    if x.dim():
        return [finite(row) for row in x]
    return x.item() if bool(x.isfinite()) else None


def bootstrap(values: Tensor, span: Tensor, level: float = 0.95, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Percentile interval over pairs of mean(values) / mean(span): values [pairs, ...], span [pairs]."""
    require(0 < level < 1, "a level lies in (0, 1)", level=level)
    n = len(span)
    if n < 2:
        return (torch.full(values.shape[1:], torch.nan),) * 2
    g = torch.Generator().manual_seed(seed)
    weights = (
        torch.zeros(DRAWS, n).scatter_add_(1, torch.randint(n, (DRAWS, n), generator=g), torch.ones(DRAWS, n))
        / n
    )
    flat = values.reshape(n, -1).float()
    drawn = (weights @ flat) / (weights @ span.float())[:, None]
    low, high = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
    return low.view(values.shape[1:]), high.view(values.shape[1:])
