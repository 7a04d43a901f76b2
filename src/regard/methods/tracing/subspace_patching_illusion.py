"""Subspace patching: activations of another input, put in along a few directions; and how much of it is an illusion.

    h ← h + V Vᵀ (h_src − h)         V [D, r] orthonormal: inside its span h becomes h_src, outside it stays
    V = V_row + V_null               V_row in the row space of W [M, D], the map that alone reads h;  W V_null = 0
    h ← h + Ṽ Ṽᵀ (h_src − h)         the row-only patch: Ṽ an orthonormal basis of the span of V_row

V_null cannot reach the output: h_src and h may differ along it as much as they like. V_row can, though the two may
agree along it on all data. A direction that mixes both carries the difference of the first into the second and changes
the output through a path that the model never uses. Where W reads h alone, as the down projection reads the hidden
layer of an MLP, the row-only patch tells: what it does not do was an illusion. In GPT-2's MLP 8 a learned direction
with norms 0.75 (row) and 0.66 (null) moves the logit difference by 46 % and its row part by 13 %.

>>> import torch
>>> hidden, out = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[0.0, 2.0, 1.0]])  # out(hidden · x) = x
>>> mixed = torch.tensor([1.0, 1.0, 0.0]) / 2**0.5  # what out never reads, and what is always 0
>>> told = measure(3 * hidden, 5 * hidden, mixed[:, None], out)
>>> told.patched, out @ told.patched  # x is 5 now, by a coordinate that was never used
(tensor([4.0000, 1.0000, 3.0000]), tensor([5.]))
>>> told.row_norms**2, told.null_norms**2  # (v·w)² / w² = (2/√2)² / 5 lies in the row space
(tensor([0.4000]), tensor([0.6000]))
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tracing import TracingPage


@dataclass(frozen=True)
class Config:
    renormalised: bool = (
        True  # the row-only patch is one along the span of V_row; False: V_row V_rowᵀ as it is
    )
    tolerance: float = (
        1e-5  # what is smaller, beside W's largest singular value or a direction, counts as zero
    )

    def __post_init__(self) -> None:
        require(0 < self.tolerance < 1, "0 < tolerance < 1", tolerance=self.tolerance)


@dataclass(frozen=True)
class Patched:
    """Activations after both patches, and how the directions lie to what is read downstream."""

    patched: Tensor  # [..., D]
    row_only: Tensor  # [..., D]
    row_norms: Tensor  # [r] of the columns of V_row
    null_norms: Tensor  # [r] of the columns of V_null; the squares of both sum to 1
    leak: Tensor  # [] largest |W V_null|: 0 up to rounding


def along(base: Tensor, source: Tensor, direction: Tensor) -> Tensor:
    """base [..., D] with the source's coordinate along one direction [D], of any length but zero."""
    require(
        direction.ndim == 1 and bool(direction.any()),
        "a direction is [D] and not zero",
        shape=direction.shape,
    )
    amount = (source - base) @ direction / (direction @ direction)
    return base + amount[..., None] * direction


