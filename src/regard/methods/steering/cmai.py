"""CMAI: a text token does not see the image tokens that the texts it attends to do not look at.

    Ā_tt = A_tt / Σ_t' A_tt'          a text row's attention on text keys up to itself, summing to 1
    F = Ā_tt A_ti                     what those texts look at: [text rows, image keys]
    s_ti <- -inf                      for the share of the image keys a row sees at which its F is lowest

A is the mean over the heads of a layer's attention as it is before the change, and one choice serves all heads. While
tokens are generated the rows of A_ti that came before are remembered, layer by layer.

>>> import torch
>>> A = torch.tensor([[0.1, 0.4, 0.5, 0.0], [0.3, 0.1, 0.3, 0.3]])  # keys: image, image, text, text
>>> image, text = torch.tensor([[True, True, False, False]]), torch.tensor([[True, True]])
>>> found = measure(A.log()[None, None], image, text, torch.zeros(1, 2, 4), Config(inhibit=0.5))
>>> found.focus[0, :, :2]  # the second row: half of its own and half of the first's, (0.3, 0.1) and (0.1, 0.4)
tensor([[0.1000, 0.4000],
        [0.2000, 0.2500]])
>>> found.inhibited[0, 1]  # although the row itself looks more at the first
tensor([ True, False, False, False])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops.steered import Steered


@dataclass(frozen=True)
class Config:
    inhibit: float = 0.5  # of the image keys that a text row sees, the share that is hidden from it
    first: int = 0  # the first layer where it acts

    def __post_init__(self) -> None:
        require(0 <= self.inhibit < 1, "0 <= inhibit < 1", inhibit=self.inhibit)
        require(self.first >= 0, "first >= 0", first=self.first)


@dataclass(frozen=True)
class Found:
    """focus [B, R, n]; inhibited [B, R, n] bool; looked [B, n, n] A_ti of all rows so far, zero for other pairs."""

    focus: Tensor
    inhibited: Tensor
    looked: Tensor


def measure(s: Tensor, image: Tensor, text: Tensor, earlier: Tensor, cfg: Config | None = None) -> Found:
    """Of scores s [B, H, R, n], image keys [B, n], text rows [B, R] and the A_ti of rows before, [B, n - R, n]."""
    cfg, wide = cfg or Config(), s if s.dtype == torch.float64 else s.float()
    shown = wide > -torch.inf
    weights = wide.softmax(-1).where(shown, 0).mean(1)
    looked = torch.cat([earlier, weights * (image[:, None] & text[..., None])], dim=1)
    on_text = weights * ~image[:, None]
    share = on_text / on_text.sum(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    focus = (share @ looked) * text[..., None]
    pairs = shown.any(1) & image[:, None] & text[..., None]
    return Found(focus, lowest(focus, pairs, cfg.inhibit), looked)


def lowest(focus: Tensor, pairs: Tensor, share: float) -> Tensor:
    """[..., n] bool: of each row's pairs this share, rounded down, with the lowest focus; of equal ones the later."""
    order = focus.masked_fill(~pairs, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    count = pairs.sum(-1, keepdim=True)
    return (order.argsort(dim=-1) >= count - (share * count + 1e-6).floor()) & pairs


def scores(at: Steered, s: Tensor, cfg: Config) -> Tensor:
    if not cfg.inhibit:
        return s
    image, text = at.role("image"), ~at.row_role("image") & (at.rows >= 0)
    rows, n = s.shape[-2:]
    earlier = at.notes.get("looked", s.new_zeros(len(s), 0, 0, dtype=torch.float32))
    # rows that were never seen here looked at nothing
    earlier = pad(earlier, (0, n - earlier.shape[2], n - rows - earlier.shape[1], 0))
    found = measure(s, image, text, earlier, cfg)
    at.notes["looked"] = found.looked
    return s.masked_fill(found.inhibited[:, None], -torch.inf)


def acts(at: Steered, cfg: Config) -> bool:
    return at.layer >= cfg.first


def reference(s: Tensor, image: Tensor, text: Tensor, earlier: Tensor, cfg: Config | None = None) -> Found:
    """By the definition: a text and a row at a time, sums over the texts that it attends to, keys struck one by one."""
    cfg, (B, H, R, n) = cfg or Config(), s.shape
    looked = torch.cat([earlier.double(), torch.zeros(B, R, n, dtype=torch.float64)], dim=1)
    focus, inhibited = torch.zeros(B, R, n, dtype=torch.float64), torch.zeros(B, R, n, dtype=torch.bool)
    for b, r in [(b, r) for b in range(B) for r in range(R) if text[b, r]]:
        heads = [attention(row) for row in s[b, :, r].double().tolist()]
        a = [math.fsum(column) / H for column in zip(*heads, strict=True)]
        seen = [j for j in range(n) if image[b, j] and any(row[j] > -math.inf for row in s[b, :, r].tolist())]
        for j in (j for j in range(n) if image[b, j]):
            looked[b, n - R + r, j] = a[j]
        texts = [t for t in range(n) if not image[b, t]]
        total = math.fsum(a[t] for t in texts)
        for j in (j for j in range(n) if image[b, j]):
            focus[b, r, j] = math.fsum(a[t] / total * looked[b, t, j].item() for t in texts)
        left = list(reversed(seen))
        for _ in range(math.floor(cfg.inhibit * len(seen) + 1e-6)):
            gone = min(left, key=lambda j: round(focus[b, r, j].item(), 7))
            left.remove(gone)
            inhibited[b, r, gone] = True
    return Found(focus, inhibited, looked)


def attention(row: list[float]) -> list[float]:
    powers = [math.exp(x - max(row)) for x in row]
    return [p / math.fsum(powers) for p in powers]


def cases(seed: int) -> Iterable[tuple]:
    """Whole prompts: image between texts, padding before it, two images, ties; a generated token; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(kinds: list[str], rows: int, heads: int = 2, dtype: torch.dtype = torch.float64) -> list:
        n, marks = len(kinds[0]), [list(kind) for kind in kinds]
        image, real = (torch.tensor([[m in of for m in row] for row in marks]) for of in ("i", "it"))
        s = torch.randn(len(kinds), heads, n, n, generator=g, dtype=dtype)
        unseen = torch.ones(n, n).triu(1).bool() | ~real[:, None, None]
        s = s.masked_fill(unseen & ~torch.eye(n).bool(), -torch.inf)[:, :, n - rows :]
        before = torch.rand(len(kinds), n - rows, n, generator=g, dtype=dtype) * image[:, None]
        return [s, image, (real & ~image)[:, n - rows :], before]

    yield *drawn(["tiiiittt", "ptiiiitt"], 8), Config()
    yield *drawn(["iititiitt"], 9, heads=3), Config(inhibit=0.7)
    yield *drawn(["tiiiittt", "ptiiiitt"], 1), Config(inhibit=0.3)
    yield *drawn(["tiiiiitt"], 2, dtype=torch.float32), Config(inhibit=0.25)
    s, *rest = drawn(["tiiiitt"], 7, heads=1)
    yield torch.zeros_like(s).where(s > -torch.inf, s), *rest, Config()
    yield *drawn(["ttit"], 4), Config(inhibit=0.0)


METHOD = SteeringPage(
    config=Config,
    acts=acts,
    scores=scores,
    measure=measure,
    reference=reference,
    cases=cases,
    needs_image=True,
    card=Card(
        title="CMAI",
        paper="Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy",
        year=2024,
        idea="text rows see only the image tokens that the texts they attend to look at",
        cost="attention as a matrix in every layer, and a product of its text rows; an [n, n] memory for each layer",
        needs=("vlm",),
        lineage=("attention rollout",),
        neutral={"inhibit": 0.0},
        caveat="no code was found, and of the paper its abstract: that the share is per row and of what the row sees, "
        "that heads are averaged and share one choice, that text keys are normalised and image keys are not, that it "
        "acts from layer 0, and in the prompt's text as well as in what is generated, are choices made here. Its "
        "other half, which compresses the image before the decoder, is the page vmtc_cmai. Beams that are put into "
        "another order while tokens are generated keep the memory of their places",
    ),
)
