"""A small diffusion transformer over patches with words in cross-attention, for claims on steering what it draws.

    x_t = (1 - t) x + t ε        the model learns from x_t, t and the words the part of x that the words name, x̂;
    x_s = x_t + (s - t) (x_t - x̂) / t                      a step of the sampler, from t to s < t

Scenes are handwritten digits of scikit-learn among clutter, scraps of other digits, on a canvas of 16 x 16 pixels, 8 x
8 patches of 2 x 2; a digit fills a quarter. A caption names one digit or both, with stop words in between; in
cross-attention each patch shares one softmax among the words. Patches are embedded by two convolutions; self-attention
knows places by rotary positions alone.

Every attention goes through a choke point, `edit(layer, kind, scores, weights)` with kind "self" or "cross": it is
given the scores before the softmax (weights None), then the weights after it (scores None), and answers alike.
`steering` makes one of a steering page; `Record` is one that changes nothing and keeps what passes.
"""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.digits import digits
from regard.claims.lab import generator, seeded, threads
from regard.nn.layers import RMSNorm, SwiGLU
from regard.ops.rotary import rotate
from regard.ops.steered import Steered
from regard.train.loop import fit, one_cycle

SIDE, PATCH, DIGIT, SCRAP = 16, 2, 8, 4  # pixels: of the canvas, a patch, a digit, a scrap of clutter
GRID = (SIDE // PATCH, SIDE // PATCH)
PATCHES = GRID[0] * GRID[1]
STOP = tuple(range(10, 18))  # words that name nothing; words 0 .. 9 are the digits
PAD, WORDS = 18, 7  # the word that is none; how many words a caption has room for
LAYERS, WIDTH, HEADS = 2, 48, 3
STEPS, BATCH, RATE = 800, 32, 5e-3

Edit = Callable[[int, str, Tensor | None, Tensor | None], Tensor]


class Scenes(NamedTuple):
    """images [B, SIDE, SIDE] in [0, 1]; named: of these the digits that the caption names, without clutter; digits
    [B, 2] their classes; corners [B, 2, 2] in pixels, row first; ink [B, 2, P] bool: the patches that show each; words
    [B, WORDS] a caption, padded with PAD."""

    images: Tensor
    named: Tensor
    digits: Tensor
    corners: Tensor
    ink: Tensor
    words: Tensor


# scenes


def quarters(count: int, g: torch.Generator) -> Tensor:
    """[B, 2, 2] corners of two digits in different quarters of the canvas."""
    chosen = torch.rand(count, 4, generator=g).argsort(1)[:, :2]
    return torch.stack([chosen // 2, chosen % 2], dim=-1) * (SIDE // 2)


def pasted(canvas: Tensor, pieces: Tensor, corners: Tensor) -> Tensor:
    """canvas [B, SIDE, SIDE] with pieces [B, n, h, w] at corners [B, n, 2]; the brighter of two pixels counts."""
    height, width = pieces.shape[-2:]
    y = corners[..., 0, None, None] + torch.arange(height)[:, None]
    at = y * SIDE + corners[..., 1, None, None] + torch.arange(width)
    flat = canvas.flatten(1).scatter_reduce(1, at.flatten(1), pieces.flatten(1), "amax")
    return flat.view_as(canvas)


def patches_of(images: Tensor) -> Tensor:
    """[B, SIDE, SIDE] -> [B, P, PATCH²], in raster order."""
    parts = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return parts.reshape(len(images), PATCHES, PATCH * PATCH)


def images_of(patches: Tensor) -> Tensor:
    parts = patches.view(len(patches), *GRID, PATCH, PATCH)
    return parts.transpose(2, 3).reshape(len(patches), SIDE, SIDE)


def captions(named: Tensor, stops: Tensor, g: torch.Generator) -> Tensor:
    """[B, WORDS]: the words of `named` [B, n], `stops` [B] stop words of any kind, all shuffled, then PAD."""
    count = len(named)
    fill = torch.randint(STOP[0], STOP[-1] + 1, (count, WORDS - named.shape[1]), generator=g)
    fill = fill.where(torch.arange(fill.shape[1]) < stops[:, None], PAD)
    words = torch.cat([named, fill], dim=1)
    order = torch.rand(words.shape, generator=g) + (words == PAD)
    return words.gather(1, order.argsort(1))


def scenes(
    count: int, g: torch.Generator, part: str = "train", scraps: int = 4, stops: tuple[int, int] = (0, 4),
    both: float = 0.5,
) -> Scenes:  # fmt: skip
    """Two digits of different classes among scraps, and a caption with `stops` stop words, from and to.

    `both`: the share of captions that name both digits; the others name the first.
    """
    images, labels = digits()[part]
    first = torch.randint(len(images), (count,), generator=g)
    second = torch.randint(len(images), (count, 16), generator=g)
    other = (labels[second] != labels[first, None]).int().argmax(1)
    chosen = torch.stack([first, second.gather(1, other[:, None])[:, 0]], dim=1)  # [B, 2]
    corners = quarters(count, g)
    blank = torch.zeros(count, SIDE, SIDE)
    apart = [pasted(blank, images[chosen[:, i], 0][:, None], corners[:, i : i + 1]) for i in range(2)]
    ink = torch.stack([patches_of(image).mean(-1) > 0.1 for image in apart], dim=1)
    cut = torch.randint(0, DIGIT - SCRAP + 1, (2,), generator=g).tolist()
    pieces = images[torch.randint(len(images), (count, scraps), generator=g), 0]
    pieces = pieces[..., cut[0] : cut[0] + SCRAP, cut[1] : cut[1] + SCRAP]
    places = torch.randint(0, SIDE - SCRAP + 1, (count, scraps, 2), generator=g)
    canvas = pasted(torch.maximum(*apart), pieces, places)
    extra = torch.randint(stops[0], stops[1] + 1, (count,), generator=g)
    two = torch.rand(count, generator=g) < both
    named = torch.stack([labels[chosen[:, 0]], labels[chosen[:, 1]].where(two, PAD)], dim=1)
    shown = torch.where(two[:, None, None], torch.maximum(*apart), apart[0])
    return Scenes(canvas, shown, labels[chosen], corners, ink, captions(named, extra, g))


# the model


def places() -> Tensor:
    """[P, 2] row and column of each patch."""
    y, x = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], dim=-1)


class Mixer(nn.Module):
    """Attention of patches on patches, with rotary positions in the plane, or on words."""

    def __init__(self, layer: int, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = layer, kind
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [B, H, N, D]

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without positions."""
        return self.heads(self.q(x)), self.heads(self.k(memory)), self.heads(self.v(memory))

    @staticmethod
    def placed(x: Tensor, at: Tensor) -> Tensor:
        """x [B, H, N, D] turned by its places [N, 2]: one half of the channels by rows, one by columns."""
        halves = zip(x.chunk(2, dim=-1), at.T, strict=True)
        return torch.cat([rotate(half, along[None], 100.0) for half, along in halves], dim=-1)

    def forward(
        self, x: Tensor, memory: Tensor, hidden: Tensor | None = None, edit: Edit | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x, memory)
        if self.kind == "self":
            q, k = self.placed(q, places()), self.placed(k, places())
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        scores = scores if edit is None else edit(self.layer, self.kind, scores, None)
        weights = scores.softmax(-1)
        weights = weights if edit is None else edit(self.layer, self.kind, None, weights)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class ToyDiffusion(nn.Module):
    """x̂ [B, P, PATCH²] of noisy patches [B, P, PATCH²] at times [B], given words [B, W]; PAD is not seen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.stem = nn.Sequential(
                nn.Conv2d(1, 24, 5, padding=2), nn.SiLU(), nn.Conv2d(24, WIDTH, 6, stride=PATCH, padding=2)
            )
            self.head = nn.Linear(WIDTH, PATCH * PATCH)
            self.words = nn.Embedding(PAD + 1, WIDTH)
            self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            self.looks, self.reads = (
                nn.ModuleList(Mixer(i, kind) for i in range(LAYERS)) for kind in ("self", "cross")
            )
            self.mlps = nn.ModuleList(SwiGLU(WIDTH, 2 * WIDTH) for _ in range(LAYERS))
            self.norms = nn.ModuleList(RMSNorm(WIDTH) for _ in range(3 * LAYERS + 1))

    def embedded(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * 2.0 ** torch.arange(8)
        patches = self.stem(images_of(x)[:, None]).flatten(2).mT  # [B, P, WIDTH]
        return patches + self.time(torch.cat([angle.sin(), angle.cos()], dim=-1))[:, None]

    def layer(self, i: int, x: Tensor, words: Tensor, edit: Edit | None = None) -> Tensor:
        look, read, mix = self.norms[3 * i : 3 * i + 3]
        h = look(x)
        x = x + self.looks[i](h, h, edit=edit)
        x = x + self.reads[i](read(x), self.words(words), words == PAD, edit)
        return x + self.mlps[i](mix(x))

    def forward(self, x: Tensor, t: Tensor, words: Tensor, edit: Edit | None = None) -> Tensor:
        x = self.embedded(x, t)
        for i in range(LAYERS):
            x = self.layer(i, x, words, edit)
        return self.head(self.norms[-1](x))


def noised(patches: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t; t one number, or one for each scene."""
    t = t[:, None, None] if isinstance(t, Tensor) else t
    return (1 - t) * patches + t * noise


@cache
def trained(seed: int, steps: int = STEPS) -> ToyDiffusion:
    """A model after a step of AdamW on each of so many fresh batches; its parameters ask for no gradients."""
    model, g = ToyDiffusion(seed), generator(1000 + seed)

    def loss_at(step: int) -> Tensor:
        scene = scenes(BATCH, g)
        x, named = (2 * patches_of(images) - 1 for images in scene[:2])
        # in a quarter of the scenes there is nothing but what is named, as when the sampler draws
        x[: BATCH // 4] = named[: BATCH // 4]
        noise, t = torch.randn(x.shape, generator=g), torch.rand(BATCH, generator=g)
        return F.mse_loss(model(noised(x, noise, t), t, scene.words), named)

    with threads(1), torch.enable_grad():
        fit(
            torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01),
            loss_at,
            steps,
            schedule=one_cycle(),
        )
    return model.requires_grad_(False).eval()


@torch.no_grad()
def sample(
    model: ToyDiffusion, words: Tensor, noise: Tensor, steps: int = 20, edit: Edit | None = None,
    after: Callable[[int, float, Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Patches [B, P, PATCH²] from noise, in equal steps; `after(step, t, x)` may change what a step made, now at t."""
    x, times = noise, torch.linspace(1, 0, steps + 1).tolist()
    for step, (t, s) in enumerate(pairwise(times)):
        x = x + (s - t) / t * (x - model(x, torch.full((len(x),), t), words, edit))
        x = x if after is None else after(step, s, x)
    return x


# edits


class Record:
    """An edit that keeps the scores and the weights of every call, by (layer, kind)."""

    def __init__(self) -> None:
        self.scores: dict[tuple[int, str], Tensor] = {}
        self.weights: dict[tuple[int, str], Tensor] = {}

    def __call__(self, layer: int, kind: str, scores: Tensor | None, weights: Tensor | None) -> Tensor:
        kept, given = (self.scores, scores) if weights is None else (self.weights, weights)
        assert given is not None
        kept[layer, kind] = given
        return given


def steering(
    page: Any, cfg: Any, patch_roles: Mapping[str, Tensor], word_roles: Mapping[str, Tensor],
    memory: Callable[[], Any] | Any = None,
) -> Edit:  # fmt: skip
    """The edit that a steering page makes of scores and weights.

    Roles of patches [B, P] and of words [B, W], by name; all patches have the role "image", no word has, and of a role
    that is not given nothing is. A function `memory` is asked at every call: what it gives may change with the steps.
    """

    def roles(given: Mapping[str, Tensor], count: int, batch: int, image: bool) -> Callable[[str], Tensor]:
        every = {"image": torch.full((batch, count), image), **given}
        return lambda name: every.get(name, torch.zeros(batch, count, dtype=torch.bool)).expand(batch, -1)

    def edit(layer: int, kind: str, scores: Tensor | None, weights: Tensor | None) -> Tensor:
        given = weights if scores is None else scores
        assert given is not None
        batch, _, rows, keys = given.shape
        at = Steered(
            layer=layer, layers=LAYERS, phase="prefill", rows=torch.arange(rows).expand(batch, -1),
            role=roles(patch_roles if kind == "self" else word_roles, keys, batch, kind == "self"),
            row_role=roles(patch_roles, rows, batch, True), grid=GRID, memory=memory() if callable(memory) else memory,
        )  # fmt: skip
        change = page.weights if scores is None else page.scores
        return given if change is None or not page.acts(at, cfg) else change(at, given, cfg)

    return edit