def split(basis: Tensor, weight: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The columns of basis [D, r] as (row, null) [D, r]: in the row space of weight [M, D], and orthogonal to it."""
    _, values, rows = torch.linalg.svd(weight, full_matrices=False)
    seen = rows[values > tolerance * values.max()]
    row = seen.mT @ (seen @ basis)
    return row, basis - row


def orthonormal(vectors: Tensor, tolerance: float) -> Tensor:
    """[D, at most r]: a basis of the span of vectors [D, r]."""
    left, values, _ = torch.linalg.svd(vectors, full_matrices=False)
    return left[:, values > tolerance]


def check(base: Tensor, source: Tensor, basis: Tensor, weight: Tensor) -> None:
    width, shapes = base.shape[-1], [tuple(t.shape) for t in (base, source, basis, weight)]
    fits = basis.ndim == weight.ndim == 2 and {len(basis), weight.shape[1]} == {width}
    require(
        fits and source.shape == base.shape, "base and source [..., D], basis [D, r], W [M, D]", shapes=shapes
    )
    off = (
        (basis.mT @ basis - torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device))
        .abs()
        .max()
        .item()
    )
    require(off < 1e-4, "directions are orthonormal columns", off=off)


def measure(base: Tensor, source: Tensor, basis: Tensor, weight: Tensor, cfg: Config = Config()) -> Patched:
    """Both patches of base [..., D] by source [..., D] along basis [D, r], where weight [M, D] alone reads them."""
    check(base, source, basis, weight)
    row, null = split(basis, weight, cfg.tolerance)
    only = orthonormal(row, cfg.tolerance) if cfg.renormalised else row
    away = source - base
    return Patched(
        patched=base + away @ basis @ basis.mT,
        row_only=base + away @ only @ only.mT,
        row_norms=row.norm(dim=0),
        null_norms=null.norm(dim=0),
        leak=(weight @ null).abs().max(),
    )


def gram_schmidt(vectors: Iterable[Tensor], smallest: float) -> list[Tensor]:
    """Orthonormal vectors of the same span, one after the other; what the others leave less of than this is none."""
    found: list[Tensor] = []
    for vector in vectors:
        for _ in range(2):  # once more: the first time leaves rounding
            for other in found:
                vector = vector - (other @ vector) * other
        if vector.norm() > smallest:
            found.append(vector / vector.norm())
    return found


def reference(base: Tensor, source: Tensor, basis: Tensor, weight: Tensor, cfg: Config = Config()) -> Patched:
    """The same direction by direction: rows of W made orthonormal, projections added up, in float64."""
    base, source, basis, weight = (t.double() for t in (base, source, basis, weight))
    largest = max(float(row.norm()) for row in weight)
    seen = gram_schmidt(weight, cfg.tolerance * largest)
    directions = list(basis.T)
    rows = [sum(((u @ v) * u for u in seen), torch.zeros_like(v)) for v in directions]
    nulls = [v - row for v, row in zip(directions, rows, strict=True)]
    patched, row_only = base, base
    for v in directions:
        patched = patched + ((source - base) * v).sum(-1, keepdim=True) * v
    for v in gram_schmidt(rows, cfg.tolerance) if cfg.renormalised else rows:
        row_only = row_only + ((source - base) * v).sum(-1, keepdim=True) * v
    row_norms, null_norms = (torch.stack([v.norm() for v in part]) for part in (rows, nulls))
    leak = torch.stack([(w @ v).abs() for w in weight for v in nulls]).max()
    return Patched(patched, row_only, row_norms, null_norms, leak)


def cases(seed: int) -> Iterable[tuple]:
    """Maps of every rank, zero and more rows than width among them; directions in the null space, and all at once."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    for lead, width, r, rows in (
        ((), 3, 1, 1),
        ((4,), 6, 2, 3),
        ((2, 3), 7, 3, 1),
        ((2,), 4, 2, 6),
        ((5,), 5, 5, 2),
    ):
        basis, weight = torch.linalg.qr(normal(width, r)).Q, normal(rows, width)
        base, source = normal(*lead, width), normal(*lead, width)
        for renormalised in (True, False):
            yield base, source, basis, weight, Config(renormalised)
        yield base, source, basis, torch.cat([weight, 2 * weight[:1]])  # one row twice
        yield base, source, torch.eye(width, dtype=torch.float64)[:, :r], weight * (torch.arange(width) >= r)
        yield base, source, basis, torch.zeros_like(weight)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="Subspace patching and its illusion",
        paper="Is This the Subspace You Are Looking for? An Interpretability Illusion for Subspace Activation Patching",
        year=2023,
        idea="a patch along a subspace, beside the patch along that part of it which the next map reads",
        cost="one singular value decomposition of the map that reads the site",
        needs=("decoder-lm",),
        lineage=("activation patching", "distributed alignment search"),
        caveat="released code patches one direction and takes the row space by QR, which is too large where W has "
        "dependent rows; here singular values decide. Its row part has unit length before the row-only patch, as here "
        "by default. In the paper's toy net, whose row space is one direction, that row-only patch gives the source's "
        "output too: it tests nothing there. Holds where W alone reads h; of a residual stream, which many maps read, "
        "it splits by one of them",
    ),
)
