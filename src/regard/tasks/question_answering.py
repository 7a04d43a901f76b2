"""Question answering: documents about people, one of which answers the question; the others are of the same form.

    Document 7: Mara Holt is a baker who lives in Lisbon. Mara Holt plays the cello and keeps a parrot.
    ... Question: What is the profession of Mara Holt?  Answer: The profession of Mara Holt is a    -> baker

Names share their first or their last part with others; no two people have the same profession, city, instrument or
animal. There are as many documents as the prompt has room for, at most 32, and running text between them.
"""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from regard.core import Card, require
from regard.kinds.task import TaskPage
from regard.tasks.base import Frame, Sample, encode
from regard.tasks.corpus import Source, held_out
from regard.tasks.recall import near_pairs
from regard.tasks.ruler import free_sample, freely, woven

GENERATED = 32  # the paper's
MOST = 32  # documents: so many values has each attribute
FEWEST = 3
INTRO = "Answer the question at the end by the documents below.\n"
ASKS = {
    "profession": ("What is the profession of {name}?", "The profession of {name} is"),
    "city": ("In which city does {name} live?", "{name} lives in"),
    "instrument": ("Which instrument does {name} play?", "{name} plays the"),
    "animal": ("Which animal does {name} keep?", "{name} keeps a"),
}


@dataclass(frozen=True)
class Config:
    documents: int = MOST  # at most

    def __post_init__(self) -> None:
        require(
            FEWEST <= self.documents <= MOST, f"{FEWEST} <= documents <= {MOST}", documents=self.documents
        )


@cache
def knowledge() -> dict[str, tuple[str, ...]]:
    """Attribute -> its values; first and last names too."""
    text = (Path(__file__).parent / "data" / "people.txt").read_text(encoding="utf-8")
    lines = (line.split(": ", 1) for line in text.splitlines())
    return {name: tuple(values.split(", ")) for name, values in lines}


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
    """`count` prompts of exactly `length` tokens; the document asked for goes down evenly through their order."""
    source, result = source or held_out(), []
    for i in range(count):
        rng = random.Random(f"question_answering {seed} {i}")
        share = i / max(1, count - 1)
        result.append(one(cfg, tokenizer, length, share, rng, source, chat))
    return freely(tokenizer, result, GENERATED)


def one(
    cfg: Config, tokenizer: Any, length: int, share: float, rng: random.Random, source: Source, chat: bool
) -> Sample:
    people, attribute = drawn_people(rng, cfg.documents), rng.choice(list(ASKS))
    documents = [encode(tokenizer, document(i, person)) for i, person in enumerate(people, 1)]
    intro, longest = (
        encode(tokenizer, INTRO),
        max(len(asked(tokenizer, p, attribute, chat).tail) for p in people),
    )
    room = length - len(intro) - longest - len(asked(tokenizer, people[0], attribute, chat).head)
    fit = sum(sum(map(len, documents[: i + 1])) <= room for i in range(len(documents)))
    require(fit >= FEWEST, f"the prompt has room for {FEWEST} documents", length=length, documents=fit)
    person = people[index := round(share * (fit - 1))]
    wanted, frame = (person[attribute],), asked(tokenizer, person, attribute, chat)
    body = woven(tokenizer, frame, length, rng, source, intro, documents[:fit], wanted)
    return free_sample(frame, body, wanted, (body.spans[index],), 1 / fit)


def drawn_people(rng: random.Random, count: int) -> list[dict[str, str]]:
    """People with names that share a part with others, and a value of each attribute that nobody else has."""
    known = knowledge()
    names = near_pairs(rng, count, known["first"], known["last"])
    values = {attribute: rng.sample(known[attribute], count) for attribute in ASKS}
    return [{"name": name} | {a: values[a][i] for a in ASKS} for i, name in enumerate(names)]


def document(number: int, person: dict[str, str]) -> str:
    name = person["name"]
    return (
        f"\nDocument {number}: {name} is a {person['profession']} who lives in {person['city']}. "
        f"{name} plays the {person['instrument']} and keeps a {person['animal']}.\n"
    )


def asked(tokenizer: Any, person: dict[str, str], attribute: str, chat: bool) -> Frame:
    question, reply = (text.format(name=person["name"]) for text in ASKS[attribute])
    return Frame.freely(tokenizer, f"\nQuestion: {question}", reply, chat)


METHOD = TaskPage(
    config=Config,
    samples=samples,
    metric="recall",
    group="ruler",
    patterns=("causal_self",),
    test_settings=({"documents": 6},),
    card=Card(
        title="Question answering among distractors",
        paper="RULER: What's the Real Context Size of Your Long-Context Language Models? (COLM 2024)",
        year=2024,
        idea="documents of one form about different people, and a question about one attribute of one of them",
        cost="none",
        state="as many facts as documents",
        caveat="the paper asks SQuAD and HotpotQA; no data set is shipped here: people and what is known of them are "
        "drawn by a seed from 32 values of each attribute. Generated are one and a half right answers and 8 tokens, at "
        "most the paper's 32",
    ),
)
