"""VISTA: what the image added to the last token's residual is added again, and earlier layers have a say in the logits.

    v_l = h_l - h'_l                          the prompt's last token after layer l, with and without the image
    h̃ = h_l + λ v_l,  h̃ ← h̃ · |h_l| / |h̃|      at every token that is about to speak, after every layer
    o ← (1 - γ) o + γ mean_{L-w <= l < L} H(h_l)      H: what the model makes of its last layer's output

v comes from two runs of the prompt without steering, one pair for each image.

>>> import torch
>>> x = torch.tensor([[[3.0, 4.0]]])  # length 5
>>> steered(x, torch.tensor([[4.0, 0.0]]), 0.25)  # (4, 4), as long as (3, 4)
tensor([[[3.5355, 3.5355]]])
>>> early = torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]])  # two layers, mean (0, 1)
>>> augmented(torch.tensor([[2.0, 0.0]]), early, 0.3)  # 0.7 (2, 0) + 0.3 (0, 1)
tensor([[1.4000, 0.3000]])
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops import at_least_float32
from regard.ops.steered import Steered, Stream


@dataclass(frozen=True)
class Config:
    strength: float = 0.17  # λ; MiniGPT-4 0.1, Shikra 0.12
    mix: float = 0.3  # γ
    window: int = 5  # w layers before the last; all of them, where a model has fewer
    prompt: bool = False  # whether tokens of the prompt before its last one are steered as well
    normed: bool = True  # whether earlier layers' outputs pass the last norm before the head
    hides: str = "image"  # the role that is taken away

    def __post_init__(self) -> None:
        require(self.strength >= 0, "strength >= 0", strength=self.strength)
        require(0 <= self.mix <= 1, "0 <= mix <= 1", mix=self.mix)
        require(self.window >= 1, "window >= 1", window=self.window)
        require(self.hides, "a role to hide", hides=self.hides)


def steered(x: Tensor, direction: Tensor, strength: float) -> Tensor:
    """x [B, N, d] moved along its text's direction [B, d], every token as long as it was."""
    if not strength:
        return x
    h, v = at_least_float32(x), at_least_float32(direction)
    moved = h + strength * v[:, None]
    long = moved.norm(dim=-1, keepdim=True)
    # a sum of exactly zero has no direction and stays zero
    return (moved * (h.norm(dim=-1, keepdim=True) / long.where(long > 0, 1))).to(x.dtype)


def augmented(logits: Tensor, early: Tensor, mix: float) -> Tensor:
    """logits [B, V] mixed with the mean of those of earlier layers [w, B, V]; as they are, where there is none."""
    return (1 - mix) * logits + mix * early.mean(0) if mix and len(early) else logits


def measure(
    x: Tensor, image: Tensor, without: Tensor, logits: Tensor, early: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """States x [B, N, d] steered by those at the last token, image and without [B, d]; logits [B, V] augmented."""
    return steered(x, image - without, cfg.strength), augmented(logits, early, cfg.mix)


def streams(cfg: Config) -> tuple[Stream, ...]:
    record: dict[str, Any] = dict(records=("resid_post",), once=True)
    return Stream("image", **record), Stream("without", hide=cfg.hides, **record)


def prepare(runs: Any, at: Steered, cfg: Config) -> Tensor:
    """[B, layers, d] v of each layer."""
    image, without = (at_least_float32(runs[name]["resid_post"]) for name in ("image", "without"))
    return (image - without).transpose(0, 1)


def steer(at: Steered, x: Tensor, cfg: Config) -> Tensor:
    changed = steered(x, at.memory[:, at.layer].to(x.device), cfg.strength)
    if cfg.prompt or at.phase == "decode":
        return changed
    number = torch.arange(x.shape[1], device=x.device)[None] if at.rows is None else at.rows
    return torch.where((number == number.amax(-1, keepdim=True))[..., None], changed, x)


def augment(at: Steered, logits: Mapping[str, Tensor], cfg: Config) -> Tensor:
    main = logits["main"]
    layers = range(max(0, at.layers - 1 - cfg.window), at.layers - 1)
    if not cfg.mix or not layers:
        return main
    return augmented(main, torch.stack([at.early(n, normed=cfg.normed) for n in layers]).to(main), cfg.mix)


def reference(
    x: Tensor, image: Tensor, without: Tensor, logits: Tensor, early: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """By the definition: token by token and number by number."""
    states, given = x.tolist(), early.tolist()
    for text, a, b in zip(states, image.tolist(), without.tolist(), strict=True):
        for n, h in enumerate(text):
            moved = [p + cfg.strength * (q - r) for p, q, r in zip(h, a, b, strict=True)]
            size = math.hypot(*moved)
            text[n] = [m * math.hypot(*h) / size if size else 0.0 for m in moved]
    mixed = logits.tolist()
    for b, row in enumerate(mixed if given else ()):
        for i, last in enumerate(row):
            mean = math.fsum(layer[b][i] for layer in given) / len(given)
            row[i] = last + cfg.mix * (mean - last)
    return torch.tensor(states, dtype=torch.float64), torch.tensor(mixed, dtype=torch.float64)


def cases(seed: int) -> Iterable[tuple]:
    """One token and many, float32, λ = 0, γ = 0 and 1, no earlier layer, v that takes a state to zero, v = 0."""
    g = torch.Generator().manual_seed(seed)

    def drawn(
        batch: int, tokens: int, width: int, layers: int, dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        shapes = (batch, tokens, width), (batch, width), (batch, width), (batch, 7), (layers, batch, 7)
        return [torch.randn(*s, generator=g, dtype=dtype) for s in shapes]

    yield *drawn(3, 5, 4, 5), Config()
    yield *drawn(2, 3, 6, 2, torch.float32), Config(strength=1.5)
    yield *drawn(1, 1, 1, 0), Config(mix=1.0)
    yield *drawn(2, 2, 3, 3), Config(strength=0.0, mix=0.0)
    yield *drawn(2, 2, 3, 1), Config(strength=3.0, mix=1.0)
    x, image, without, logits, early = drawn(2, 3, 4, 2)
    image[0] = without[0]
    x[1, 2] = -0.5 * (image[1] - without[1])
    yield x, image, without, logits, early, Config(strength=0.5)


METHOD = SteeringPage(
    config=Config,
    layer_edits={"resid_post": steer},
    streams=streams,
    prepare=prepare,
    logits=augment,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="VISTA",
        paper="The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual "
        "Information Steering",
        year=2025,
        idea="the residual is turned towards what the image added to it; logits of late layers are averaged in",
        cost="two passes of the prompt; of each token the head once more for each layer of the window",
        needs=("decoder-lm", "an image, or a span with a role"),
        lineage=("activation steering", "logit lens"),
        neutral={"strength": 0.0, "mix": 0.0},
        caveat="the released code differs: it turns what each MLP adds, not the residual; adds λ (1 + max(0, cos(x, "
        "-v))) v/|v| to x/|x|; at every token of the prompt (prompt=True); averages six layers of 32, 25 to 30, "
        "without the last norm (normed=False), although the paper's H gives the logits of the last residual too; and "
        "its PCA of a single difference adds a unit vector that says nothing. Its POPE script takes λ 0.01. The paper "
        "drops the image's tokens from the second run; here they are hidden, and the others keep their positions",
    ),
)
