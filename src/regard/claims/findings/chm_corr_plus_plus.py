"""Editing where a classifier looks: what simulated users gain who change the patches that a vote of neighbours uses.

    image       a digit of 8 x 8 somewhere on a canvas of 16 x 16, and 4 pieces of other digits, of 4 x 4, around it
    features    the first two steps of a small CNN that learned clean digits: 8 x 8 patches f_p of 32 numbers, less the
                mean of all patches of the gallery
    stage 1     the 200 images of the gallery whose mean patch is most like the query's
    stage 2     of each of these Σ_{p in map} max_j cos(f_p, g_j): every patch of the map with its best partner
    answer      the commonest label of the best 20, the larger sum of scores where two are equally common

    unedited    12 patches whose correspondences are strongest: |f_p| max_j cos(f_p, g_j), the mean over the 200
    noisy       a user who takes a third of these out, at random, and puts as many others in, at random
    half right  the same, but each patch that goes in is looked for on the digit with probability 1/2
    oracle      all patches that show the digit
    all         all patches;  random: 12 of them

What the map weighs by |f_p| it does not vote by. Without this weight the strongest correspondences are those of the
empty canvas, and whatever is put in helps. Numbers of pieces, candidates and patches were chosen on the 300 images of
"choice", so that about half of the unedited map is on the digit; judged are the 497 of "test", on three draws of
canvases and with three users each.

The study asked people: 18 researchers made some 1,400 decisions on birds, and those who could edit were no better.
Simulated users cannot say why. What this shows is that access to the map is not enough: the map holds what would help,
as the oracle finds, and edits that know nothing of the digit do not find it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.claims.digits import digits, network
from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured

CANVAS, DIGIT, PIECE, PIECES = 16, 8, 4, 4
PATCHES = (CANVAS // 2) ** 2
CANDIDATES, NEIGHBOURS, MAP = 200, 20, 12
SEEDS, USERS, EDITED = (0, 1, 2), (0, 1, 2), 1 / 3


class Scene(NamedTuple):
    """Canvases [n, 1, 16, 16], the label of each, and which patches show its digit [n, PATCHES]."""

    images: Tensor
    labels: Tensor
    on_digit: Tensor


def scenes(part: str, seed: int) -> Scene:
    """Each digit of a part on a canvas of its own; pieces lie around it, and under it where they touch."""
    g = generator(seed)
    images, labels = digits()[part]
    n = len(images)
    canvas = torch.zeros(n, CANVAS, CANVAS)
    for _ in range(PIECES):
        whose = torch.randint(n, (n,), generator=g)
        piece = cut(images[whose, 0], torch.randint(DIGIT - PIECE + 1, (n, 2), generator=g), PIECE)
        paste(canvas, piece, torch.randint(CANVAS - PIECE + 1, (n, 2), generator=g))
    at = torch.randint(CANVAS - DIGIT + 1, (n, 2), generator=g)
    paste(canvas, images[:, 0], at)
    ink = torch.zeros_like(canvas)
    paste(ink, (images[:, 0] > 0).float(), at)
    return Scene(canvas[:, None], labels, F.max_pool2d(ink[:, None], 2).flatten(1) > 0)


def window(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of squares [n, size, size] whose upper left corners are `at` [n, 2]."""
    steps = torch.arange(size)
    return (
        torch.arange(len(at))[:, None, None],
        at[:, 0, None, None] + steps[:, None],
        at[:, 1, None, None] + steps,
    )


def cut(images: Tensor, at: Tensor, size: int) -> Tensor:
    return images[window(at, size)]


def paste(canvas: Tensor, squares: Tensor, at: Tensor) -> None:
    canvas[window(at, squares.shape[-1])] = squares


def patches(images: Tensor) -> Tensor:
    """[n, PATCHES, 32]"""
    model = network(0)
    with torch.no_grad():
        return model[:2](images).flatten(2).mT


# the classifier


class Query(NamedTuple):
    """What is known of queries before a map is chosen."""

    best: Tensor  # [n, CANDIDATES, PATCHES] the cosine of each patch with its best partner
    near: Tensor  # [n, CANDIDATES] the candidates' labels
    size: Tensor  # [n, PATCHES] |f_p|
    labels: Tensor
    on_digit: Tensor


