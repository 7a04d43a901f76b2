"""RefAM's claim, in diffusion transformers trained on digits among clutter, whose patches share a softmax among words.

The prompt is a noun, the class of one of two digits, and one stop word; the other digit is not named. Then four stop
words are appended, the magnets, or, for a control, four other nouns, classes that the scene does not show. In all
three the noun's own map is read, the mean over layers and heads at one time of the noised scene, and thresholded in
the middle between its least and its largest value. The truth is where the digit has ink. The time, of 0.1 to
0.9, and the layers, each or both, are those at which the baseline overlapped best in a model of a seed beside the
five; scenes are of images that no training saw. How much worse a model draws what another noun names says how far it
heeds its words.
"""

from typing import Any

import torch
from torch import Tensor

from regard.claims import toy_diffusion as toy
from regard.claims.lab import generator, mean, threads
from regard.core.claim import Claim, Measured
from regard.methods.steering import refam as page

SEEDS, SCENES, STEPS = range(5), 256, 500
TIME, EXTRA = 0.1, 4
KEEP = page.Config(handle="keep")


def others(shown: Tensor, count: int, g: torch.Generator) -> Tensor:
    """[B, count] classes that are not among those shown [B, 2]."""
    order = torch.rand(len(shown), 10, generator=g).scatter(1, shown, 2.0)
    return order.argsort(1)[:, :count]


def prompts(scene: toy.Scenes, g: torch.Generator) -> dict[str, Tensor]:
    """[B, WORDS] of each side: first the noun, then a stop word, then what is appended."""
    noun, count = scene.digits[:, :1], len(scene.digits)
    stops = torch.tensor(toy.STOP).expand(count, -1)
    nothing = torch.full((count, EXTRA), toy.PAD)
    sides = {"baseline": nothing, "magnets": stops[:, 1 : 1 + EXTRA], "nouns": others(scene.digits, EXTRA, g)}
    rest = torch.full((count, toy.WORDS - 2 - EXTRA), toy.PAD)
    return {name: torch.cat([noun, stops[:, :1], more, rest], dim=1) for name, more in sides.items()}


def maps(model: toy.ToyDiffusion, x: Tensor, words: Tensor, cfg: page.Config) -> page.Found:
    record = toy.Record()
    model(x, torch.full((len(x),), TIME), words, record)
    w = torch.stack([record.weights[layer, "cross"] for layer in range(toy.LAYERS)])
    place = torch.arange(toy.WORDS).expand(len(x), -1)
    return page.measure(w, place == 0, (place >= 2) & (words != toy.PAD), cfg)


def judged(found: page.Found, ink: Tensor) -> dict[str, float]:
    """IoU at half of the map's range, the mean weight off the digit and on it, and how often the peak is on ink."""
    low, high = found.map.amin(-1, keepdim=True), found.map.amax(-1, keepdim=True)
    mask = found.map > (low + high) / 2
    iou = (mask & ink).sum(-1).double() / (mask | ink).sum(-1)
    off = found.map.masked_fill(ink, 0).sum(-1)
    return {
        "iou": iou.mean().item(),
        "off_the_digit": (off / (~ink).sum(-1)).mean().item(),
        "on_the_digit": (found.map.masked_fill(~ink, 0).sum(-1) / ink.sum(-1)).mean().item(),
        "share_off_the_digit": (off / found.map.sum(-1)).mean().item(),
        "peak_on_ink": ink.gather(1, found.peak[:, None]).double().mean().item(),
    }


@torch.no_grad()
def sides(model: toy.ToyDiffusion, seed: int) -> dict[str, dict[str, float]]:
    g = generator(seed)
    scene = toy.scenes(SCENES, g, "test", both=0.0)
    clean, named = (2 * toy.patches_of(images) - 1 for images in scene[:2])
    x = toy.noised(clean, torch.randn(clean.shape, generator=g), TIME)
    ink, given = scene.ink[:, 0], prompts(scene, g)
    found = {name: judged(maps(model, x, words, KEEP), ink) for name, words in given.items()}
    found["magnets_and_sinks"] = judged(maps(model, x, given["magnets"], page.Config()), ink)
    right = given["baseline"]
    wrong = torch.where(right < toy.STOP[0], (right + 3) % toy.STOP[0], right)
    errors = (
        (model(x, torch.full((SCENES,), TIME), w) - named).square().mean().item() for w in (right, wrong)
    )
    return found | {"model": dict(zip(("error", "error_at_another_noun"), errors, strict=True))}


def measure() -> Measured:
    with threads(1):
        runs = [sides(toy.trained(seed, STEPS), seed + 10) for seed in SEEDS]
    numbers: dict[str, Any] = {
        f"{side}_{what}": [run[side][what] for run in runs] for side in runs[0] for what in runs[0][side]
    }
    gains = {
        side: [run[side]["iou"] - run["baseline"]["iou"] for run in runs] for side in ("magnets", "nouns")
    }
    gain, control = (mean(values) for values in gains.values())
    off = [mean(run[side]["off_the_digit"] for run in runs) for side in ("magnets", "baseline")]
    numbers |= {f"{side}_gain": values for side, values in gains.items()}
    numbers |= {"magnets_gain_mean": gain, "nouns_gain_mean": control}
    parts = {
        "magnets sharpen": gain >= 0.05,
        "less weight off the digit": off[0] < off[1],
        "other nouns change little": abs(control) <= 0.02,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="refam",
    statement=(
        "appended stop words, dropped again, lower the background's weight on a noun and sharpen its map; as many "
        "appended nouns of things that are not there do not"
    ),
    bound=(
        "mean over 5 seeds of the thresholded noun map's IoU: with magnets >= without + 0.05 and less weight off the "
        "digit; with other nouns within 0.02 of without"
    ),
    measure=measure,
    fails=("magnets sharpen", "other nouns change little"),
    contradicted=(
        "Magnets do take more from a noun off its digit, 0.75 -> 0.53 of a patch's weight, than on it, 0.85 "
        "-> 0.70; 0.81 of the map instead of 0.84 still lies off the digit. Overlap grows by 0.024 (0.257 "
        "-> 0.281; by seed -0.02, 0.04, 0.05, 0.03, 0.01), half of what is claimed; with sinks dropped too "
        "it is 0.262. Other nouns are no idle control: under a softmax over words they compete with the "
        "noun everywhere, on its digit as well (0.85 -> 0.20), and overlap falls by 0.085, in every seed. "
        "In the spare model, at times of 0.1 to 0.9 and in either layer or both, four magnets gain 0.01 to "
        "0.06 and four nouns cost 0.05 to 0.08, so that no choice keeps to both bounds. Models here heed "
        "their words moderately: their error grows by 14 % when another noun is named, and no caption in "
        "training names more than two"
    ),
)
