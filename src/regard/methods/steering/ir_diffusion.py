"""IR-Diffusion: subjects of one picture do not see each other, and meet their references in the same place.

    isolation     S_ij = -∞  where i and j are tokens of subjects and share none
    reposition    u = c + (p - a) / (b - a) · (d - c)      from a subject's box [a, b) to the common [c, d), each axis

Two subjects that attend to one another grow alike; tokens attend to near tokens, so a subject that stands elsewhere in
the reference picture is hardly looked at. `moved` puts a subject's tokens, of the target and of the reference, into one
common box (bilinear, pixel centres at 1/2); they attend to each other there, and `moved` from the common box to the
subject's own puts the result back. Tokens of the background belong to no subject: they see all and are seen by all.

>>> import torch
>>> one, two = torch.tensor([[[1, 0, 0]], [[0, 1, 0]]]).bool()
>>> hidden(torch.stack([one, two], 1), torch.stack([one, two], 1)).long()  # the third token is background
tensor([[[0, 1, 0],
         [1, 0, 0],
         [0, 0, 0]]])
>>> row = torch.tensor([[[1.0], [3.0], [0.0], [0.0]]])  # 1 x 4 tokens; a box of two becomes one of four, then of one
>>> moved(row, (1, 4), (0, 0, 1, 2), (0, 0, 1, 4)).flatten()
tensor([1.0000, 1.5000, 2.5000, 3.0000])
>>> moved(row, (1, 4), (0, 0, 1, 2), (0, 3, 1, 1)).flatten()
tensor([1., 3., 0., 2.])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops.steered import Steered

Box = tuple[int, int, int, int]  # first row and column, rows, columns


@dataclass(frozen=True)
class Config:
    subjects: int = 2  # roles "subject_0", "subject_1", ...; of one subject or none nothing is kept apart

    def __post_init__(self) -> None:
        require(self.subjects >= 0, "a number of subjects", subjects=self.subjects)


def hidden(rows: Tensor, keys: Tensor) -> Tensor:
    """[B, R, n] bool: who may not see whom; rows [B, S, R] and keys [B, S, n] bool: who is of which subject."""
    apart = torch.einsum("bsr,bsn->brn", rows.float(), keys.float()) == 0
    return apart & rows.any(1)[:, :, None] & keys.any(1)[:, None]


def scores(at: Steered, s: Tensor, cfg: Config) -> Tensor:
    """Roles "subject_0", "subject_1", ... of image tokens; one may be of several, and then sees all of these."""
    if cfg.subjects < 2:
        return s
    names = [f"subject_{i}" for i in range(cfg.subjects)]
    rows, keys = (torch.stack([of(name) for name in names], dim=1) for of in (at.row_role, at.role))
    return s.masked_fill(hidden(rows, keys)[:, None], -torch.inf)


def box_of(mask: Tensor, grid: tuple[int, int]) -> Box:
    """The smallest box that holds a mask [P] of tokens on a grid."""
    require(bool(mask.any()), "a subject of a token or more", tokens=int(mask.sum()))
    y, x = (side.flatten() for side in mask.view(grid).nonzero().T)
    top, left = int(y.min()), int(x.min())
    return top, left, int(y.max()) - top + 1, int(x.max()) - left + 1


def check(grid: tuple[int, int], *boxes: Box) -> None:
    for top, left, rows, columns in boxes:
        fits = min(top, left) >= 0 and rows > 0 and columns > 0 and top + rows <= grid[0]
        require(
            fits and left + columns <= grid[1],
            "a box within the grid",
            box=(top, left, rows, columns),
            grid=grid,
        )


def shares(size: int, target: int) -> Tensor:
    """[target, size] float64: how much of each of `size` tokens in a row a token of the resized row is made of."""
    at = ((torch.arange(target, dtype=torch.float64) + 0.5) * size / target - 0.5).clamp(0, size - 1)
    return (1 - (at[:, None] - torch.arange(size)).abs()).clamp(min=0)


def moved(x: Tensor, grid: tuple[int, int], box: Box, common: Box) -> Tensor:
    """x [..., P, d] with the tokens of `common` made of those of `box`; all others as they were."""
    check(grid, box, common)
    top, left, rows, columns = box
    part = x.unflatten(-2, grid)[..., top : top + rows, left : left + columns, :]
    part = part if x.dtype == torch.float64 else part.float()
    tall, wide = (shares(*sizes).to(part) for sizes in ((rows, common[2]), (columns, common[3])))
    resized = torch.einsum("ay,...yxd,bx->...abd", tall, part, wide)
    result = x.unflatten(-2, grid).clone()
    result[..., common[0] : common[0] + common[2], common[1] : common[1] + common[3], :] = resized.to(x.dtype)
    return result.flatten(-3, -2)


def measure(
    s: Tensor, subjects: Tensor, x: Tensor, grid: tuple[int, int], box: Box, common: Box
) -> tuple[Tensor, Tensor, Tensor]:
    """Isolated weights of scores [B, H, P, P] of subjects [B, S, P]; x [B, P, d] moved from box to common, and back."""
    there = moved(x, grid, box, common)
    weights = s.masked_fill(hidden(subjects, subjects)[:, None], -torch.inf).softmax(-1)
    return weights, there, moved(there, grid, common, box)


def reference(
    s: Tensor, subjects: Tensor, x: Tensor, grid: tuple[int, int], box: Box, common: Box
) -> tuple[Tensor, Tensor, Tensor]:
    """Pair by pair of tokens; each token of the common box from where it comes, between four others."""
    weights = torch.zeros_like(s).double()
    for b in range(len(s)):
        of = [{i for i, flags in enumerate(subjects[b].tolist()) if flags[p]} for p in range(s.shape[-1])]
        for h, p in ((h, p) for h in range(s.shape[1]) for p in range(s.shape[-1])):
            row = s[b, h, p].tolist()
            parts = [
                0.0 if of[p] and of[k] and not of[p] & of[k] else math.exp(row[k]) for k in range(len(row))
            ]
            weights[b, h, p] = torch.tensor([part / math.fsum(parts) for part in parts], dtype=torch.float64)
    there = between(x.double(), grid, box, common)
    there = there.to(x.dtype).double()
    return weights, there, between(there, grid, common, box)


def between(x: Tensor, grid: tuple[int, int], box: Box, common: Box) -> Tensor:
    result = x.clone()
    for i, j in ((i, j) for i in range(common[2]) for j in range(common[3])):
        y, z = (
            min(max((n + 0.5) * box[a] / common[a] - 0.5, 0.0), box[a] - 1.0) for n, a in ((i, 2), (j, 3))
        )
        total = torch.zeros_like(x[:, 0])
        for row, high in ((math.floor(y), 1 - y % 1), (math.ceil(y), y % 1)):
            for column, wide in ((math.floor(z), 1 - z % 1), (math.ceil(z), z % 1)):
                total += high * wide * x[:, (box[0] + row) * grid[1] + box[1] + column]
        result[:, (common[0] + i) * grid[1] + common[1] + j] = total
    return result


def cases(seed: int) -> Iterable[tuple]:
    """Boxes that grow, shrink, only shift, overlap or are the grid; subjects that share tokens, none, float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(
        batch: int, heads: int, count: int, grid: tuple[int, int], dtype: torch.dtype = torch.float64
    ) -> list:
        n = grid[0] * grid[1]
        s = torch.randn(batch, heads, n, n, generator=g, dtype=dtype)
        subjects = torch.rand(batch, count, n, generator=g) < 0.4
        return [s, subjects, torch.randn(batch, n, 3, generator=g, dtype=dtype), grid]

    yield *drawn(2, 2, 2, (4, 5)), (0, 0, 2, 2), (1, 2, 3, 3)
    yield *drawn(1, 2, 3, (4, 4)), (0, 1, 3, 3), (2, 0, 2, 2)
    yield *drawn(1, 1, 2, (3, 4), torch.float32), (0, 0, 2, 2), (1, 2, 2, 2)
    yield *drawn(1, 1, 1, (3, 3)), (0, 0, 3, 3), (0, 0, 3, 3)
    yield *drawn(1, 1, 2, (4, 4)), (0, 0, 4, 3), (1, 1, 1, 2)
    yield *drawn(1, 1, 2, (1, 1)), (0, 0, 1, 1), (0, 0, 1, 1)


METHOD = SteeringPage(
    config=Config,
    scores=scores,
    measure=measure,
    reference=reference,
    cases=cases,
    acts_on_models=False,
    card=Card(
        title="IR-Diffusion",
        paper="Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition "
        "Attention",
        year=2024,
        idea="tokens of one subject do not see those of another; a subject and its reference are scaled and shifted to "
        "one place before they attend to each other, and back after it",
        cost="a pass of the reference picture, and of each subject's tokens two resizings in a layer",
        needs=("diffusion", "masks of the subjects"),
        lineage=("ConsiStory",),
        neutral={"subjects": 1},
        caveat="no code was found: steps, layers and where masks come from are the caller's, resizing is bilinear. "
        "Isolation holds in a layer; over several layers subjects still meet by way of the background, which sees and "
        "is seen by both. What is moved must not hold its place in it already: with rotary positions that is queries "
        "and keys before they are turned. Where a box shrinks, coming back does not restore what was there",
    ),
)
