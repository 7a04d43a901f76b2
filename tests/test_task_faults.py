"""Faults that are planted into samples of task pages: the law that each breaks names it."""

from dataclasses import replace

import pytest

from regard.catalog import get
from regard.core import Method
from regard.tasks import Turn
from regard.tasks.base import chat_marks, encode
from regard.testing.task import check_chat, check_context, check_evidence


def faulty(name: str, change) -> Method:
    """A page whose samples are changed after it made them."""
    page, config = get(name), get(name).config()

    def samples(cfg, tokenizer, *args, **rest):
        return [change(s, tokenizer) for s in page.samples(config, tokenizer, *args, **rest)]

    return Method("mine", replace(page, samples=samples), config)


def overwritten(sample, ids: list[int]):
    """The sample with these tokens over some of its context, where no needed fact stands."""
    for at in range(1, len(sample.prompt) // 2):
        if all(at + len(ids) <= first or past <= at for first, past in sample.needed):
            return replace(sample, prompt=[*sample.prompt[:at], *ids, *sample.prompt[at + len(ids) :]])
    raise AssertionError("no room")


def leaks(sample, tokenizer):
    return overwritten(sample, encode(tokenizer, tokenizer.decode(sample.turns[1].question).split("\n")[1]))


def splits(sample, tokenizer):
    return replace(sample, context=sample.facts[0][0] + 2)


def late(sample, tokenizer):
    return replace(sample, context=5)


def repeats(sample, tokenizer):
    return overwritten(sample, encode(tokenizer, f" {sample.wanted[-1]}"))


def answers_twice(sample, tokenizer):
    return overwritten(sample, sample.turns[-1].answer)


def other_place(sample, tokenizer):
    (first, past), *rest = sample.facts
    return replace(sample, facts=((first + 40, past + 40), *rest))


def unmarked(sample, tokenizer):
    plain = encode(
        tokenizer, "." + tokenizer.decode(sample.turns[0].question).split("<user>")[-1].split("<end>")[0]
    )
    return replace(sample, turns=(Turn(plain, sample.turns[0].answer), *sample.turns[1:]))


def starts_anew(sample, tokenizer):
    again = encode(tokenizer, "<end>\n" + chat_marks(tokenizer, 1)[0]) + sample.turns[0].question[5:]
    return replace(sample, turns=(Turn(again, sample.turns[0].answer), *sample.turns[1:]))


@pytest.mark.parametrize(
    ("name", "fault", "law", "words"),
    [
        ("turns", leaks, check_context, "the context holds the question"),
        ("turns", splits, check_context, "stands after the context|splits a fact"),
        ("turns", late, check_context, "stands after the context"),
        ("turns", answers_twice, check_evidence, "stands elsewhere"),
        ("turns", other_place, check_evidence, "not in the evidence|overlap"),
        ("niah_multivalue", repeats, check_evidence, "stands elsewhere"),
        ("niah_multiquery", other_place, check_evidence, "not in the evidence|overlap|spans the facts"),
        ("common_words", repeats, check_evidence, "stands elsewhere"),
        ("turns", unmarked, check_chat, "messages end"),
        ("turns", starts_anew, check_chat, "begins|start is said again|messages end|marks within"),
    ],
)
def test_a_planted_fault_is_named_by_its_law(name, fault, law, words):
    law(faulty(name, lambda sample, tokenizer: sample))
    with pytest.raises(AssertionError, match=words):
        law(faulty(name, fault))
