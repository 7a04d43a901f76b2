"""Labels with exceptions: a rule that fits most things in a list, and a question about one that it may not fit.

    red truck, large, plate KTM: north ...    -> Question: In which group is the red truck, large, plate KTM?   north

One of three features tells the group of all but a few; the plate tells each vehicle for itself. Who looks for a rule
takes it for more than it is; who remembers is right. `thinking=200` lets the model write so many tokens before it
answers. The paper counts how many rounds of feedback on such a list a model needs until it is right throughout.

>>> vehicles, groups = draw(Config(), random.Random("one"))
>>> len({plate for *_, plate in vehicles}), sorted(agreeing(vehicles, groups))[-1]  # of ten, eight go by the rule
(10, 8)
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Sample
from regard.tasks.corpus import Source, held_out
from regard.tasks.deliberation import Choice

FEATURES = (("red", "blue"), ("truck", "car"), ("large", "small"))
GROUPS = ("north", "south")
CONSONANTS = "BDFGHKLMNPQRSTVWXZ"
INTRO = "\nVehicles and their groups:"

Vehicle = tuple[str, ...]  # the features, then the plate


@dataclass(frozen=True)
class Config:
    vehicles: int = 10  # how many the list has, each with its own plate
    exceptions: int = 2  # vehicles that the rule does not fit; every other question is about one
    thinking: int = 0  # tokens written before the answer; 0: answered at once

    def __post_init__(self) -> None:
        rule = "4 <= vehicles <= 100, 1 <= exceptions < vehicles / 2"
        fits = 4 <= self.vehicles <= 100 and 1 <= self.exceptions < self.vehicles / 2
        require(fits, rule, vehicles=self.vehicles, exceptions=self.exceptions)
        require(0 <= self.thinking <= 4096, "0 <= thinking <= 4096", thinking=self.thinking)


def draw(cfg: Config, rng: random.Random) -> tuple[list[Vehicle], list[str]]:
    """Vehicles, of which the first are the exceptions, and their groups; other features go by the rule less often."""
    rule = rng.randrange(len(FEATURES))
    while True:
        plates: dict[str, None] = {}
        while len(plates) < cfg.vehicles:
            plates["".join(rng.sample(CONSONANTS, 3))] = None
        bits = [[rng.randrange(2) for _ in FEATURES] for _ in plates]
        for i, row in enumerate(bits):
            row[rule] = i % 2
        vehicles = [
            (*(pair[bit] for pair, bit in zip(FEATURES, row, strict=True)), plate)
            for row, plate in zip(bits, plates, strict=True)
        ]
        groups = [GROUPS[row[rule] ^ (i < cfg.exceptions)] for i, row in enumerate(bits)]
        if sorted(agreeing(vehicles, groups))[-2] < cfg.vehicles - cfg.exceptions:
            return vehicles, groups


def agreeing(vehicles: Sequence[Vehicle], groups: Sequence[str]) -> list[int]:
    """How many vehicles each feature alone would put into the right group, by the better of its two readings."""
    counts = []
    for i, pair in enumerate(FEATURES):
        same = sum((v[i] == pair[0]) == (g == GROUPS[0]) for v, g in zip(vehicles, groups, strict=True))
        counts.append(max(same, len(vehicles) - same))
    return counts


def samples(
    cfg: Config,
    tokenizer: Any,
    length: int,
    count: int,
    seed: int,
    source: Source | None = None,
    *,
    chat: bool = False,
) -> list[Sample]:
    """`count` prompts of exactly `length` tokens: running text, a list, a question; every other one on an exception."""
    drawn = []
    for i in range(count):
        rng = random.Random(f"labels_with_exceptions {seed} {i}")
        vehicles, groups = draw(cfg, rng)
        asked = rng.randrange(*((cfg.exceptions, cfg.vehicles) if i % 2 == 0 else (0, cfg.exceptions)))
        lines = [f"\n{described(v)}: {g}" for v, g in zip(vehicles, groups, strict=True)]
        rng.shuffle(lines)
        choice, text = asks(vehicles[asked], cfg), INTRO + "".join(lines)
        drawn.append(choice.sample(tokenizer, length, text, groups[asked], rng, source or held_out(), chat))
    return asks(("", "", "", ""), cfg).answered(tokenizer, drawn)


def described(vehicle: Vehicle) -> str:
    colour, kind, size, plate = vehicle
    return f"{colour} {kind}, {size}, plate {plate}"


def asks(vehicle: Vehicle, cfg: Config) -> Choice:
    question = f"\nQuestion: In which group is the {described(vehicle)}?"
    return Choice(question, "The group is", GROUPS, cfg.thinking)


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    patterns=("causal_self",),
    test_settings=({"thinking": 40, "vehicles": 7, "exceptions": 1},),
    card=Card(
        title="Labels with exceptions",
        paper="Mind Your Step (by Step): Chain-of-Thought can Reduce Performance on Tasks where Thinking Makes Humans "
        "Worse",
        year=2024,
        idea="a list in which a feature tells the label of most things, and a question about one, perhaps an exception",
        cost="none",
        state="the list",
        caveat="the paper has lists learned by feedback, round after round; here both stand in one prompt. "
        "The label stands in the vehicle's line and in others, so that no evidence is named. After thinking the "
        "sentence that ends it counts: a model that writes both sentences is right",
    ),
)
