"""OPERA's claim, on the shipped vision-language model: captions of scenes that break the priors.

Scenes show coloured shapes without the partners that usually come with them, at contrasts of training; a mention of
what is not there is false (CHAIR_I: false mentions over all). OPERA is beside beam search with as many beams, which it
is at α = 0, and greedy decoding. Unit and patience were chosen on the seed CHOICE, σ and α are the paper's.
The way back is what acts: with a patience of 15 captions of 20 tokens or less hardly change (3 of 48, the same
CHAIR_I), and a larger unit keeps beams from ending, so that captions grow and more of their mentions are false.

Control: captions of beam search of which only the first mentions are kept, as many in all as OPERA's captions have.
Columnar attention puts c of each row on the first column and the rest evenly on the others; diffuse is even.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regard.bench.picture_scores import cut, difference, share
from regard.claims.lab import mean, threads
from regard.claims.shipped_vlm import captions, chair
from regard.core import Method
from regard.core.claim import Claim, Measured
from regard.methods.steering import opera as page
from regard.tasks.chair_scores import Counts, counts
from regard.tasks.pictures import PictureQuestion
from regard.tasks.scene_questions import DESCRIBE
from regard.tasks.scenes import MIXED, PAIRS, Scene, Scenes

SEEDS, CHOICE, COUNT, SAME, BEAMS = (1, 2, 3), 0, 64, 12, 5
SETTINGS = page.Config(patience=4)


def drawn(seed: int, count: int = COUNT) -> list[Scene]:
    return Scenes(f"opera {seed}", conflict=True, contrast=MIXED).many(count)


def opera(cfg: page.Config) -> Method:
    return Method("opera", page.METHOD, cfg)


def constructed(size: int, row: float, column: float | None) -> Tensor:
    """[size, size] whose rows sum to `row`: even, or that share of it on the first column."""
    tokens = torch.arange(1, size + 1, dtype=torch.float64)
    even = torch.ones(size, size, dtype=torch.float64).tril() * (row / tokens)[:, None]
    if column is None:
        return even
    leaned = (
        torch.ones(size, size, dtype=torch.float64).tril()
        * (row * (1 - column) / (tokens - 1).clamp(1))[:, None]
    )
    leaned[:, 0] = row * column
    leaned[0, 0] = row
    return leaned


def ratios(sigma: float) -> list[float]:
    """φ of columnar over φ of diffuse attention, by size and by the column's share."""
    found = []
    for size in (6, 10, 20):
        diffuse = page.measure(constructed(size, 0.5, None), sigma)[0].item()
        found += [page.measure(constructed(size, 0.5, c), sigma)[0].item() / diffuse for c in (0.6, 0.8)]
    return found


def asked(scenes: Sequence[Scene]) -> list[PictureQuestion]:
    shown = [tuple(" ".join(pair) for pair in scene.shapes) for scene in scenes]
    return [PictureQuestion(None, DESCRIBE, "", str(i), objects=there) for i, there in enumerate(shown)]


def over_cut(
    scenes: Sequence[Scene], ours: Sequence[str], beams: Sequence[str]
) -> tuple[list[Counts], list[Counts]]:
    """Mentions of OPERA's captions, and of beam search's cut to as many."""
    objects = [" ".join(pair) for pair in PAIRS]
    kept = [counts(text, q.objects, objects) for q, text in zip(asked(scenes), ours, strict=True)]
    return kept, cut(asked(scenes), beams, objects, sum(c.named for c in kept))


def beam_search(scenes: Sequence[Scene]) -> list[str]:
    return captions(None, scenes, num_beams=BEAMS)


def length(said: Sequence[str]) -> float:
    return mean(len(text.split()) for text in said)


def of_seed(seed: int, cfg: page.Config) -> tuple[dict[str, float], tuple[list[Counts], list[Counts]]]:
    """CHAIR_I, recall and words of OPERA, beam search and greedy decoding; mentions beside beam search that is cut."""
    scenes = drawn(seed)
    sides = {
        "opera": captions(opera(cfg), scenes), "beam": beam_search(scenes), "greedy": captions(None, scenes)
    }  # fmt: skip
    found: dict[str, float] = {}
    for name, said in sides.items():
        rate, recall = chair(said, scenes)
        found |= {name: rate, f"recall_{name}": recall, f"words_{name}": length(said)}
    changed = mean(a != b for a, b in zip(sides["opera"], sides["beam"], strict=True))
    both = over_cut(scenes, sides["opera"], sides["beam"])
    whole = np.arange(len(scenes))
    return {**found, "cut": share(both[1], whole), "changed": changed}, both


def same_at_zero() -> int:
    """Of SAME captions those that differ from beam search's at α = 0, each searched alone."""
    scenes = drawn(CHOICE, SAME)
    ours = captions(opera(page.Config(beams=BEAMS, alpha=0.0)), scenes)
    theirs = [beam_search([scene])[0] for scene in scenes]
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def measure() -> Measured:
    with threads(2):
        runs = [of_seed(seed, SETTINGS) for seed in SEEDS]
        found = [run[0] for run in runs]
        ours, theirs = ([c for run in runs for c in run[1][side]] for side in (0, 1))
        names = [f"{seed} {i}" for seed in SEEDS for i in range(COUNT)]
        numbers: dict = {name: [each[name] for each in found] for name in found[0]}
        numbers["over_cut_interval"] = difference(names, ours, theirs)
        differ, phi = same_at_zero(), ratios(SETTINGS.sigma)
        numbers |= {
            "seeds": list(SEEDS), "captions_of_a_seed": COUNT, "unit": SETTINGS.unit, "patience": SETTINGS.patience,
            "differ_at_alpha_0": differ, "phi_ratios": phi,
        }  # fmt: skip
    parts = {
        "beam search at α = 0": differ == 0,
        "columns score higher": min(phi) > 10,
        "fewer false mentions than beam search": all(each["opera"] < each["beam"] for each in found),
        "fewer than beam search cut": numbers["over_cut_interval"][1] < 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="opera",
    statement="at α = 0 OPERA is beam search; attention that leans on one column scores higher than diffuse attention "
    "of equal row sums; with its penalty captions of a small vision-language model mention what is absent less often",
    bound="identical captions at α = 0; every ratio of φ > 10 on constructed maps; CHAIR_I below beam search's in 3 "
    "of 3 seeds, and below that of beam search cut to as many mentions (95 % over images)",
    measure=measure,
    fails=("fewer than beam search cut",),
    contradicted=(
        "it is beam search at α = 0, a summary column scores 56 to 3e16 times a diffuse one, and in 3 of 3 seeds "
        "CHAIR_I is below beam search's: 29.4, 38.2 and 28.2 % against 42.6, 39.4 and 45.3. But its captions are "
        "shorter (5.7 words for 8.2) and recall falls from 0.80 to 0.65; beam search's own captions cut to as many "
        "mentions have 34.1, 38.2 and 36.5, and over the 192 images the difference to them is -8.0 to +0.2 points (95"
        " %), which does not exclude this control. What acts is the way back, with a patience of 4 chosen on another "
        "seed: with the paper's 15, 3 of 48 captions change"
    ),
)
