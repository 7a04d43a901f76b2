"""Multiple choice with letters: the prompts of a toy that is trained on it, and of SmolLM2.

Labels are A, B, C, D, or four of 26 letters at random. Prompts of a model are equally long and labels stand at the same
places, one token each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.claims.lab import generator
from regard.claims.small_lm import padded
from regard.explaining.pairs import Batch

LETTERS, QUESTIONS, TEXTS, CHOICES, BATCH = 26, 24, 24, 4, 64
# tokens of the toy
BEGIN, ANSWER, TEXT, LETTER = 0, 1, 2, 4
QUESTION = LETTER + LETTERS
FIRST = QUESTION + QUESTIONS
VOCABULARY = FIRST + TEXTS
TOKENS = 3 + 2 * CHOICES
LABELS = tuple(range(2, 2 + 2 * CHOICES, 2))  # where labels stand
# texts for SmolLM2
COLOURS = (
    "red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink", "orange", "purple", "silver",
)  # fmt: skip
THINGS = (
    "car", "house", "door", "hat", "boat", "chair", "cup", "coat",
    "bag", "bird", "ball", "lamp", "shirt", "box", "bike", "book",
)  # fmt: skip
FORM = "The {thing} is {right}. Is the {thing} {options}?\nAnswer: {right} ("
BY_TEXT = (
    "The dog is small. What is the dog? small\nThe soup is cold. What is the soup? cold\n"
    "The {thing} is {right}. What is the {thing}?"
)


@dataclass(frozen=True)
class Choice:
    """Prompts [B, N], the right letters [B], the letters of all choices [B, 4], the number of the right one [B].

    labels   where letters stand     to_text   from a letter to its text, in tokens
    texts    prompts that ask for the text by itself, with the right texts [B]
    """

    ids: Tensor
    right: Tensor
    letters: Tensor
    place: Tensor
    labels: tuple[int, ...] = LABELS
    to_text: int = 1
    texts: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        assert torch.equal(self.ids[:, list(self.labels)], self.letters), "labels stand elsewhere"

    @property
    def batch(self) -> Batch:
        return Batch(self.ids, torch.ones_like(self.ids))

    @property
    def wrong(self) -> Tensor:
        """[B, 3]"""
        return self.letters[self.letters != self.right[:, None]].view(len(self.ids), CHOICES - 1)


def knowledge(seed: int) -> Tensor:
    """[QUESTIONS] the number of the right text of each."""
    return torch.randperm(TEXTS, generator=generator(1000 + seed))[:QUESTIONS]


def choices(known: Tensor, count: int, g: torch.Generator, any_letters: bool) -> Choice:
    question = torch.randint(QUESTIONS, (count,), generator=g)
    right = known[question]
    drawn = torch.rand(count, TEXTS, generator=g).scatter(1, right[:, None], -1.0)
    options = drawn.argsort(1)[:, :CHOICES]  # the right one first
    order = torch.rand(count, CHOICES, generator=g).argsort(1)
    options, place = options.gather(1, order), order.argmin(1)
    letters = torch.rand(count, LETTERS, generator=g).argsort(1)[:, :CHOICES]
    letters = LETTER + (letters if any_letters else torch.arange(CHOICES).expand(count, -1))
    sign = lambda token: torch.full((count, 1), token)  # noqa: E731
    listed = torch.stack([letters, FIRST + options], 2).flatten(1)
    ids = torch.cat([sign(BEGIN), QUESTION + question[:, None], listed, sign(ANSWER)], 1)
    return Choice(
        ids, letters.gather(1, place[:, None])[:, 0], letters, place, texts=by_text(known, question)
    )


def lessons(known: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels: A-D, random letters, and questions for the text, half as many."""
    asked = [(c.ids, c.right) for c in (choices(known, BATCH, g, kind) for kind in (False, True))]
    asked.append(by_text(known, torch.randint(QUESTIONS, (BATCH // 2,), generator=g)))
    blank = [torch.full_like(ids, -100) for ids, _ in asked]
    for labels, (_, wanted) in zip(blank, asked, strict=True):
        labels[:, -1] = wanted
    return padded([(ids, labels) for (ids, _), labels in zip(asked, blank, strict=True)], pad=BEGIN)


def by_text(known: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts [B, 3] and their texts [B]."""
    sign = lambda token: torch.full_like(question, token)  # noqa: E731
    return torch.stack([sign(BEGIN), QUESTION + question, sign(TEXT)], 1), FIRST + known[question]


def colours(
    tokenizer: Any, count: int, g: torch.Generator, any_letters: bool, known: int = len(COLOURS)
) -> Choice:
    """The same for SmolLM2, of the first `known` colours: prompts of 29 tokens, each word and letter one token."""
    prompts, plain, right, places, letters = [], [], [], [], []
    for _ in range(count):
        thing = THINGS[int(torch.randint(len(THINGS), (1,), generator=g))]
        options = [COLOURS[i] for i in torch.randperm(known, generator=g)[:CHOICES].tolist()]
        place = int(torch.randint(CHOICES, (1,), generator=g))
        drawn = torch.randperm(LETTERS, generator=g)[:CHOICES].tolist() if any_letters else range(CHOICES)
        names = [chr(ord("A") + i) for i in drawn]
        listed = ", ".join(f"{text} ({name})" for text, name in zip(options, names, strict=True))
        said = {"thing": thing, "right": options[place], "options": listed}
        prompts.append(tokenizer.encode(FORM.format(**said)))
        plain.append(tokenizer.encode(BY_TEXT.format(**said)))
        right += tokenizer.encode(" " + options[place])
        places.append(place)
        letters.append(tokenizer.convert_tokens_to_ids(names))
    named, at = torch.tensor(letters), torch.tensor(places)
    ids, texts = torch.tensor(prompts), (torch.tensor(plain), torch.tensor(right))
    return Choice(ids, named.gather(1, at[:, None])[:, 0], named, at, (10, 14, 18, 22), -2, texts)
