"""Questions of one's own as samples: prompts as they are, facts at every depth of a text."""

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from regard.core import require
from regard.tasks.base import Frame, Sample, chat_marks, continuation, encode, even, fill, first_token
from regard.tasks.corpus import Source, held_out


def prompts(
    lines: Sequence[Any],
    cfg: Any,
    tokenizer: Any,
    length: int,
    count: int,
    seed: int,
    source: Source | None = None,
    *,
    chat: bool = False,
) -> list[Sample]:
    """The first `count` questions as they are; all answers padded to the longest, of which less is counted."""
    made = []
    for line in lines[:count]:
        before, ids = framed(line, tokenizer, chat)
        made.append((ids, *answered(line, tokenizer, before), line))
    longest = steps(lines, cfg, [answer for _, answer, _, _ in made])
    return [sample(ids, answer, choices, line, longest) for ids, answer, choices, line in made]


def needles(
    lines: Sequence[Any],
    cfg: Any,
    tokenizer: Any,
    length: int,
    count: int,
    seed: int,
    source: Source | None = None,
    *,
    chat: bool = False,
) -> list[Sample]:
    """`count` prompts of exactly `length` tokens, the lines in turn, the statement going down from first to last."""
    source = source or held_out()
    made = []
    for i, line in enumerate(islice(cycle(lines), count)):
        rng = random.Random(f"own needle {seed} {i}")
        asked = f"\n\n{line.question}" if chat else f"\n\n{line.question}\nAnswer:"
        after = chat_marks(tokenizer, 1)[1] if chat else asked
        answer, choices = answered(line, tokenizer, after)
        frame = Frame.of(tokenizer, encode(tokenizer, asked), "", chat)
        statement = encode(tokenizer, f" {line.statement}")
        room, depth = frame.room(length, len(statement)), i / max(1, count - 1)
        filler, cut = fill(tokenizer, source, rng, room, without=statement), round(depth * room)
        prompt = frame.around(filler[:cut] + statement + filler[cut:])
        first = len(frame.head) + cut
        made.append((prompt, answer, choices, line, (first, first + len(statement)), depth))
    longest = steps(lines, cfg, [answer for _, answer, *_ in made])
    return even([sample(p, a, c, line, longest, at, depth) for p, a, c, line, at, depth in made])


def framed(line: Any, tokenizer: Any, chat: bool) -> tuple[str, list[int]]:
    """What is said before the answer, as text and as ids."""
    if isinstance(line.asked, str) and not chat:
        return line.asked, first_token(tokenizer) + encode(tokenizer, line.asked)
    messages = [{"role": "user", "content": line.asked}] if isinstance(line.asked, str) else list(line.asked)
    known = bool(getattr(tokenizer, "chat_template", None))
    require(known, "messages need a tokenizer with a chat template", at=line.where, chat_template=None)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text, encode(tokenizer, text)


def answered(line: Any, tokenizer: Any, before: str) -> tuple[list[int], tuple[int, ...]]:
    """The answer's tokens after a text, and the first token of each choice."""
    if line.regex:
        return [], ()
    answer = continuation(tokenizer, before, spaced(before, line.answer))
    require(bool(answer), "the tokenizer has tokens for the answer", at=line.where, answer=line.answer)
    first = tuple(continuation(tokenizer, before, spaced(before, c))[0] for c in line.choices)
    rule = "choices begin with different tokens: the likeliest first token is the choice"
    require(len({*first}) == len(first), rule, at=line.where, choices=line.choices)
    return answer, first


def spaced(before: str, answer: str) -> str:
    """The answer with the space that it follows after, where there is none.

    >>> spaced("The capital is", "Paris"), spaced("assistant:\\n", "Paris")
    (' Paris', 'Paris')
    """
    return answer if not before or before[-1].isspace() or answer[0].isspace() else f" {answer}"


def steps(lines: Sequence[Any], cfg: Any, answers: Sequence[list[int]]) -> int:
    """Tokens that are generated for each question."""
    free = cfg.tokens if any(line.regex for line in lines) else 0
    return max(free, *(len(answer) for answer in answers), 1)


def sample(
    prompt: list[int],
    answer: list[int],
    choices: tuple[int, ...],
    line: Any,
    longest: int,
    evidence: tuple[int, int] = (0, 0),
    depth: float = 0.0,
) -> Sample:
    """A question whose answer is `longest` tokens, those after its own not counted."""
    last = answer[-1:] or prompt[-1:]
    return Sample(
        prompt, answer + last * (longest - len(answer)), evidence, depth,
        chance=1 / len(choices) if choices else 0.0, counted=len(answer), choices=choices, pattern=line.regex,
    )  # fmt: skip
