"""Imbalanced attention fixed: each head sees more of two sets of visual tokens, as far as it looks at the image.

    local: the quarter of visual tokens that text attends to most      salient: visual tokens to which the others of the
    m_h = Σ A_j over the image, a head's sensitivity                   image attend beyond Q3 + 1.5 (Q3 - Q1); not local
    A_j <- A_j (1 + g_j m_h) / Σ_k A_k (1 + g_k m_h)                   g_j = 0.7 local, 0.3 salient, 0 elsewhere

A is after the softmax, of the newest token, in deeper layers. Both sets are of each layer, from means over heads, found
on the prompt and kept while tokens are generated.

>>> import torch
>>> A, image = torch.tensor([[[[0.5, 0.5, 0.0]], [[0.1, 0.1, 0.8]]]]), torch.tensor([[True, True, False]])
>>> g = torch.tensor([[1.0, 0.0, 0.0]])  # token 0 is marked
>>> amplified(A, g, image)  # m = 1: (1, 0.5, 0) / 1.5;  m = 0.2: (0.12, 0.1, 0.8) / 1.02
tensor([[[[0.6667, 0.3333, 0.0000]],
<BLANKLINE>
         [[0.1176, 0.0980, 0.7843]]]])
>>> amplified(A, g, image, weighted=False)[0, 1, 0]  # as much added in all: m = (1 · 0.5 + 0.2 · 0.1) / 0.6 in both
tensor([0.1718, 0.0920, 0.7362])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered


@dataclass(frozen=True)
class Config:
    local: float = 0.7  # gain of local tokens
    salient: float = 0.3  # gain of salient ones
    share: float = 0.25  # of visual tokens that are local
    depth: float = 0.5  # share of the layers, from the first on, that are left as they are
    weighted: bool = (
        True  # False, a control: every head the same gain, and as much weight added over all of them
    )

    def __post_init__(self) -> None:
        gains = (self.local, self.salient)
        require(min(gains) >= 0, "gains >= 0", local=self.local, salient=self.salient)
        require(0 <= self.share <= 1, "0 <= share <= 1", share=self.share)
        require(0 <= self.depth < 1, "0 <= depth < 1", depth=self.depth)


def attended(w: Tensor, rows: Tensor) -> Tensor:
    """[B, n] mean weight over heads and over those of the queries [B, R] bool."""
    return torch.einsum("bhrn,br->bn", w, rows.to(w.dtype)) / (w.shape[1] * rows.sum(1).clamp(min=1))[:, None]


def highest_share(scores: Tensor, image: Tensor, share: float) -> Tensor:
    """[B, n] bool: the share of each text's image with the highest scores, rounded; of equal ones the earlier."""
    order = scores.masked_fill(~image, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    count = (image.sum(-1, keepdim=True) * share + 0.5).floor()
    return (order.argsort(-1) < count) & image


def outliers(scores: Tensor, image: Tensor) -> Tensor:
    """[B, n] bool: visual tokens whose scores are above the third quartile by 1.5 of the distance between quartiles."""
    low, high = scores.where(image, torch.nan).nanquantile(
        torch.tensor([0.25, 0.75], dtype=scores.dtype, device=scores.device), dim=-1, keepdim=True
    )
    return (scores > high + 1.5 * (high - low)) & image


def gains(w: Tensor, image: Tensor, text: Tensor, visual: Tensor, cfg: Config) -> Tensor:
    """[B, n] g of each key: w [B, H, R, n] of a prompt, image [B, n]; its rows of text and of the image [B, R] bool."""
    salient = outliers(attended(w, visual), image)
    local = highest_share(attended(w, text), image, cfg.share) & ~salient
    return cfg.local * local.to(w.dtype) + cfg.salient * salient.to(w.dtype)


def amplified(w: Tensor, g: Tensor, image: Tensor, weighted: bool = True) -> Tensor:
    """w [B, H, R, n] with gains g [B, n] as far as each head looks at the image [B, n]; rows keep their sums."""
    m = w.masked_fill(~image[:, None, None], 0).sum(-1, keepdim=True)  # [B, H, R, 1]
    g = g[:, None, None]
    if not weighted:
        marked = (w * g).sum(-1, keepdim=True)
        m = ((m * marked).sum(1, keepdim=True) / marked.sum(1, keepdim=True).clamp(min=1e-12)).expand_as(m)
    grown = w * (1 + g * m)
    total = grown.sum(-1, keepdim=True)
    return grown * (w.sum(-1, keepdim=True) / total.where(total > 0, 1))


def measure(
    w: Tensor, image: Tensor, text: Tensor, visual: Tensor, cfg: Config | None = None
) -> tuple[Tensor, Tensor]:
    """The last row [B, H, 1, n] of a prompt's weights, amplified, and the gains [B, n]."""
    cfg, wide = cfg or Config(), at_least_float32(w)
    g = gains(wide, image, text, visual, cfg)
    return amplified(wide[:, :, -1:], g, image, cfg.weighted).to(w.dtype), g


def acts(at: Steered, cfg: Config) -> bool:
    return max(cfg.local, cfg.salient) > 0 and at.layer >= cfg.depth * at.layers


def weights(at: Steered, w: Tensor, cfg: Config) -> Tensor:
    wide, image = at_least_float32(w), at.role("image")
    newest = at.rows == at.rows.amax(1, keepdim=True)
    if at.phase == "prefill":
        visual = at.row_role("image")
        after = visual.flip(1).cumsum(1).flip(1) == 0  # text that sees the whole image
        at.notes["g"] = gains(wide, image, after & (at.rows >= 0), visual, cfg)
    g = F.pad(at.notes["g"], (0, w.shape[-1] - at.notes["g"].shape[1]))
    changed = amplified(wide, g, image, cfg.weighted).to(w.dtype)
    return torch.where(newest[:, None, :, None], changed, w)


def reference(
    w: Tensor, image: Tensor, text: Tensor, visual: Tensor, cfg: Config | None = None
) -> tuple[Tensor, Tensor]:
    """By the definition, number by number."""
    cfg, (B, H, R, n) = cfg or Config(), w.shape
    changed, g = torch.zeros(B, H, 1, n).double(), torch.zeros(B, n).double()
    for b in range(B):
        A, picture = w[b].double().tolist(), [j for j in range(n) if image[b, j]]

        def mean(j: int, rows: Tensor, A: list = A) -> float:
            seen = [head[i][j] for head in A for i in range(R) if rows[i]]
            return math.fsum(seen) / max(len(seen), 1)

        looked = sorted(mean(j, visual[b]) for j in picture)
        low, high = (quartile(looked, q) for q in (0.25, 0.75))
        salient = [j for j in picture if mean(j, visual[b]) > high + 1.5 * (high - low)]
        ranked = sorted(picture, key=lambda j: -mean(j, text[b]))
        local = ranked[: math.floor(len(picture) * cfg.share + 0.5)]
        for j in picture:
            g[b, j] = cfg.salient if j in salient else cfg.local if j in local else 0.0
        given, last = g[b].tolist(), [head[-1] for head in A]
        m = [math.fsum(row[j] for j in picture) for row in last]
        marked = [math.fsum(x * a for x, a in zip(given, row, strict=True)) for row in last]
        if not cfg.weighted and sum(marked):
            m = [math.fsum(x * y for x, y in zip(m, marked, strict=True)) / math.fsum(marked)] * H
        for h, row in enumerate(last):
            grown = [a * (1 + x * m[h]) for a, x in zip(row, given, strict=True)]
            changed[b, h, 0] = torch.tensor([a * sum(row) / sum(grown) for a in grown], dtype=torch.float64)
    return changed, g


def quartile(ordered: list[float], q: float) -> float:
    if not ordered:
        return 0.0
    place = q * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def cases(seed: int) -> Iterable[tuple]:
    """An outlier; images of two sizes; a uniform gain; float32 with ties; no image; one token; gains 0."""
    g = torch.Generator().manual_seed(seed)

    def drawn(B: int, n: int, images: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        s = 2 * torch.randn(B, 2, n, n, generator=g, dtype=dtype)
        s[..., 2 % n] += 5  # of the image, where it has three tokens or more
        w = s.masked_fill(torch.ones(n, n).bool().triu(1), -torch.inf).softmax(-1)
        image = (torch.arange(n) >= 1) & (torch.arange(n) <= torch.tensor(images)[:, None])
        return [w, image, torch.arange(n) > torch.tensor(images)[:, None], image]

    yield tuple(drawn(2, 14, [10, 7]))
    yield *drawn(2, 14, [10, 9]), Config(weighted=False, share=0.5)
    w, *rest = drawn(1, 8, [4], torch.float32)
    yield torch.ones_like(w).tril().softmax(-1), *rest, Config(salient=0.0)
    yield *drawn(1, 6, [0]), Config(weighted=False)
    yield tuple(drawn(1, 1, [0]))
    yield *drawn(2, 9, [6, 2]), Config(local=0.0, salient=0.0)


METHOD = SteeringPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    acts=acts,
    weights=weights,
    needs_image=True,
    card=Card(
        title="Imbalanced attention fixed",
        paper="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
        year=2025,
        idea="heads that look at the image see more of its local and of its salient tokens, in deeper layers",
        cost="two means of each prompt's weights at a layer; a product and a sum for each new token",
        needs=("vlm",),
        lineage=("pai",),
        neutral={"local": 0.0, "salient": 0.0},
        caveat="the abstract and the catalogue give the form, the code gains and thresholds. The code, of a later "
        "version called PAINT, takes both sets from the vision tower's class token, raises scores before the "
        "softmax by g |S| and has no gain of a head's own; here sets are of the decoder's weights and the "
        "gain of a head is its weight on the image, as the abstract has it. The code begins at layer 2, here "
        "the deeper half is changed",
    ),
)
