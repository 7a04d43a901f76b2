"""What claims about visual tokens share: a small decoder that reads handwritten digits among distractors.

A picture is a grid of 4 x 4 cells of 8 x 8 pixels. Some hold a digit of scikit-learn's, the others the pixels of one in
another order. A cell is a visual token: an MLP of its pixels, and where it lies. Words follow; the last is answered.
The MLP learns first, under a head that is thrown away, to tell what a cell shows, as a tower is pretrained.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.digits import digits
from regard.claims.lab import generator, seeded
from regard.train.loop import fit, one_cycle

SIDE, CELLS, DIGITS, NOTHING, BATCH = 4, 16, 6, 10, 32
# score edits: (layer, s [B, H, N, N]) -> s; exits: (layer, states [B, N, w], seen [B, N] bool) -> seen
Edit = Callable[[int, Tensor], Tensor]
Exit = Callable[[int, Tensor, Tensor], Tensor]


class Scene(NamedTuple):
    """Cells [B, P, pixels], words [B, W], answers [B]."""

    cells: Tensor
    words: Tensor
    answers: Tensor


class Reader(nn.Module):
    """Decoder layers over visual tokens and words."""

    def __init__(
        self, pixels: int, places: int, words: int, vocab: int, answers: int, layers: int, seed: int
    ) -> None:
        super().__init__()
        width, self.heads, self.layers, self.places = 64, 4, layers, places
        with seeded(seed):
            self.look = nn.Sequential(nn.Linear(pixels, 128), nn.GELU(), nn.Linear(128, width))
            self.word, self.place = nn.Embedding(vocab, width), nn.Embedding(places + words, width)
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
            self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
            self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
            self.mlp = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width)) for _ in range(layers)
            )
            self.head = nn.Linear(width, answers)

    def forward(
        self, tokens: Tensor, words: Tensor, *, places: Tensor | None = None, seen: Tensor | None = None,
        edit: Edit | None = None, leave: Exit | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, answers] of tokens [B, P, w] at `places` [B, P], `seen` [B, P] or padding, and words [B, W]."""
        (B, P, _), W = tokens.shape, words.shape[1]
        places = torch.arange(P).expand(B, P) if places is None else places
        x = torch.cat([tokens + self.place(places), self.word(words) + self.place.weight[-W:]], dim=1)
        shown = F.pad(torch.ones(B, P, dtype=torch.bool) if seen is None else seen, (0, W), value=True)
        unseen = torch.ones(P + W, P + W, dtype=torch.bool).triu(1)
        for layer in range(self.layers):
            q, k, v = (
                self.qkv[layer](self.norms[2 * layer](x))
                .unflatten(-1, (3, self.heads, -1))
                .permute(2, 0, 3, 1, 4)
            )
            s = q @ k.mT / q.shape[-1] ** 0.5
            # a hidden token still sees itself, so that its row is no empty one
            hidden = unseen | (~shown[:, None, None] & ~torch.eye(P + W, dtype=torch.bool))
            s = s.masked_fill(hidden, -torch.inf)
            s = s if edit is None else edit(layer, s)
            x = x + self.out[layer]((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + self.mlp[layer](self.norms[2 * layer + 1](x))
            shown = shown if leave is None else leave(layer, x, shown)
        return self.head(self.norms[-1](x[:, -1]))


def learned(model: Reader, loss_at: Callable[[torch.Generator], Tensor], steps: int, seed: int) -> Reader:
    """The model after steps of AdamW, each on a fresh batch drawn from the generator."""
    g, optimizer = generator(seed), torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    fit(optimizer, lambda step: loss_at(g), steps, schedule=one_cycle())
    return model.requires_grad_(False).eval()


def sighted(
    model: Reader, draw: Callable[[torch.Generator], Sequence[Tensor]], sizes: Sequence[int], seed: int
) -> Reader:
    """The model when its MLP has learned to tell labels of drawn cells: (pixels [n, p], labels [n], ...) of `sizes`."""
    g = generator(3000 + seed)
    with seeded(seed):
        head = nn.Linear(model.head.in_features, sum(sizes))

    def loss_at(step: int) -> Tensor:
        pixels, *labels = draw(g)
        logits = head(model.look(pixels)).split(list(sizes), dim=-1)
        return sum(F.cross_entropy(*pair) for pair in zip(logits, labels, strict=True))  # type: ignore[return-value]

    fit(
        torch.optim.AdamW([*model.look.parameters(), *head.parameters()], 3e-3),
        loss_at,
        300,
        schedule=one_cycle(),
    )
    return model


def single(g: torch.Generator, count: int = 256) -> tuple[Tensor, Tensor]:
    """Pixels [count, 64] of digits and, every other time, of distractors; which digit, NOTHING of a distractor."""
    pixels, labels = cells("train", (count,), g)
    digit = torch.rand(count, generator=g) < 0.5
    return pixels.where(digit[:, None], disordered(pixels, g)), labels.where(digit, NOTHING)


def cells(part: str, shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels [*shape, 64] of drawn digits of a part, and which they are."""
    data = digits()[part]
    rows = torch.randint(0, len(data.labels), shape, generator=g)
    return data.images.flatten(1)[rows], data.labels[rows]


def disordered(pixels: Tensor, g: torch.Generator) -> Tensor:
    """Each cell's pixels in an order of their own."""
    return pixels.gather(-1, torch.rand(pixels.shape, generator=g).argsort(-1))


def asked_by_place(part: str, count: int, g: torch.Generator, text: float = 0.0) -> Scene:
    """Row, column, and what is asked: the digit there, or (a share `text` of the questions) the row just named."""
    pixels, labels = cells(part, (count, CELLS), g)
    order = torch.rand(count, CELLS, generator=g).argsort(1)
    digit = order < DIGITS
    pixels = pixels.where(digit[..., None], disordered(pixels, g))
    place = order.argmin(1)
    row, named = place // SIDE, torch.rand(count, generator=g) < text
    words = torch.stack([row, SIDE + place % SIDE, 2 * SIDE + named.long()], dim=1)
    return Scene(pixels, words, row.where(named, labels.gather(1, place[:, None])[:, 0]))


def reader_of_places(seed: int, layers: int, steps: int, text: float = 0.0) -> Reader:
    """A reader that learned such questions."""

    def loss_at(g: torch.Generator) -> Tensor:
        scene = asked_by_place("train", BATCH, g, text)
        return F.cross_entropy(model(model.look(scene.cells), scene.words), scene.answers)

    model = sighted(Reader(64, CELLS, 3, 2 * SIDE + 2, 10, layers, seed), single, [NOTHING + 1], seed)
    return learned(model, loss_at, steps, seed)
