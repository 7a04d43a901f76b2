"""Imbalanced attention fixed: each head sees more of two sets of visual tokens, as far as it looks at the image.

    summary: tokens to which the vision tower's class token attends beyond Q3 + 1.5 (Q3 - Q1), in its last layer but one
    local:   the quarter to which it attends most in the first layer, less the summary
    m_h = Σ A_j over the image, a head's sensitivity
    A_j <- A_j (1 + g_j m_h) / Σ_k A_k (1 + g_k m_h)        g_j = 0.7 local, 0.3 summary, 0 elsewhere

A is after the softmax, of the newest token, in deeper layers. The tower's weights are summed over its heads.

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

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered


@dataclass(frozen=True)
class Config:
    local: float = 0.7  # gain of local tokens
    summary: float = 0.3  # gain of summary tokens
    share: float = 0.25  # of visual tokens that are local
    depth: float = 0.5  # share of the layers, from the first on, that are left as they are
    weighted: bool = (
        True  # False, a control: every head the same gain, and as much weight added over all of them
    )

    def __post_init__(self) -> None:
        gains = (self.local, self.summary)
        require(min(gains) >= 0, "gains >= 0", local=self.local, summary=self.summary)
        require(0 <= self.share <= 1, "0 <= share <= 1", share=self.share)
        require(0 <= self.depth < 1, "0 <= depth < 1", depth=self.depth)


def highest_share(scores: Tensor, share: float) -> Tensor:
    """[B, P] bool: the share of scores [B, P] that is highest, rounded; of equal ones the earlier."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1) < int(scores.shape[-1] * share + 0.5)


def outliers(scores: Tensor) -> Tensor:
    """[B, P] bool: above the third quartile by more than 1.5 of the distance between quartiles."""
    low, high = scores.quantile(scores.new_tensor([0.25, 0.75]), dim=-1, keepdim=True)
    return scores > high + 1.5 * (high - low)


def gains(early: Tensor, late: Tensor, cfg: Config) -> Tensor:
    """[B, P] g of visual tokens, by weights [B, H, P] of the class token in the first layer and the last but one."""
    summary = outliers(at_least_float32(late).sum(1))
    local = highest_share(at_least_float32(early).sum(1), cfg.share) & ~summary
    return cfg.local * local.to(early.dtype) + cfg.summary * summary.to(early.dtype)


