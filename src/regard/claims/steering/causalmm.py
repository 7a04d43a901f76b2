"""CausalMM's claim, on the shipped vision-language model, whose decoder knows the usual colour of every digit.

Asked for the colour of a digit that the question names, a model that looks at nothing is right 9 times out of 10 where
scenes follow the prior (`usual`), and never where they break it (`conflict`). Contrasts are those of training, so that
some digits are plain to see and some hardly are. Answers are greedy. Strength and cut are the page's defaults; of the
kinds of map, those are taken that gain most on conflicting scenes of a seed of their own, and three fresh seeds are
reported.

Beside it, at the same strength and cut: the page's default maps, either pass alone, and as a control a pass that does
not see the image at all, which is what counterfactual maps stand in for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from regard.claims.lab import threads
from regard.claims.shipped_vlm import Asked, asked, correct, next_logits
from regard.core import Method
from regard.core.claim import Claim, Measured
from regard.explaining.effects import bootstrap
from regard.methods.steering import causalmm as page
from regard.ops.steered import Stream, contrasted
from regard.tasks.scenes import MIXED, usual_colour

SEEDS, CHOICE, COUNT = (11, 12, 13), 10, 120
BLIND = "blind"


def method(**settings: Any) -> Method:
    return Method("causalmm", page.METHOD, page.Config(**settings))


def blind_control() -> Method:
    """The same mixture, of one pass in which no token sees the image."""

    def logits(at: Any, given: dict, cfg: page.Config) -> torch.Tensor:
        return contrasted(given["main"], given[BLIND], 2 * cfg.strength, cfg.cut)

    one = replace(
        page.METHOD,
        weights=None,
        tower="text",
        streams=lambda cfg: (Stream(BLIND, hide="image"),),
        logits=logits,
    )
    return Method("blind_control", one, page.Config())


def kinds() -> list[dict[str, str]]:
    """The default maps, and each kind in both towers."""
    return [{}, *({"vision": kind, "language": kind} for kind in page.KINDS)]


def questions(conflict: bool, seeds: Sequence[int] = SEEDS) -> list[Asked]:
    how: dict[str, Any] = dict(conflict=conflict, contrast=MIXED)
    return [q for seed in seeds for q in asked("colour", COUNT, f"causalmm {seed}", **how)]


def best_kinds() -> dict[str, str]:
    chosen = questions(True, [CHOICE])
    return max(kinds(), key=lambda settings: sum(correct(method(**settings), chosen)))


def methods(maps: Mapping[str, str]) -> dict[str, Method]:
    return {
        "causalmm": method(**maps),
        "defaults": method(),
        "vision_alone": method(**{**maps, "language": ""}),
        "language_alone": method(**{**maps, "vision": ""}),
        "blind": blind_control(),
    }


def gain(with_it: Sequence[bool], plain: Sequence[bool]) -> tuple[float, list[float]]:
    """Mean difference, and its interval over pairs of answers to the same question."""
    change = torch.tensor(with_it).double() - torch.tensor(plain).double()
    low, high = bootstrap(change[:, None], torch.ones(len(change)).double())
    return change.mean().item(), [low.item(), high.item()]


def answered(conflict: bool, maps: Mapping[str, str]) -> dict[str, Any]:
    """Accuracies of a set, and what each method gains on it."""
    name, chosen = ("conflict" if conflict else "usual"), questions(conflict)
    plain = correct(None, chosen)
    numbers: dict[str, Any] = {f"{name}_plain": sum(plain) / len(plain)}
    for key, one in methods(maps).items():
        answers = correct(one, chosen)
        numbers[f"{name}_{key}"] = sum(answers) / len(answers)
        numbers[f"{name}_gain_{key}"], numbers[f"{name}_gain_{key}_interval"] = gain(answers, plain)
    prior = [usual_colour(q.scene.of("digit")[0].name) == q.question.answer for q in chosen]
    return numbers | {f"{name}_prior_alone": sum(prior) / len(prior)}


def measure() -> Measured:
    with threads(1):
        maps = best_kinds()
        numbers = answered(True, maps) | answered(False, maps)
        numbers |= {"vision": method(**maps).config.vision, "language": method(**maps).config.language}
        some = questions(True)[:32]
        apart = next_logits(method(strength=0.0, cut=0.0), some) - next_logits(None, some)
        numbers["largest_difference_at_strength_0"] = apart.abs().max().item()
    parts = {
        "conflicting images gain": numbers["conflict_gain_causalmm"] >= 0.05,
        "usual ones keep": numbers["usual_gain_causalmm"] >= -0.02,
        "plain at strength 0": numbers["largest_difference_at_strength_0"] == 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="causalmm",
    statement=(
        "where a question alone predicts 90 % of the answers, decoding away from counterfactual attention raises "
        "accuracy on images that break the prior; at γ = 0 it is plain decoding"
    ),
    bound=(
        "accuracy on conflicting images >= plain + 0.05 at default γ and ε, drop on usual ones <= 0.02, and at γ = 0 "
        "and ε = 0 logits differ by 0"
    ),
    measure=measure,
    fails=("conflicting images gain",),
    contradicted=(
        "the prior is there, and a pass that does not see the image takes it away, at the same strength: accuracy on "
        "conflicting scenes 0.50 to 0.66 (gain 0.12 to 0.20), on usual ones 0.93 to 0.90. Counterfactual maps do not: "
        "0.50 to 0.49 (gain -0.02 to 0.01), the tower's alone 0.51, the decoder's alone 0.48; usual scenes stay at "
        "0.93. Random, uniform, reversed and shuffled maps in both towers give the same 59 of 120 on the seed on which "
        "kinds are chosen. The passes agree with attention written out by hand to 3e-6. γ = 0 is plain decoding"
    ),
)
