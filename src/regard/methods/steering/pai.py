"""PAI: the newest token's scores on the image are raised, and the logits are contrasted with those without image.

    S_j <- S_j + α |S_j|        j a token of the image, S the newest token's scores, before the softmax
    l <- γ l - (γ - 1) l_text   where l's probability is at least 0.1 times the largest, else -∞

A score of either sign goes up. l_text is a stream that sees no image, without raised scores; γ = 1 leaves it out.

>>> import torch
>>> S, image = torch.tensor([[[[1.0, -2.0, 3.0]]]]), torch.tensor([[True, True, False]])
>>> raised(S, image, 0.5)  # 1 + 0.5 · 1, -2 + 0.5 · 2, 3
tensor([[[[ 1.5000, -1.0000,  3.0000]]]])
>>> mixed(torch.tensor([[2.0, 1.0, -4.0]]), torch.tensor([[2.0, 0.0, 0.0]]), Config(gamma=2.0))
tensor([[2., 2., -inf]])
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered, Stream, contrasted

TEXT = "text"


@dataclass(frozen=True)
class Config:
    alpha: float = 0.2  # how far scores on the image are raised
    gamma: float = 1.1  # guidance; 1: no stream beside the main one
    cut: float = 0.1  # tokens less likely than this times the likeliest are never said
    first: int = 2  # layers before this one are left as they are
    spared: int = 0  # and so many of the last

    def __post_init__(self) -> None:
        require(self.alpha >= 0, "alpha >= 0", alpha=self.alpha)
        require(self.gamma >= 1, "gamma >= 1", gamma=self.gamma)
        require(0 <= self.cut <= 1, "0 <= cut <= 1", cut=self.cut)
        require(self.first >= 0 and self.spared >= 0, "layers >= 0", first=self.first, spared=self.spared)


def raised(s: Tensor, image: Tensor, alpha: float) -> Tensor:
    """Scores [B, H, R, n] with those on image [B, n] raised; -inf, where a query does not see, stays."""
    wide = at_least_float32(s)
    seen = image[:, None, None] & wide.isfinite()
    return torch.where(seen, wide + alpha * wide.abs(), wide).to(s.dtype)


def mixed(logits: Tensor, text: Tensor, cfg: Config) -> Tensor:
    """[B, V] guided away from what is said without the image."""
    return contrasted(logits, text, cfg.gamma - 1, cfg.cut)


def measure(
    s: Tensor, image: Tensor, logits: Tensor, text: Tensor, cfg: Config | None = None
) -> tuple[Tensor, Tensor]:
    """exp of raised scores [B, H, R, n], and exp of guided logits [B, V]: zero for -inf."""
    cfg = cfg or Config()
    return raised(s, image, cfg.alpha).exp(), mixed(logits, text, cfg).exp()


def acts(at: Steered, cfg: Config) -> bool:
    return cfg.alpha > 0 and at.stream == "main" and cfg.first <= at.layer < at.layers - cfg.spared


def scores(at: Steered, s: Tensor, cfg: Config) -> Tensor:
    return raised(s, at.role("image"), cfg.alpha)


def streams(cfg: Config) -> tuple[Stream, ...]:
    return () if cfg.gamma == 1 else (Stream(TEXT, hide="image"),)


def guided(at: object, logits: Mapping[str, Tensor], cfg: Config) -> Tensor:
    return logits["main"] if cfg.gamma == 1 else mixed(logits["main"], logits[TEXT], cfg)


def reference(
    s: Tensor, image: Tensor, logits: Tensor, text: Tensor, cfg: Config | None = None
) -> tuple[Tensor, Tensor]:
    """By the definition, number by number; guidance on log-probabilities, brought back to logits."""
    cfg, up, out = cfg or Config(), torch.zeros(s.shape).double(), torch.zeros(logits.shape).double()
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, s.shape)).tolist():
        score = s[b, h, i, j].item()
        size = score if score >= 0 else -score
        up[b, h, i, j] = (
            math.exp(score + cfg.alpha * size) if image[b, j] and size < math.inf else math.exp(score)
        )
    for b, (row, other) in enumerate(zip(logits.double().tolist(), text.double().tolist(), strict=True)):
        total, without = (math.fsum(map(math.exp, r)) for r in (row, other))
        p, q = ([math.exp(x) / z for x in r] for r, z in ((row, total), (other, without)))
        scale = total**cfg.gamma * without ** (1 - cfg.gamma)  # logits are known up to a factor of their exp
        for v, (mine, plain) in enumerate(zip(p, q, strict=True)):
            kept = mine >= cfg.cut * max(p) or (cfg.gamma == 1 and cfg.cut == 0)
            out[b, v] = mine**cfg.gamma * plain ** (1 - cfg.gamma) * scale if kept else 0.0
    return up, out


def cases(seed: int) -> Iterable[tuple]:
    """Hidden keys; no image; float32; one key; zero scores; alpha 0; no guidance and no cut; a cut that leaves one."""
    g = torch.Generator().manual_seed(seed)

    def drawn(B: int, H: int, R: int, n: int, V: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        shapes = (B, H, R, n), (B, V), (B, V)
        s, logits, text = (torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes)
        return [s, torch.rand(B, n, generator=g) < 0.5, 2 * logits, text]

    s, *rest = drawn(2, 2, 3, 5, 6)
    yield s.masked_fill(torch.ones(3, 5).bool().triu(3), -torch.inf), *rest, Config(gamma=2.0)
    s, image, *rest = drawn(1, 2, 1, 4, 5)
    yield s, image & False, *rest
    yield *drawn(2, 2, 1, 5, 6, torch.float32), Config(alpha=0.5)
    s, *rest = drawn(1, 1, 1, 1, 3)
    yield s * 0, *rest, Config(cut=1.0)
    yield *drawn(1, 2, 1, 4, 5), Config(alpha=0.0, gamma=1.0, cut=0.0)


METHOD = SteeringPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    acts=acts,
    scores=scores,
    rows="last",
    streams=streams,
    logits=guided,
    needs_image=True,
    test_settings=({"first": 0, "gamma": 1.5},),
    card=Card(
        title="PAI",
        paper="Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
        year=2024,
        idea="raise the newest token's scores on the image by a share of their size, and guide away from text "
        "alone",
        cost="an addition at one row of the scores; with guidance a second pass without the image",
        needs=("vlm",),
        lineage=("classifier-free guidance",),
        neutral={"alpha": 0.0, "gamma": 1.0},
        caveat="a baseline, without a claim. The stream without image keeps the positions of the text, where the "
        "code's prompt without image closes up. With guidance 1 the code leaves every token, as here; layers "
        "2 and later are the code's, where the paper chooses them for a model. Text never sees the image in "
        "that stream, also not in the layers before",
    ),
)