def at_keys(g: Tensor, image: Tensor) -> Tensor:
    """[B, n] gains of keys: those of visual tokens g [B, P] where image [B, n] is, in order."""
    return torch.zeros(image.shape, dtype=g.dtype, device=g.device).masked_scatter(image, g)


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
    w: Tensor, image: Tensor, early: Tensor, late: Tensor, cfg: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [B, H, R, n], amplified, and gains [B, P]: image [B, n], P in each text; early, late as of `gains`."""
    cfg, wide = cfg or Config(), at_least_float32(w)
    g = gains(early, late, cfg)
    return amplified(wide, at_keys(g.to(wide.dtype), image), image, cfg.weighted).to(w.dtype), g


def acts(at: Steered, cfg: Config) -> bool:
    return max(cfg.local, cfg.summary) > 0 and at.layer >= cfg.depth * at.layers


def prepare(runs: object, at: Steered, cfg: Config) -> Tensor:
    return gains(at.class_attention(0), at.class_attention(-2), cfg)


def weights(at: Steered, w: Tensor, cfg: Config) -> Tensor:
    wide, image = at_least_float32(w), at.role("image")
    if "g" not in at.notes:  # by column, in notes: these follow beams, and a generated token is never marked
        at.notes["g"] = at_keys(at.memory.to(wide.dtype), image)
    kept, keys = at.notes["g"], at.keys
    known = (keys >= 0) & (keys < kept.shape[1])
    g = kept.gather(1, keys.clamp(0, kept.shape[1] - 1)) * known
    return amplified(wide, g, image, cfg.weighted).to(w.dtype)


def reference(
    w: Tensor, image: Tensor, early: Tensor, late: Tensor, cfg: Config | None = None
) -> tuple[Tensor, Tensor]:
    """By the definition, number by number."""
    cfg, (B, H, R, n), P = cfg or Config(), w.shape, early.shape[-1]
    changed, g = torch.zeros(B, H, R, n).double(), torch.zeros(B, P).double()
    for b in range(B):
        first, last = (
            [math.fsum(x) for x in zip(*heads[b].tolist(), strict=True)] for heads in (early, late)
        )
        low, high = (quartile(sorted(last), q) for q in (0.25, 0.75))
        ranked = sorted(range(P), key=first.__getitem__, reverse=True)
        for j in ranked[: math.floor(P * cfg.share + 0.5)]:
            g[b, j] = cfg.local
        for j in (j for j in range(P) if last[j] > high + 1.5 * (high - low)):
            g[b, j] = cfg.summary
        picture, gain = [j for j in range(n) if image[b, j]], [0.0] * n
        for j, x in zip(picture, g[b].tolist(), strict=True):
            gain[j] = x
        for i in range(R):
            rows = [w[b, h, i].double().tolist() for h in range(H)]
            m = [math.fsum(row[j] for j in picture) for row in rows]
            marked = [math.fsum(x * a for x, a in zip(gain, row, strict=True)) for row in rows]
            if not cfg.weighted and sum(marked):
                m = [math.fsum(x * y for x, y in zip(m, marked, strict=True)) / math.fsum(marked)] * H
            for h, row in enumerate(rows):
                grown = [a * (1 + x * m[h]) for a, x in zip(row, gain, strict=True)]
                scale = math.fsum(row) / math.fsum(grown)
                changed[b, h, i] = torch.tensor([a * scale for a in grown], dtype=torch.float64)
    return changed, g


def quartile(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def cases(seed: int) -> Iterable[tuple]:
    """An outlier that is local too; a uniform gain; float32 in ties; one visual token; gains 0; no mass on marked."""
    g = torch.Generator().manual_seed(seed)

    def drawn(B: int, R: int, n: int, P: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        w = (2 * torch.randn(B, 3, R, n, generator=g, dtype=dtype)).softmax(-1)
        early, late = torch.rand(2, B, 2, P, generator=g, dtype=dtype)
        early[..., P // 2] += 1
        late[..., P // 2] += 4
        start = torch.randint(n - P + 1, (B, 1), generator=g)
        image = (torch.arange(n) >= start) & (torch.arange(n) < start + P)
        return [w, image, early, late]

    yield tuple(drawn(2, 1, 14, 9))
    yield *drawn(2, 2, 14, 8), Config(weighted=False, share=0.5)
    w, image, early, late = drawn(1, 1, 8, 6, torch.float32)
    yield w, image, torch.ones_like(early), late, Config(summary=0.0)
    yield tuple(drawn(2, 1, 3, 1))
    yield *drawn(2, 1, 9, 6), Config(local=0.0, summary=0.0)
    w, image, early, late = drawn(1, 1, 7, 4)
    yield w.masked_fill(image[:, None, None], 0), image, early, late, Config(weighted=False)


METHOD = SteeringPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    acts=acts,
    prepare=prepare,
    weights=weights,
    rows="last",
    needs_image=True,
    test_settings=({"depth": 0.0},),
    card=Card(
        title="Imbalanced attention fixed",
        paper="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
        year=2025,
        idea="heads that look at the image see more of its local and of its summary tokens, in deeper layers",
        cost="two rows of the vision tower's weights; a product and a sum of the newest token's weights at a layer",
        needs=("vlm", "a class token in the vision tower", "an image a text"),
        lineage=("pai",),
        neutral={"local": 0.0, "summary": 0.0},
        caveat="sets, gains and thresholds are the released code's, of a later version called PAINT; that the gain "
        "of a head is its weight on the image, and that deeper layers are changed, is the abstract's. The "
        "code has no gain of a head's own, raises scores before the softmax by g |S| and begins at layer 2; "
        "its third set, by rows of the tower's weights, is empty. `weighted=False` is a control of ours: "
        "before rows are renormalised it adds as much weight over all heads",
    ),
)
