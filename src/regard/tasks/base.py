"""What tasks are made of: samples, the frame of a prompt, filler.

Every prompt of one call has exactly the asked number of tokens and every answer the same number, so that
samples are batched without padding. A tokenizer is passed in; anything with the manners of Hugging Face's
will do.
"""

import random
from dataclasses import dataclass

from regard.core import require
from regard.tasks.corpus import Source, encode


@dataclass(frozen=True)
class Turn:
    """A question that is asked after the answer before it, in the same conversation, and its answer."""

    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Sample:
    """One question, or several in turn.

    prompt: ids; begins with the tokenizer's first token if it has one; the question is at the end
    answer: ids that a right model generates next, or, for perplexity, the continuation that is scored;
        where `wanted` says what is looked for, only its length counts: so many tokens are generated
    evidence: first and past-the-last position of the needed fact in the prompt; (0, 0) if there is none
    depth: place of the evidence, 0 start .. 1 end
    chance: how often a guess is right, such as any of the values that the page holds; below it a score says nothing
    context: the first tokens of the prompt, read (and compressed) before anything of the rest is known;
        0: all but the last token of the prompt, less those that are `written`
    written: the tokens of the prompt after the context that are fed one at a time, as if the model had written them
    turns: further questions; a method meets them with what it has kept
    wanted: texts looked for in what the model generates freely, for the metric "recall"
    """

    prompt: list[int]
    answer: list[int]
    evidence: tuple[int, int]
    depth: float = 0.0
    chance: float = 0.0
    context: int = 0
    written: int = 0
    turns: tuple[Turn, ...] = ()
    wanted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        room = len(self.prompt) - 1
        require(
            0 <= self.context <= room and 0 <= self.written <= room - self.context,
            "context + written <= tokens of the prompt - 1",
            context=self.context,
            written=self.written,
            prompt=len(self.prompt),
        )
        require(
            not (self.wanted and self.turns), "what is generated freely has no turns", turns=len(self.turns)
        )

    @property
    def answers(self) -> list[list[int]]:
        """The answer of each turn."""
        return [self.answer, *(turn.answer for turn in self.turns)]

    @property
    def shape(self) -> tuple:
        """The sizes that samples of one batch share."""
        turns = tuple((len(turn.question), len(turn.answer)) for turn in self.turns)
        return len(self.prompt), len(self.answer), self.context, self.written, turns


@dataclass(frozen=True)
class Frame:
    """What stands before and after the text of a prompt: the first token, a chat's marks, the question."""

    head: list[int]
    tail: list[int]

    @classmethod
    def of(cls, tokenizer, question: list[int], prefix: str = "", chat: bool = False) -> "Frame":
        """`prefix` begins the reply of a chat model, so that its answer is the same tokens as anyone's."""
        if not chat:
            return cls(first_token(tokenizer), question)
        require(bool(getattr(tokenizer, "chat_template", None)), "chat=True needs a chat template", chat=chat)
        mark = "<-the-text->"
        messages = [{"role": "user", "content": mark}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        require(whole.count(mark) == 1, "the chat template says the message once", times=whole.count(mark))
        before, after = whole.split(mark)
        return cls(encode(tokenizer, before), question + encode(tokenizer, after + prefix))

    def room(self, length: int, taken: int) -> int:
        """How many tokens of filler a prompt of `length` has room for beside `taken` tokens of facts."""
        needed = len(self.head) + len(self.tail) + taken
        require(length >= needed, "length >= the tokens of facts and question", length=length, needed=needed)
        return length - needed

    def around(self, body: list[int]) -> list[int]:
        return self.head + body + self.tail


def first_token(tokenizer) -> list[int]:
    first = getattr(tokenizer, "bos_token_id", None)
    return [] if first is None else [first]


def continuation(tokenizer, before: str, text: str) -> list[int]:
    """The ids of `text` where it follows `before`."""
    start, whole = encode(tokenizer, before), encode(tokenizer, before + text)
    same = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
    return whole[same:]


def contains(ids: list[int], piece: list[int]) -> bool:
    return any(ids[i : i + len(piece)] == piece for i in range(len(ids) - len(piece) + 1))


def fill(tokenizer, source: Source, rng: random.Random, room: int, without: list[int]) -> list[int]:
    """`room` tokens of running text in which the answer does not occur."""
    for _ in range(100):
        text = source.take(tokenizer, room, rng)
        if not contains(text, without):
            return text
    raise ValueError(f"filler without the answer {without}: not found in 100 draws from {source.name}")


def even(samples: list[Sample]) -> list[Sample]:
    """The same samples, if prompts, questions and answers are batched without padding."""
    sizes = {sample.shape for sample in samples}
    require(len(sizes) <= 1, "prompts and answers of one call are equally long in tokens", sizes=sizes)
    return samples
