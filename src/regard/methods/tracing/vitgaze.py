"""ViTGaze: where a thing in an image points, read from the rows of attention that start on it.

    g_i  = softmax over the places i of the thing of logits_i, 0 elsewhere     (equal logits: its places all alike)
    M_c  = Σ_i g_i A_c[i, :]      a map over places for each head c of each layer that is read
    f    = Σ_i g_i x_i            what the thing's own places say, guided alike

A layer's weights from patch to patch say what interacts with what. Guided by where a person's head stands they become
maps of what that head interacts with, one for each head of the model, and a decoder of a few numbers finds the target
in them: 24 channels in the place of 384 features.

One thing, of two places with equal logits, whose rows are (0.8, 0.2, 0) and (0, 0.2, 0.8):

>>> import torch
>>> rows = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.2, 0.8], [1.0, 0.0, 0.0]])
>>> measure([rows[None, None]], torch.tensor([[True, True, False]])).maps[0, 0]
tensor([0.4000, 0.2000, 0.4000])
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tracing import TracingPage
from regard.ops import at_least_float32


@dataclass(frozen=True)
class Config:
    pass


@dataclass(frozen=True)
class Guided:
    """guide [B, N] weights of the places of the thing; maps [B, layers x heads, N], the first layer's heads first."""

    guide: Tensor
    maps: Tensor


def guidance(inside: Tensor, logits: Tensor | None = None) -> Tensor:
    """g [B, N] from where the thing is, inside [B, N] bool, and logits [B, N] of its places; None: all alike."""
    ok = inside.dtype == torch.bool and inside.dim() == 2 and bool(inside.any(1).all())
    require(ok, "inside [B, N] bool, a place or more in each image", inside=inside)
    logits = torch.zeros_like(inside, dtype=torch.float64) if logits is None else at_least_float32(logits)
    require(logits.shape == inside.shape, "a logit for each place", logits=logits, inside=inside)
    return logits.masked_fill(~inside, -torch.inf).softmax(1)


def measure(weights: Sequence[Tensor], inside: Tensor, logits: Tensor | None = None) -> Guided:
    """Guided rows of the weights [B, H, N, N] of several layers; the number of heads may differ."""
    ok = len(weights) > 0 and all(
        w.dim() == 4 and w.shape[2:] == (inside.shape[1],) * 2 and len(w) == len(inside) for w in weights
    )
    shapes = [tuple(w.shape) for w in weights]
    require(ok, "weights [B, H, N, N] of a layer or more", weights=shapes, inside=inside)
    full = at_least_float32(torch.cat(list(weights), dim=1))
    guide = guidance(inside, logits).to(full.dtype)
    return Guided(guide, (guide[:, None, None] @ full)[:, :, 0])


def guided_features(x: Tensor, guide: Tensor) -> Tensor:
    """f [B, C] of the tokens x [B, N, C]."""
    return (guide[:, None] @ at_least_float32(x).to(guide.dtype))[:, 0]


def reference(weights: Sequence[Tensor], inside: Tensor, logits: Tensor | None = None) -> Guided:
    """Image by image, head by head and place by place."""
    guides, maps = [], []
    for b in range(len(inside)):
        places = [i for i in range(inside.shape[1]) if inside[b, i]]
        share = [1.0 if logits is None else logits[b, i].double().exp().item() for i in places]
        guide = torch.zeros(inside.shape[1], dtype=torch.float64)
        for i, s in zip(places, share, strict=True):
            guide[i] = s / sum(share)
        rows = [
            sum(guide[i] * head[i].double() for i in places)
            for layer in weights
            for head in layer[b].unbind()
        ]
        guides.append(guide)
        maps.append(torch.stack(rows))  # type: ignore[arg-type]
    return Guided(*(torch.stack(t).to(at_least_float32(weights[0])) for t in (guides, maps)))


def cases(seed: int) -> Iterable[tuple]:
    """Things of several places and of one, of the whole image, heads that differ in number, float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(batch: int, n: int, *heads: int) -> list[Tensor]:
        shapes = [(batch, h, n, n) for h in heads]
        return [(2 * torch.randn(shape, generator=g, dtype=torch.float64)).softmax(-1) for shape in shapes]

    def things(batch: int, n: int, share: float) -> Tensor:
        found = torch.rand(batch, n, generator=g) < share
        found[:, n // 2] = True
        return found

    yield drawn(3, 12, 2, 2), things(3, 12, 0.3), torch.randn(3, 12, generator=g, dtype=torch.float64)
    yield drawn(2, 9, 1, 3), things(2, 9, 0.5)
    yield drawn(2, 6, 4), things(2, 6, 0.0), 3 * torch.randn(2, 6, generator=g, dtype=torch.float64)
    yield drawn(1, 5, 2, 1, 2), torch.ones(1, 5, dtype=torch.bool)
    yield [w.float() for w in drawn(2, 7, 2, 2)], things(2, 7, 0.4), torch.randn(2, 7, generator=g)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    card=Card(
        title="ViTGaze: guided rows of attention",
        paper="ViTGaze: Gaze Following with Interaction Features in Vision Transformers, arXiv:2403.12778",
        year=2024,
        idea="rows of attention that start on a head, of several layers, are maps from which its target is decoded",
        cost="O(layers · H · N²) for the rows; a decoder of layers · H channels",
        state="none",
        needs=("vit", "attention weights of the layers that are read"),
        lineage=("softmax",),
        caveat=(
            "the page is what can be used elsewhere: guidance and guided rows, for weights that are handed in. The "
            "released code has a pretrained ViT-S, reads layers 3, 6, 9 and 12 of twelve, learns the logits by a "
            "convolution of the image's patches times how much of a patch the head covers, and trains tower and "
            "decoder, four transposed convolutions, together; that training, the judge of targets outside of the "
            "image and the auxiliary loss are left out. Tokens that are no patches are cut from the weights before, "
            "as there, so that rows need not sum to one"
        ),
    ),
)
