"""CHAIR: which objects a caption names, and which of these are not on the image.

    CHAIR_I = mentions of absent objects / mentions of objects          CHAIR_S = captions with one / captions
    recall  = distinct objects that are named and there / objects that are there

An incomplete last sentence is kept or dropped: both are scored. Objects are words or groups of words, the longest
first; `synonyms` maps other words to them, and a plural counts as its singular.

>>> mentions("A red circle and two dogs sit.", ["red circle", "dog"])
['red circle', 'dog']
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Of one caption: mentions of absent objects, of objects; distinct ones found and there; words."""

    false: int
    named: int
    found: int
    there: int
    words: int


def mentions(caption: str, objects: Sequence[str], synonyms: Mapping[str, str] | None = None) -> list[str]:
    """The objects that a caption names, in order, as often as it names them."""
    names = {**{name: name for name in objects}, **(synonyms or {})}
    if not names:
        return []
    pattern = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    found = re.findall(rf"\b({pattern})(?:e?s)?\b", caption.lower())
    return [names[word] for word in found]


def without_last(caption: str) -> str:
    """A caption whose last sentence does not end, without that sentence; one without any end stays.

    >>> without_last("A dog. It sits on"), without_last("A dog sits")
    ('A dog.', 'A dog sits')
    """
    stripped = caption.strip()
    ends = [m.end() for m in re.finditer(r"[.!?]", stripped)]
    return stripped if not ends or ends[-1] == len(stripped) else stripped[: ends[-1]]


def counts(
    caption: str, there: Sequence[str], objects: Sequence[str], synonyms: Mapping[str, str] | None = None
) -> Counts:
    said = mentions(caption, objects, synonyms)
    return Counts(
        false=sum(name not in there for name in said), named=len(said), found=len({*said} & {*there}),
        there=len({*there}), words=len(caption.split()),
    )  # fmt: skip


def chair(found: Sequence[Counts]) -> dict[str, float]:
    """CHAIR_I and CHAIR_S of captions, with recall, mean length in words and how many captions there are."""
    total = {
        name: sum(getattr(c, name) for c in found) for name in ("false", "named", "found", "there", "words")
    }
    return {
        "chair_i": total["false"] / max(total["named"], 1),
        "chair_s": sum(c.false > 0 for c in found) / len(found),
        "recall": total["found"] / max(total["there"], 1),
        "length": total["words"] / len(found),
        "n": len(found),
    }