def queries(part: str, seed: int) -> Query:
    asked, told = scenes(part, seed), scenes("train", 1000 + seed)
    ours, theirs = patches(asked.images), patches(told.images)
    whole, others = (F.normalize(x.mean(1), dim=-1) for x in (ours, theirs))
    near = (whole @ others.T).topk(CANDIDATES).indices
    ours, theirs = (x - theirs.mean((0, 1)) for x in (ours, theirs))
    size, gallery = ours.norm(dim=-1), F.normalize(theirs, dim=-1)
    pairs = zip(F.normalize(ours, dim=-1), near, strict=True)
    best = torch.stack([(f @ gallery[i].mT).amax(-1) for f, i in pairs])
    return Query(best, told.labels[near], size, asked.labels, asked.on_digit)


def votes(query: Query, chosen: Tensor) -> Tensor:
    """The answers [n] with these patches [n, PATCHES] as the map."""
    scores = (query.best * chosen[:, None]).sum(-1)  # [n, CANDIDATES]
    top, index = scores.topk(NEIGHBOURS)
    each = F.one_hot(query.near.gather(1, index), 10).double()  # [n, NEIGHBOURS, 10]
    ties = (each * top[..., None]).sum(1) / (1 + top.sum(1, keepdim=True))  # below 1
    return (each.sum(1) + ties).argmax(1)


# maps and who edits them


def unedited(query: Query) -> Tensor:
    return strongest(query.size * query.best.mean(1))


def strongest(values: Tensor) -> Tensor:
    """Booleans [n, PATCHES]: the MAP largest of each row."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(MAP).indices, True)


def edited(query: Query, chosen: Tensor, knows: float, g: torch.Generator) -> Tensor:
    """A third of the map is exchanged for other patches, each of which is looked for on the digit with this chance."""
    count = round(EDITED * MAP)
    out = drawn(chosen.float(), count, g)
    found = chosen & ~out
    for _ in range(count):
        aware = torch.rand(len(chosen), 1, generator=g) < knows
        free = ~chosen & ~found
        wanted = free & query.on_digit
        wanted = torch.where(aware & wanted.any(1, keepdim=True), wanted, free)
        found |= drawn(wanted.float(), 1, g)
    return found


def drawn(weights: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Booleans: so many different places of each row, in proportion to the weights."""
    picked = torch.multinomial(weights, count, generator=g)
    return torch.zeros_like(weights, dtype=torch.bool).scatter(1, picked, True)


Maps = dict[str, Callable[[torch.Generator], Tensor]]


def maps(query: Query) -> Maps:
    base = unedited(query)
    return {
        "unedited": lambda g: base,
        "noisy": lambda g: edited(query, base, 0.0, g),
        "half_right": lambda g: edited(query, base, 0.5, g),
        "oracle": lambda g: query.on_digit,
        "all": lambda g: torch.ones_like(base),
        "random": lambda g: drawn(torch.ones(base.shape), MAP, g),
    }


def accuracies(part: str, seed: int) -> dict[str, float]:
    """Percent of right answers with each map, the mean over users, and how much of the unedited map is on the digit."""
    query = queries(part, seed)
    found = {
        name: mean(
            100 * (votes(query, chosen(generator(10 * seed + user))) == query.labels).double().mean().item()
            for user in USERS
        )
        for name, chosen in maps(query).items()
    }
    on = query.on_digit[unedited(query)].double().mean().item()
    return found | {"map_on_digit": on, "digit_patches": query.on_digit.double().sum(1).mean().item()}


def measure() -> Measured:
    with threads(1):
        rows = [accuracies("test", seed) for seed in SEEDS]
    numbers = {name: [row[name] for row in rows] for name in rows[0]}
    change = {
        name: mean(numbers[name]) - mean(numbers["unedited"]) for name in ("noisy", "half_right", "oracle")
    }
    parts = {"noisy edits": change["noisy"] <= 1, "oracle": change["oracle"] >= 2}
    return Measured.by(parts, {**numbers, **{f"{name}_change": value for name, value in change.items()}})


CLAIM = Claim(
    name="chm_corr_plus_plus",
    statement=(
        "simulated users who edit, without knowledge, which patches a patch-correspondence vote on cluttered digits "
        "uses do not raise its accuracy, while a map of the digit's own patches does"
    ),
    bound=(
        "mean of three draws: with noisy edits the accuracy rises by <= 1 point or falls, with an oracle's map it "
        "rises by >= 2 points"
    ),
    measure=measure,
)
