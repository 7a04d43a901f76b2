"""The claim of imbalanced attention fixed, on the shipped vision-language model: gains by head, or one for all.

Scenes break the planted priors and hardly stand out of their noise, so that captions name what usually goes
together. CHAIR_I is the share of mentions that are of absent shapes. `ours` has gains by head; `uniform` the same
gain in every head, as much weight added over all heads of a row and layer, before rows are renormalised. Beside it
stand recall and mentions a caption: naming less is no cure.

The scale of both gains was chosen for `ours` and for `uniform` apart, each by its own CHAIR_I, on scenes of a seed
that is not reported, from 1, 4, 16 times the released code's.
"""

from typing import Any

from regard.claims.lab import mean, threads
from regard.claims.shipped_vlm import captions, chair, named
from regard.core import Claim, Measured, Method
from regard.methods.steering import imbalanced_attention_fix as page
from regard.tasks.scenes import FAINT, Scene, Scenes

NAME, COUNT, CHOOSE, SEEDS, SCALES = "imbalanced_attention_fix", 128, 40, (41, 42, 43), (1.0, 4.0, 16.0)


def method(scale: float, weighted: bool) -> Method:
    plain = page.Config()
    cfg = page.Config(local=scale * plain.local, summary=scale * plain.summary, weighted=weighted)
    return Method(NAME, page.METHOD, cfg)


def scenes(seed: int) -> list[Scene]:
    return Scenes(seed, conflict=True, contrast=FAINT).many(COUNT)


def scored(acting: Method | None, seed: int) -> tuple[float, float, float]:
    """(CHAIR_I, recall, mentions a caption)"""
    shown = scenes(seed)
    said = captions(acting, shown)
    return *chair(said, shown), mean(len(named(text)) for text in said)


def chosen(weighted: bool) -> float:
    """The scale under which fewest absent shapes are named; of equal ones the smaller."""
    return min(SCALES, key=lambda scale: scored(method(scale, weighted), CHOOSE)[0])


def measure() -> Measured:
    with threads(1):
        scale = {"ours": chosen(True), "uniform": chosen(False)}
        sides = {
            "baseline": None,
            "ours": method(scale["ours"], True),
            "uniform": method(scale["uniform"], False),
            "uniform_at_the_scale_of_ours": method(scale["ours"], False),
        }
        found = {name: [scored(side, seed) for seed in SEEDS] for name, side in sides.items()}
        shown = scenes(CHOOSE)[:32]
        same = captions(method(0.0, True), shown) == captions(None, shown)
    rate = {name: 100 * mean(x[0] for x in rows) for name, rows in found.items()}
    numbers: dict[str, Any] = {f"chair_{name}": [100 * x[0] for x in rows] for name, rows in found.items()}
    numbers |= {f"recall_{name}": mean(x[1] for x in rows) for name, rows in found.items()}
    numbers |= {f"mentions_{name}": mean(x[2] for x in rows) for name, rows in found.items()}
    numbers |= {f"scale_{name}": x for name, x in scale.items()} | {"gain_0_says_the_same": int(same)}
    parts = {
        "below uniform": rate["ours"] + 1 <= rate["uniform"],
        "uniform below baseline": rate["uniform"] + 1 <= rate["baseline"],
        "the model's captions at gain 0": same,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name=NAME,
    statement=(
        "amplifying selected visual tokens as far as each head looks at the image lowers named but absent objects "
        "more than a uniform gain that adds as much attention"
    ),
    bound=(
        "CHAIR_I, mean of 3 seeds: ours + 1 point <= uniform, uniform + 1 point <= baseline; captions at gain 0 are "
        "the model's"
    ),
    measure=measure,
    fails=("below uniform",),
    contradicted=(
        "amplifying marked tokens lowers CHAIR_I, from 53.1 to 51.3 (mean of 3 seeds; on the third hardly), and recall "
        "does not fall (0.55 to 0.56) nor mentions a caption (1.76 to 1.74). Gains by head do no more than one gain: "
        "51.26 against 51.27. In the layers that are changed, 3 to 5, each head but one has 0.89 to 0.98 of its weight "
        "on the image and that one 0.54, so that gains by head are nearly one gain. On the seed on which scales were "
        "chosen, 1, 4, 16 and 64 times the code's gains: by head 54.6, 52.8, 53.0, 53.0, one gain 54.8, 52.6, 53.9, "
        "54.0, baseline 55.6. A seed has about 220 mentions, a standard error of 3 points where seeds are not paired"
    ),
)
