"""A task of one's own: a file of JSON lines, each a question and what a right answer is.

    {"prompt": "The capital of France is", "answer": "Paris"}           generated exactly, after a space
    {"messages": [{"role": "user", "content": "…"}], "regex": "42|forty"}   found in what is generated freely
    {"prompt": "… Answer:", "choices": ["yes", "no"], "answer": "no"}   the likeliest of the choices; or their number
    {"statement": "Ada plays the cello.", "question": "What does Ada play?", "answer": "The cello"}

Prompts are asked as they are, all of them, at lengths of their own. Lines of statement and question are needles: the
statement stands at every depth of running text in turn, in prompts of the asked length. A file has lines of one sort.
Other names in a line are notes, unless they look like one of these misspelt.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any

from regard.core import Card, require
from regard.core.errors import present
from regard.kinds.task import TaskPage
from regard.tasks.corpus import read_text
from regard.tasks.own_samples import needles, prompts

NAMES = ("prompt", "messages", "answer", "choices", "regex", "statement", "question")


@dataclass(frozen=True)
class Line:
    """A question of one's own: `asked` is a prompt or messages; or `statement` and `question`, a needle."""

    where: str  # "FILE, line N"
    asked: Any = None
    statement: str = ""
    question: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()
    regex: str = ""


@dataclass(frozen=True)
class Config:
    tokens: int = 64  # generated where a regex is looked for

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens >= 1", tokens=self.tokens)


def own_task(path: Path) -> TaskPage:
    """The page of a file of JSON lines; ValueError with the file, the line, the rule and what was found."""
    return made(path, path.stat().st_mtime_ns)


@cache
def made(path: Path, changed: int) -> TaskPage:
    """The page of a file as it was last changed."""
    lines = read_lines(path)
    needle = bool(lines[0].statement)
    odd = next((line.where for line in lines if bool(line.statement) != needle), None)
    rule = "a file has needles (statement, question) or prompts, not both"
    require(odd is None, rule, first=lines[0].where, other=odd)
    return TaskPage(
        config=Config,
        samples=partial(needles if needle else prompts, tuple(lines)),
        own=0 if needle else len(lines),
        patterns=("causal_self",),
        card=Card(
            title=f"{path.name}, {len(lines)} lines",
            paper="a task of one's own (JSON lines)",
            year=0,
            idea="a fact of one's own at every depth of a text" if needle else "questions of one's own",
            cost="none",
            state="what the questions need",
        ),
    )


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, empty ones left out."""
    texts = read_text(path).splitlines()
    lines = [line_of(f"{path}, line {at}", text) for at, text in enumerate(texts, start=1) if text.strip()]
    require(bool(lines), "a task's file holds at least one line of JSON", path=str(path), lines=0)
    return lines


def line_of(where: str, text: str) -> Line:
    """One question, checked."""
    try:
        held = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: a line is a JSON object: {error}") from None
    require(isinstance(held, dict), "a line is a JSON object", at=where, found=type(held).__name__)
    for name in set(held) - set(NAMES):
        meant = get_close_matches(name, NAMES, n=1, cutoff=0.75)
        require(not meant, "names of a line are spelt as they are known", at=where, found=name, near=meant)
    facts: dict[str, Any]
    if "statement" in held or "question" in held:
        facts = {name: text_of(held, name, where) for name in ("statement", "question")}
    else:
        both = "prompt" in held, "messages" in held
        rule = "a line has a prompt or messages, or a statement and a question"
        require(sum(both) == 1, rule, at=where, names=sorted(held))
        facts = {"asked": text_of(held, "prompt", where) if both[0] else messages_of(held["messages"], where)}
    return Line(where, **facts, **answer_of(held, where))


def text_of(held: Mapping, name: str, where: str) -> str:
    value = held.get(name)
    text = value if isinstance(value, str) and value.strip() else None
    return present(text, f"{name} is a text", at=where, **{name: value})


def messages_of(value: Any, where: str) -> tuple[dict, ...]:
    known = isinstance(value, list) and bool(value)
    known = known and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    require(known, "messages are a list of {role, content}", at=where, messages=value)
    rule = "the last message is not the assistant's: its answer is asked for"
    require(value[-1]["role"] != "assistant", rule, at=where, last=value[-1]["role"])
    return tuple(value)


def answer_of(held: Mapping, where: str) -> dict[str, Any]:
    """What a right answer is: a text, one of the choices, or a regex."""
    if "regex" in held:
        require("answer" not in held and "choices" not in held, "a line has a regex or an answer", at=where)
        regex = text_of(held, "regex", where)
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"{where}: regex {regex!r}: {error}") from None
        return {"regex": regex}
    if "choices" not in held:
        require("answer" in held, "a line has an answer, choices or a regex", at=where, names=sorted(held))
        return {"answer": text_of(held, "answer", where)}
    choices, answer = held["choices"], held.get("answer")
    known = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
    require(
        known and len({*choices}) == len(choices), "choices are texts, two or more", at=where, choices=choices
    )
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    require(
        answer in choices, "the answer is one of the choices, or its number from 0", at=where, answer=answer
    )
    return {"answer": answer, "choices": tuple(choices)}
