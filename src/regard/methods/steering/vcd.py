"""VCD, visual contrastive decoding: decoding away from what the model says of the same picture under noise.

    ℓ' = (1 + α) ℓ(picture) - α ℓ(noised)        only tokens with ℓ >= max ℓ + log β stay
    noised = √ā_T picture + √(1 - ā_T) ε         ε normal; ā_t = Π_{s <= t} (1 - b_s)
    b_s = 10⁻⁵ + (5·10⁻³ - 10⁻⁵) σ(x_s)          x_s: 1000 numbers from -6 to 6, s from 0

Under noise a model sees less, and what it still says it says by its priors.

>>> round(kept_share(0), 6)  # b_0 = 10⁻⁵ + 4.99·10⁻³ σ(-6) = 10⁻⁵ + 4.99·10⁻³ · 0.0024726
0.999978
>>> import torch
>>> picture = torch.ones(1, 1, 1, 1)
>>> round(noised(picture, 0 * picture, 999).item(), 3)  # exp(-½ Σ (b_s + b_s² / 2)) = exp(-1.2525 - 0.0026)
0.285
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Stream, contrasted, plainly_contrasted

STEPS, LEAST, MOST, EDGE = 1000, 1e-5, 5e-3, 6.0
NOISED = "noised"


@dataclass(frozen=True)
class Config:
    strength: float = 1.0  # α
    cut: float = 0.1  # β; 0 keeps every token
    noise: int = 500  # T, of 1000 steps
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        require(self.strength >= 0, "strength >= 0", strength=self.strength)
        require(0 <= self.cut <= 1, "0 <= cut <= 1", cut=self.cut)
        require(0 <= self.noise < STEPS, f"0 <= noise < {STEPS}", noise=self.noise)


@cache
def kept_share(step: int) -> float:
    """ā of a step: the share of the picture's variance that is left."""
    x = torch.linspace(-EDGE, EDGE, STEPS, dtype=torch.float64)
    return float((1 - (LEAST + (MOST - LEAST) * x.sigmoid())).cumprod(0)[step])


def noised(pixels: Tensor, noise: Tensor, step: int) -> Tensor:
    """Pictures after so many steps of diffusion, from noise of the same shape."""
    kept, wide = kept_share(step), at_least_float32(pixels)
    return (math.sqrt(kept) * wide + math.sqrt(1 - kept) * noise.to(wide)).to(pixels.dtype)


def own_noise(pixels: Tensor, seed: int) -> Tensor:
    """Normal noise, drawn for each picture (of patches in one list, for each) from its content, whatever the batch."""
    size = pixels.shape[-3:].numel() if pixels.dim() > 3 else pixels.shape[-1]
    rows = pixels.detach().cpu().float().contiguous().view(-1, size)
    contents = rows.view(torch.int32).long().sum(-1).tolist()
    made = [torch.randn(size, generator=torch.Generator().manual_seed(seed + x)) for x in contents]
    return torch.stack(made).view(pixels.shape).to(pixels.device)


def streams(cfg: Config) -> tuple[Stream, ...]:
    def pixels(given: Tensor, generator: torch.Generator) -> Tensor:
        return noised(given, own_noise(given, generator.initial_seed()), cfg.noise)

    return (Stream(NOISED, pixels=pixels),) if cfg.strength else ()


def logits(at: Any, logits: Mapping[str, Tensor], cfg: Config) -> Tensor:
    return contrasted(logits["main"], logits.get(NOISED, logits["main"]), cfg.strength, cfg.cut)


def measure(pixels: Tensor, noise: Tensor, said: Tensor, said_noised: Tensor, cfg: Config) -> dict:
    """The noised picture, and the probabilities of the next token from what both passes say [B, V]."""
    given = {"main": said, NOISED: said_noised}
    return {
        "noised": noised(pixels, noise, cfg.noise),
        "next": logits(None, given, cfg).softmax(-1),
    }


def reference(pixels: Tensor, noise: Tensor, said: Tensor, said_noised: Tensor, cfg: Config) -> dict:
    """Step by step of the diffusion, the variance that it adds with it; token by token of what is said."""
    picture = variance = 1.0
    for s in range(cfg.noise + 1):
        b = 1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * s / 999))
        picture, variance = picture * math.sqrt(1 - b), variance * (1 - b) + b * (s > 0)
        variance = b if s == 0 else variance
    flat = [
        picture * x + math.sqrt(variance) * e
        for x, e in zip(pixels.flatten().tolist(), noise.flatten().tolist())
    ]
    rows = [
        plainly_contrasted(row, [other], cfg.strength, cfg.cut)
        for row, other in zip(said.tolist(), said_noised.tolist())
    ]
    wide = torch.float64
    return {
        "noised": torch.tensor(flat, dtype=wide).view(pixels.shape),
        "next": torch.tensor(rows, dtype=wide),
    }


def cases(seed: int) -> Iterable[tuple]:
    """Defaults; the first and the last step; float32; no cut; no strength; equal logits at the cut."""
    g = torch.Generator().manual_seed(seed)

    def drawn(batch: int, side: int, words: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        shapes = [(batch, 3, side, side)] * 2 + [(batch, words)] * 2
        return [2 * torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]

    yield *drawn(2, 3, 9), Config()
    yield *drawn(1, 1, 1), Config(noise=0)
    yield *drawn(2, 2, 5, torch.float32), Config(noise=999, strength=0.5)
    yield *drawn(3, 2, 5), Config(cut=0.0, strength=2.0)
    yield *drawn(2, 2, 5), Config(strength=0.0, noise=700)
    pixels, noise, said, other = drawn(2, 2, 6)
    yield pixels, noise, said.round(), other, Config(cut=1.0)


METHOD = SteeringPage(
    config=Config,
    streams=streams,
    logits=logits,
    measure=measure,
    reference=reference,
    cases=cases,
    needs_image=True,
    test_settings=({"noise": 999, "strength": 0.5},),
    card=Card(
        title="VCD",
        paper="Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding",
        year=2024,
        idea="decode away from what the model says of the same picture under diffusion noise",
        cost="a second pass at every step, with its own cache",
        needs=("decoder-lm", "an image"),
        lineage=("contrastive decoding",),
        neutral={"strength": 0.0, "cut": 0.0},
        caveat="noise is drawn once for a prompt, from a picture's content, on the processor's values. α = 1, β = 0.1 "
        "and T = 500 are those of the released scripts; its sampling falls back to α = 0.5 where none is given. "
        "Released code counts steps from 0, so that T = 500 has had 501 of them; so does this page",
    ),
)
