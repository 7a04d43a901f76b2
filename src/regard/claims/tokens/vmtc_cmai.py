"""CMAI's claim, on the shipped vision-language model: it hides the half of the pairs of text and image that can go.

CMAI hides half of the image tokens from every row of text in every layer, while the prompt is read and while the
answer is written; the control hides as many of each row and layer, drawn at random. Questions of four kinds on clear
scenes, answers count whole, and nothing was chosen: the settings are the page's own.

Reported beside it: the half of highest focus hidden instead (`opposite`), the half of the image tokens that one draw
for a text takes from all its rows and layers (`same_everywhere`), and all sides by kind.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.claims.lab import mean, threads
from regard.claims.shipped_vlm import Asked, asked, correct, next_logits, shuffled
from regard.core import Card, Claim, Measured, Method
from regard.kinds.steering import SteeringPage
from regard.methods.steering import cmai as page
from regard.ops.steered import Steered

KINDS, SEEDS, COUNT = ("digit", "colour", "where", "exists"), (1, 2, 3), 96  # questions of each kind
CMAI = Method("cmai", page.METHOD, page.Config(inhibit=0.5))
NEUTRAL = Method("cmai", page.METHOD, page.Config(inhibit=0.0))


def hiding(name: str, rank: Callable[[Steered, Tensor], Tensor]) -> Method:
    """Of each text row's image keys the half that ranks lowest, by (where, scores [B, H, R, n]) -> [B, R, n]."""

    def scores(at: Steered, s: Tensor, cfg: page.Config) -> Tensor:
        text = ~at.row_role("image") & (at.rows >= 0)
        pairs = (s > -torch.inf).any(1) & at.role("image")[:, None] & text[..., None]
        return s.masked_fill(page.lowest(rank(at, s), pairs, cfg.inhibit)[:, None], -torch.inf)

    card = Card(title=name, paper="none", year=2024, idea="a control")
    return Method(name, SteeringPage(config=page.Config, scores=scores, card=card), CMAI.config)


def at_random(at: Steered, s: Tensor) -> Tensor:
    return torch.rand(s.shape[0], *s.shape[2:])


def same_everywhere(at: Steered, s: Tensor) -> Tensor:
    """Ranks by one draw, the same in all layers, rows and batches."""
    columns = torch.rand(1024, generator=torch.Generator().manual_seed(0))
    return columns[: s.shape[3]].expand(s.shape[0], *s.shape[2:])


def unlike_cmai(at: Steered, s: Tensor) -> Tensor:
    """The page's focus, reversed."""
    image, text = at.role("image"), ~at.row_role("image") & (at.rows >= 0)
    earlier = at.notes.get("looked", s.new_zeros(len(s), 0, 0))
    n, rows = s.shape[3], s.shape[2]
    earlier = torch.nn.functional.pad(earlier, (0, n - earlier.shape[2], n - rows - earlier.shape[1], 0))
    found = page.measure(s, image, text, earlier, CMAI.config)
    at.notes["looked"] = found.looked
    return -found.focus


METHODS = {
    "plain": None,
    "cmai": CMAI,
    "random": hiding("random", at_random),
    "opposite": hiding("opposite", unlike_cmai),
    "same_everywhere": hiding("same_everywhere", same_everywhere),
}


def sides(seed: int) -> dict[str, list[bool]]:
    """Which answers are right, of all kinds in order."""
    given = [question for kind in KINDS for question in asked(kind, COUNT, f"cmai {kind} {seed}")]
    with shuffled(seed):
        return {name: correct(method, given) for name, method in METHODS.items()}


def lost(run: dict[str, list[bool]], name: str) -> float:
    """Points of accuracy."""
    return 100 * (sum(run["plain"]) - sum(run[name])) / len(run["plain"])


def by_kind(runs: list[dict[str, list[bool]]], name: str) -> list[float]:
    """Percent right of each kind, all seeds together."""
    parts = [slice(i * COUNT, (i + 1) * COUNT) for i in range(len(KINDS))]
    return [100 * mean(right for run in runs for right in run[name][part]) for part in parts]


def some() -> list[Asked]:
    return [question for kind in KINDS for question in asked(kind, 8, f"cmai {kind} 0")]


def measure() -> Measured:
    with threads(1):
        gap = (next_logits(NEUTRAL, some()) - next_logits(None, some())).abs().max().item()
        runs = [sides(seed) for seed in SEEDS]
    drops = {name: [lost(run, name) for run in runs] for name in METHODS if name != "plain"}
    drop, random = mean(drops["cmai"]), mean(drops["random"])
    numbers: dict[str, Any] = {
        "drop": drop,
        "random": random,
        "gain": random - drop,
        "neutral_difference": gap,
    }
    numbers |= {f"drop_{name}": values for name, values in drops.items()} | {"kinds": [*KINDS]}
    numbers |= {f"right_{name}": by_kind(runs, name) for name in METHODS}
    return Measured.by({"it costs little": drop <= 2, "random pairs cost more": random - drop >= 5}, numbers)


CLAIM = Claim(
    name="vmtc_cmai",
    statement=(
        "hiding the half of the text-image pairs with the lowest focus costs a small vision-language model less "
        "accuracy than hiding as many pairs at random"
    ),
    bound=(
        "accuracy drop <= 2 points and at least 5 points smaller than with random pairs, means of three seeds of 384 "
        "questions"
    ),
    measure=measure,
)
