"""What claims on masks of vision-language models share: a toy model, scenes to ask about, its training.

No vision-language model is shipped. The toy is a small decoder from scratch: patches are sums of embedded attributes,
in raster order, words follow, and nothing is pretrained. What it shows is what a mask lets a few layers do.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.claims.lab import generator, seeded
from regard.core.roles import Roles
from regard.nn.attention import Attention
from regard.nn.layers import RMSNorm, SwiGLU
from regard.train.loop import fit, one_cycle

EXAM = 2**20  # the seed of scenes that no training sees


class Scene(NamedTuple):
    """A batch: patches [B, P, A] by attribute, words [B, W], Q questions of W / Q words each, answers [B, Q]."""

    patches: Tensor
    words: Tensor
    answers: Tensor


Draw = Callable[[int, torch.Generator], Scene]


class ToyVLM(nn.Module):
    """Decoder layers over patches and words, under the masks `seen` [layers or 1, 1, P + W, P + W].

    attributes: how many values each attribute of a patch has. score: width of a head's queries and keys.
    """

    def __init__(
        self, attributes: Sequence[int], vocab: int, seen: Tensor, *, seed: int = 0, layers: int = 2,
        score: int = 16, rope_theta: float = 1e4,
    ) -> None:  # fmt: skip
        super().__init__()
        width, heads = 64, 4
        self.seen = seen.expand(layers, -1, -1, -1)
        with seeded(seed):
            self.attributes = nn.ModuleList(nn.Embedding(size, width) for size in attributes)
            self.words, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)
            self.norms = nn.ModuleList(RMSNorm(width) for _ in range(2 * layers + 1))
            self.mixers = nn.ModuleList(
                Attention(
                    width, heads, "softmax", "self", head_dim=score, v_head_dim=16, rope_theta=rope_theta
                )
                for _ in range(layers)
            )
            self.mlps = nn.ModuleList(SwiGLU(width, 2 * width) for _ in range(layers))

    def states(self, scene: Scene, seen: Tensor | None = None) -> Tensor:
        """[layers, B, P + W, C] after each layer."""
        looks = sum(embed(scene.patches[..., i]) for i, embed in enumerate(self.attributes))
        x, after = torch.cat([looks, self.words(scene.words)], dim=1), []
        norms, masks = (
            iter(self.norms),
            self.seen if seen is None else seen.expand(len(self.mixers), -1, -1, -1),
        )
        for mix, mlp, mask in zip(self.mixers, self.mlps, masks, strict=True):
            x = x + mix(next(norms)(x), mask=mask[None])[0]
            x = x + mlp(next(norms)(x))
            after.append(x)
        return torch.stack(after)

    def forward(self, scene: Scene) -> Tensor:
        """Logits [B, Q, vocab] at the last word of each question."""
        words = scene.words.shape[1]
        each = words // scene.answers.shape[1]
        return self.head(self.norms[-1](self.states(scene)[-1, :, -words:][:, each - 1 :: each]))


def learn(
    model: ToyVLM, draw: Draw, steps: int, seed: int, rate: float = 3e-3, batch: int = 64
) -> ToyVLM:  # fmt: skip
    """The model after a step of AdamW on each of `steps` fresh batches, the rate up in a tenth of them, then down."""
    g, optimizer = generator(seed), torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)

    def loss_at(step: int) -> Tensor:
        scene = draw(batch, g)
        return F.cross_entropy(model(scene).flatten(0, 1), scene.answers.flatten())

    fit(optimizer, loss_at, steps, schedule=one_cycle())
    return model


@torch.no_grad()
def accuracy(model: ToyVLM, draw: Draw, samples: int = 4096) -> float:
    """Percent of right answers on new scenes, the same for every model."""
    scene = draw(samples, generator(EXAM))
    right = [
        model(part).argmax(-1) == part.answers for part in map(Scene, *(field.split(512) for field in scene))
    ]
    return 100 * torch.cat(right).float().mean().item()


def one_turn(height: int, width: int, question: int, after: int = 0) -> Roles:
    """The roles of an image in raster order, the question about it, and `after` words of no question."""
    patch, words = torch.arange(height * width), question + after
    asked = F.pad(torch.ones(len(patch) + question).long(), (0, after), value=-1)
    return Roles(
        image=F.pad(torch.ones_like(patch), (0, words)),
        y=F.pad(patch // width, (0, words), value=-1),
        x=F.pad(patch % width, (0, words), value=-1),
        question=asked,
    )


# scenes


def lookup(kinds: int, patches: int, values: int) -> Draw:
    """What is the value of the patch of this colour and this shape? All patches differ in the two."""

    def draw(batch: int, g: torch.Generator) -> Scene:
        pairs = torch.rand(batch, kinds**2, generator=g).argsort(1)[:, :patches]
        value = torch.randint(0, values, pairs.shape, generator=g)
        asked = torch.randint(0, patches, (batch, 1), generator=g)
        colour, shape = pairs // kinds, pairs % kinds
        words = torch.cat([colour.gather(1, asked), kinds + shape.gather(1, asked)], dim=1)
        return Scene(torch.stack([colour, shape, value], dim=-1), words, value.gather(1, asked))

    return draw


def neighbour(side: int, values: int, questions: int) -> Draw:
    """What is the value of the patch left of this letter? A patch shows its letter, the one to its left, and a value.

    Values go on along a row half of the time, so that a patch's own is a better answer than none.
    """

    def draw(batch: int, g: torch.Generator) -> Scene:
        letter = torch.rand(batch, side * side, generator=g).argsort(1)
        border = letter.roll(1, 1)
        border[:, ::side] = side * side  # nothing
        value = torch.randint(0, values, (batch, side, side), generator=g)
        for x in range(1, side):
            same = torch.rand(batch, side, generator=g) < 0.5
            value[:, :, x] = torch.where(same, value[:, :, x - 1], value[:, :, x])
        value = value.flatten(1)
        at = torch.rand(batch, side * (side - 1), generator=g).argsort(1)[:, :questions]
        at = at // (side - 1) * side + at % (side - 1) + 1  # not in the first column
        patches = torch.stack([letter, border, value], dim=-1)
        return Scene(patches, letter.gather(1, at), value.gather(1, at - 1))

    return draw
