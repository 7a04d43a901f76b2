"""What a larger setting of steering and of a page of tokens does to the logits of a tiny vision-language model."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.core import Method, NeverFired
from regard.testing.directions.way import Row, less, more
from regard.testing.pictures import batch, said
from regard.testing.steering import steered
from regard.testing.tokens import answers
from regard.testing.twice import leaves

FAMILY = "llava"
LAYERS = "which layers are read, by their numbers"
SCORE = "a part of a score: which tokens are above others for it depends on the image"

STEERING: dict[str, Row] = {
    "strength": (more("change", 0.0, 0.5, cut=0.0), more("change", 0.5, 2.0, cut=0.0)),
    "vhd_vhr.strength": more("change", 1.5, 3.0),
    "vista.strength": (more("change", 0.0, 0.1, mix=0.0), more("change", 0.1, 0.5)),
    "cut": less("allowed", 0.01, 0.6),
    "mix": more("change", 0.1, 0.6),
    "gamma": more("change", 1.1, 2.0, cut=0.0),
    "pai.alpha": more("change", 0.1, 0.5, cut=0.0),
    "act_attention_calibration.alpha": less("marked", 0.02, 0.4),
    "beta": less("change", 0.2, 0.8),
    "first": less("change", 0, 9),
    "spared": less("change", 0, 9),
    "inhibit": more("marked", 0.2, 0.8),
    "patches": less("change", 1, 4, cut=0.0),
    "local": more("change", 0.2, 2.0),
    "summary": more("change", 0.2, 2.0),
    "imbalanced_attention_fix.share": more("change", 0.0, 0.25),
    "imbalanced_attention_fix.depth": less("change", 0.0, 0.6),
    "last": more("change", 1, 2, second=False),
    "tau": less("marked", 5.0, 40.0),
    "var.width": more("marked", 512, 8192),
    "mass": less("change", 0.0, 0.9),
    "rho": more("change", 0.0, 1.0),
    "p": less("change", 0.2, 0.8),
    "noise": more("change", 50, 900, cut=0.0),
    "threshold": less("marked", 0.1, 0.8),
    "least": less("change", 2, 3),
    "early": more("apart", 0.1, 0.9),
    "sink": less("apart", 0.1, 0.9),
    "deep": less("apart", 0.0, 1.0),
    "carve.share": less("change", 0.1, 0.8),
    "layer": LAYERS,
    "start": LAYERS,
    "stop": LAYERS,
    "every": LAYERS,
    "window": LAYERS,
    "lam": "keeps a quotient finite",
    "regions": "how many regions stay at least: of this picture there are fewer",
    "region_share": "how many regions stay at least: of this picture there are fewer",
    "seed": "another one is another draw",
    "frames": "how many frames there are: it goes with the input",
    "subjects": "how many roles are read: it goes with the input",
    **dict.fromkeys(
        ("opera.alpha", "beams", "candidates", "sigma", "unit", "patience", "rollbacks"),
        "of a search, which takes the place of generate",
    ),
}
TOKENS: dict[str, Row] = {
    "keep": more("left", 0.25, 0.75),
    "merge": more("left", 0.25, 0.75),
    "exit": more("left", 0, 1),
    "fastv.layer": more("left", 1, 2),
    "layers": more("left", 1, 2),
    "aim.start": more("left", 0.0, 0.6),
    "end": more("left", 0.6, 1.0),
    "threshold": more("left", 0.1, 0.9, keep=None),
    "copies": more("left", 0, 3, keep=None, threshold=0.2),
    "power": more("spread", 0.0, 2.0),
    "minimum": more("least", 0, 3),
    "layer": LAYERS,
    "shallow": LAYERS,
    "start": LAYERS,
    "temperature": SCORE,
    "iterations": SCORE,
    "damping": SCORE,
    "primary": "which of the tokens kept are chosen and which are means: as many stay",
    "rounds": "of k-means at most: as many clusters stay",
    "padding": "which tokens stand for padding: the share that is kept stays",
    "seed": "another one is another draw",
}


def configured(name: str, settings: Mapping[str, Any]) -> Method:
    page = catalog.get(name)
    base = page.test_settings[0] if page.test_settings else {}
    own = {setting: value for setting, value in settings.items() if hasattr(page.config(), setting)}
    return Method(name, page, page.configure(**{**base, **own}))


@cache
def plain() -> Tensor:
    model, inputs = batch(FAMILY)
    with torch.no_grad():
        return said(model, dict(inputs), 1)


def found(name: str, settings: Mapping[str, Any]) -> list[Any]:
    """What the page's own cases give, those with settings in them, under these."""
    page: Any = catalog.get(name)
    results = []
    for case in (case for seed in range(2) for case in page.cases(seed)):
        at = [i for i, part in enumerate(case) if isinstance(part, page.config)]
        if at:
            cfg = page.configure(**{**vars(case[at[0]]), **settings})
            results.append(page.measure(*case[: at[0]], cfg, *case[at[0] + 1 :]))
    return results


def marked(name: str, settings: Mapping[str, Any]) -> float:
    """How many places are marked."""
    flags = (leaf for result in found(name, settings) for leaf in leaves(result) if leaf.dtype == torch.bool)
    return float(sum(int(leaf.sum()) for leaf in flags))


def apart(name: str, settings: Mapping[str, Any]) -> float:
    """How far from what they give under the settings that change nothing."""
    both = (found(name, each) for each in (settings, {**settings, **catalog.get(name).card.neutral}))
    pairs = (zip(leaves(a), leaves(b), strict=True) for a, b in zip(*both, strict=True))
    return float(sum((x.double() - y.double()).abs().sum() for pair in pairs for x, y in pair))


def change(name: str, settings: Mapping[str, Any]) -> float:
    """How far the next token's log-probabilities are from the model's own."""
    model, inputs = batch(FAMILY)
    try:
        moved = steered(configured(name, settings), model, inputs, steps=1)
    except NeverFired:  # no layer is left where it acts
        return 0.0
    return float((moved.log_softmax(-1) - plain().log_softmax(-1)).abs().mean())


def allowed(name: str, settings: Mapping[str, Any]) -> float:
    """How many tokens may come next."""
    model, inputs = batch(FAMILY)
    return float(steered(configured(name, settings), model, inputs, steps=1).isfinite().sum())


def left(name: str, settings: Mapping[str, Any]) -> float:
    """How many visual tokens the layers see, all together."""
    model, inputs = batch(FAMILY)
    return float(sum(map(sum, answers(configured(name, settings), model, inputs, "remove", 1)[1])))


def by_frame(name: str, settings: Mapping[str, Any]) -> list[Tensor]:
    """Of each case the tokens of each frame."""
    return [torch.tensor([float(len(frame.keep)) for frame in result]) for result in found(name, settings)]


QUANTITIES: dict[str, Callable[[str, Mapping[str, Any]], float]] = {
    "change": change,
    "allowed": allowed,
    "marked": marked,
    "apart": apart,
    "left": left,
    "spread": lambda name, settings: float(sum(x.std() for x in by_frame(name, settings))),
    "least": lambda name, settings: float(sum(x.min() for x in by_frame(name, settings))),
}


def measure(name: str, quantity: str, settings: Mapping[str, Any]) -> dict[str, float]:
    return {"": QUANTITIES[quantity](name, settings)}
