"""What tasks are made of: samples, the frame of a prompt or of a conversation, filler.

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
    facts: first and past-the-last position of each needed fact, where these are several; with `turns`, the
        fact of each turn, in the order of the turns
    counted: the first tokens of `answer` that are the answer, where the rest only fills it up; 0: all
    choices: first tokens of several answers: right is the one that begins with the likeliest of them
    pattern: a regular expression that is looked for in what the model generates freely
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
    facts: tuple[tuple[int, int], ...] = ()
    counted: int = 0
    choices: tuple[int, ...] = ()
    pattern: str = ""

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
            not (self.free and self.turns), "what is generated freely has no turns", turns=len(self.turns)
        )
        require(
            0 <= self.counted <= len(self.answer), "counted <= tokens of the answer", counted=self.counted
        )

    @property
    def free(self) -> bool:
        """Whether the model is fed what it generates."""
        return bool(self.wanted or self.pattern)

    @property
    def answers(self) -> list[list[int]]:
        """The answer of each turn."""
        return [self.answer, *(turn.answer for turn in self.turns)]

    @property
    def needed(self) -> tuple[tuple[int, int], ...]:
        """First and past-the-last position of all that the answers need; none where no fact is asked for."""
        return self.facts or ((self.evidence,) if self.evidence[1] else ())

    @property
    def shape(self) -> tuple:
        """The sizes that samples of one batch share."""
        turns = tuple((len(turn.question), len(turn.answer)) for turn in self.turns)
        return len(self.prompt), len(self.answer), self.context, self.written, turns, self.free


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
        before, after = chat_marks(tokenizer, 1)
        return cls(encode(tokenizer, before), question + encode(tokenizer, after + prefix))

    @classmethod
    def freely(cls, tokenizer, question: str, reply: str, chat: bool = False) -> "Frame":
        """Of a question whose answer is generated freely; `reply` begins it, in a chat as the model's own words."""
        asked = question if chat else f"{question}\nAnswer: {reply}"
        return cls.of(tokenizer, encode(tokenizer, asked), reply, chat)

    def room(self, length: int, taken: int) -> int:
        """How many tokens of filler a prompt of `length` has room for beside `taken` tokens of facts."""
        needed = len(self.head) + len(self.tail) + taken
        require(length >= needed, "length >= the tokens of facts and question", length=length, needed=needed)
        return length - needed

    def around(self, body: list[int]) -> list[int]:
        return self.head + body + self.tail


def chat_marks(tokenizer, messages: int) -> list[str]:
    """What a chat template writes before, between and after so many messages, the user's and the model's in turn.

    The last is the user's, and what begins the model's reply follows it. A system prompt that the template brings
    stands before the first message; it is not said again in later turns, as it would be if each were a
    conversation of its own.
    """
    known = bool(getattr(tokenizer, "chat_template", None))
    require(known, "chat=True needs a tokenizer with a chat template", chat_template=None)
    conversation = [
        {"role": ("user", "assistant")[i % 2], "content": f"<-text-{i}->"} for i in range(messages)
    ]
    rest, marks = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True), []
    for message in conversation:
        times = rest.count(message["content"])
        require(times == 1, "the chat template says each message once, in order", times=times)
        mark, rest = rest.split(message["content"])
        marks.append(mark)
    return [*marks, rest]


def next_question(tokenizer, question: str, reply: str, chat: bool, stop: str = "") -> list[int]:
    """What stands between an answer and the next: the end of the model's message, the question, what begins a reply.

    `stop` ends the model's sentence; question and reply are as in `Frame.freely`.
    """
    if not chat:
        return encode(tokenizer, f"{stop}{question}\nAnswer: {reply}")
    _, _, between, after = chat_marks(tokenizer, 3)
    return encode(tokenizer, stop + between) + encode(tokenizer, question) + encode(tokenizer, after + reply)


def first_token(tokenizer) -> list[int]:
    first = getattr(tokenizer, "bos_token_id", None)
    return [] if first is None else [first]


def continuation(tokenizer, before: str, text: str) -> list[int]:
    """The ids of `text` where it follows `before`."""
    start, whole = encode(tokenizer, before), encode(tokenizer, before + text)
    same = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
    return whole[same:]


def check_writes(tokenizer, text: str) -> None:
    """ValueError where a tokenizer has no tokens for a text, such as one without digits: nobody could answer it."""
    read = said(tokenizer, encode(tokenizer, f" {text}"))
    require(text.lower() in read, "the tokenizer writes the answer", answer=text, read=read)


def contains(ids: list[int], piece: list[int]) -> bool:
    return any(ids[i : i + len(piece)] == piece for i in range(len(ids) - len(piece) + 1))


def fill(tokenizer, source: Source, rng: random.Random, room: int, without: list[int]) -> list[int]:
    """`room` tokens of running text in which the answer does not occur."""
    for _ in range(100):
        text = source.take(tokenizer, room, rng)
        if not contains(text, without):
            return text
    raise ValueError(f"filler without the answer {without}: not found in 100 draws from {source.name}")


def said(tokenizer, ids: list[int]) -> str:
    """Tokens as a reader of texts sees them, whatever the case of letters."""
    return tokenizer.decode(ids).lower()


def fill_around(
    tokenizer, source: Source, rng: random.Random, room: int, wanted: tuple[str, ...]
) -> list[int]:
    """`room` tokens of running text in which none of the wanted texts occurs."""
    for _ in range(100):
        ids = source.take(tokenizer, room, rng)
        text = said(tokenizer, ids)
        if not any(w.lower() in text for w in wanted):
            return ids
    raise ValueError(f"filler without {', '.join(wanted)}: not found in 100 draws from {source.name}")


def even(samples: list[Sample]) -> list[Sample]:
    """The same samples, if prompts, questions and answers are batched without padding."""
    sizes = {sample.shape for sample in samples}
    require(len(sizes) <= 1, "prompts and answers of one call are equally long in tokens", sizes=sizes)
    return samples
