"""PrimeComposer: an object composed into a picture, steered by what it attends to beside the background.

    x_t ← m ⊙ x_t + (1 - m) ⊙ b_t                         at every step; b_t: the background, noised to t
    S[:, o] ← P,    S[o, :] ← Pᵀ                          self-attention, in the early steps
    C[i, w] ← -∞    for i outside the region, w of the subject's words               cross-attention

m is the region where the object goes, o its patches. P [N, |o|] are scores, before the softmax, of a side pass over the
background with the object pasted in: all its queries on the object's keys. Rows of S are written last, so they count
where the two meet. A query whose only words are the subject's keeps its scores: no row is left without a key.

Here P comes as a square [B, H, N, N] of which the object's columns are read.

>>> import torch
>>> s = torch.zeros(1, 1, 2, 2)  # two patches, the second in the region; words "a" and "cat"
>>> cat, region = torch.tensor([[False, True]]), torch.tensor([[False, True]])
>>> constrained(s, cat, region).softmax(-1)
tensor([[[[1.0000, 0.0000],
          [0.5000, 0.5000]]]])
>>> infused(torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), region)  # o: the second
tensor([[[[0., 2.],
          [2., 4.]]]])
>>> blended(torch.tensor([[[5.0], [7.0]]]), torch.tensor([[[1.0], [2.0]]]), region).flatten()
tensor([1., 7.])
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops.steered import Steered


@dataclass(frozen=True)
class Config:
    early: float = 0.4  # the share of the steps in which scores of the side pass count
    constrain: bool = True  # whether the subject's words reach the region alone

    def __post_init__(self) -> None:
        require(0 <= self.early <= 1, "a share of the steps in [0, 1]", early=self.early)


@dataclass(frozen=True)
class Composing:
    """The `memory` of `scores`: the share of the steps done, and scores [B, H, N, N] of the side pass by layer."""

    done: float
    prior: Mapping[int, Tensor] = field(default_factory=dict)


def blended(x: Tensor, background: Tensor, region: Tensor) -> Tensor:
    """x [B, N, d] in the region [B, N] bool, the noised background elsewhere."""
    require(x.shape == background.shape, "a background of x's shape", x=x.shape, background=background.shape)
    require(region.shape == x.shape[:2], "a region of x's patches", region=region.shape, x=x.shape)
    return torch.where(region[..., None], x, background)


def constrained(s: Tensor, subject: Tensor, region: Tensor) -> Tensor:
    """s [B, H, N, W] with -inf for the subject's words [B, W] at queries outside the region [B, N]."""
    hidden = (subject[:, None, None] & ~region[:, None, :, None]).expand_as(s)
    left = (~hidden & (s > -torch.inf)).any(-1, keepdim=True)
    return s.masked_fill(hidden & left, -torch.inf)


def infused(s: Tensor, prior: Tensor, target: Tensor) -> Tensor:
    """s [B, H, N, N] with the prior's columns of the object's patches [B, N], and their transpose in its rows."""
    require(prior.shape == s.shape, "a side pass over as many patches", prior=prior.shape, scores=s.shape)
    prior, column, row = prior.to(s.dtype), target[:, None, None], target[:, None, :, None]
    return torch.where(row, prior.mT, torch.where(column, prior, s))


def scores(at: Steered, s: Tensor, cfg: Config) -> Tensor:
    """Roles: "subject", of words; "region", of patches: as queries, and in self-attention as keys."""
    region, memory = at.row_role("region"), at.memory
    if (
        memory is not None
        and memory.done < cfg.early
        and at.layer in memory.prior
        and s.shape[2] == s.shape[3]
    ):
        target = at.role("region")
        s = infused(s, memory.prior[at.layer], target) if target.any() else s
    return constrained(s, at.role("subject"), region) if cfg.constrain else s


def measure(
    self_scores: Tensor,
    cross_scores: Tensor,
    prior: Tensor,
    subject: Tensor,
    region: Tensor,
    done: float,
    cfg: Config,
) -> tuple[Tensor, Tensor]:
    """Weights of self- [B, H, N, N] and cross-attention [B, H, N, W] of a layer, when a share of the steps is done."""
    looks = infused(self_scores, prior, region) if done < cfg.early else self_scores
    reads = constrained(cross_scores, subject, region) if cfg.constrain else cross_scores
    return looks.softmax(-1), reads.softmax(-1)


def reference(
    self_scores: Tensor,
    cross_scores: Tensor,
    prior: Tensor,
    subject: Tensor,
    region: Tensor,
    done: float,
    cfg: Config,
) -> tuple[Tensor, Tensor]:
    """Row by row, number by number."""
    looks, reads = torch.zeros_like(self_scores).double(), torch.zeros_like(cross_scores).double()
    inside, named = region.tolist(), subject.tolist()
    for b, h, i in (
        (b, h, i) for b in range(len(looks)) for h in range(looks.shape[1]) for i in range(looks.shape[2])
    ):
        row, side = self_scores[b, h, i].tolist(), prior[b, h].tolist()
        if done < cfg.early:
            for j in range(len(row)):
                if inside[b][i]:
                    row[j] = side[j][i]
                elif inside[b][j]:
                    row[j] = side[i][j]
        looks[b, h, i] = torch.tensor(shares(row), dtype=torch.float64)
        row = cross_scores[b, h, i].tolist()
        free = [x if not named[b][w] else -math.inf for w, x in enumerate(row)]
        cut = cfg.constrain and not inside[b][i] and max(free) > -math.inf
        reads[b, h, i] = torch.tensor(shares(free if cut else row), dtype=torch.float64)
    return looks, reads


def shares(row: list[float]) -> list[float]:
    top = max(row)
    parts = [math.exp(x - top) for x in row]
    return [part / math.fsum(parts) for part in parts]


def cases(seed: int) -> Iterable[tuple]:
    """Early and late, an empty region and a full one, padded words, a caption of the subject alone, float32, ties."""
    g = torch.Generator().manual_seed(seed)

    def drawn(batch: int, heads: int, n: int, w: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        shapes = ((batch, heads, n, n), (batch, heads, n, w), (batch, heads, n, n))
        numbers = [3 * torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]
        return numbers + [torch.rand(batch, size, generator=g) < 0.4 for size in (w, n)]

    yield *drawn(2, 2, 6, 4), 0.0, Config()
    yield *drawn(1, 2, 5, 3), 0.4, Config()
    yield *drawn(1, 1, 4, 4, torch.float32), 0.2, Config(constrain=False)
    look, read, prior, subject, region = drawn(2, 1, 5, 4)
    read[..., 2:] = -torch.inf  # padding
    subject[0], subject[1] = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()
    yield look, read, prior, subject, region, 0.9, Config(early=1.0)
    yield look.round(), read, prior.round(), subject, torch.zeros_like(region), 0.0, Config()
    yield look, read, prior, subject, torch.ones_like(region), 0.0, Config()
    yield *drawn(1, 1, 1, 1), 0.0, Config()


METHOD = SteeringPage(
    config=Config,
    scores=scores,
    measure=measure,
    reference=reference,
    cases=cases,
    acts_on_models=False,
    card=Card(
        title="PrimeComposer",
        paper="PrimeComposer: Faster Progressively Combined Diffusion for Image Composition with Attention Steering",
        year=2024,
        idea="only the object's region is generated; attention of a side pass over object and background replaces the "
        "scores that concern it, and its words reach no patch outside",
        cost="a second pass in the early steps",
        needs=("diffusion", "a region"),
        lineage=("TF-ICON", "Prompt-to-Prompt"),
        neutral={"early": 0.0, "constrain": False},
        caveat="scores are replaced before the softmax, columns and then rows, as in the released code. There P's keys "
        "are those of a reference image of the object alone, only the conditional half of a guided batch is steered, "
        "the background is put back outside the object's box, not its mask, and only until 0.8 of the steps, and the "
        "constraint on words never acts: the list of the subject's words is overwritten with None before it is read. "
        "Here, as in the paper, the background is put back at every step and the constraint acts. Blending is the "
        "sampler's, with `blended`",
    ),
)
