"""From a prompt and its answer to pairs that can be patched: a corrupted prompt, and variations for intervals.

A prompt is corrupted, in this order, by what is given, by putting the foil where the target stands in it, or by giving
part of its tokens the places of others. One prompt is one pair, and says nothing of chance: so each is asked in several
variations, in which a tenth of the tokens that both prompts share were exchanged among themselves, the same in both.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regard.core import require
from regard.explaining.pairs import Metric, Pairs, batch_of, one_token

VARIED, CORRUPTED = 0.1, 0.3  # shares of tokens that are exchanged


@dataclass(frozen=True)
class Question:
    """A prompt, the answer that is explained, another one that was possible, and the prompt that does not have it.

    Prompts are texts, or tokens where a processor has made them.
    """

    prompt: str | Sequence[int]
    target: str | None = None
    foil: str | None = None
    corrupt: str | Sequence[int] | None = None


@dataclass(frozen=True)
class Asked:
    """Pairs of one or several questions, in tokens, and how they came about in words."""

    pairs: Pairs
    tokens: list[str]  # of the first prompt
    target: str
    foil: str | None
    corruption: str
    questions: int


def read_questions(path: Path, target: str | None, foil: str | None, corrupt: str | None) -> list[Question]:
    """A text file is one prompt; a .jsonl file has {"prompt", "target", "foil", "corrupt"} a line."""
    text = path.read_text(encoding="utf8")
    if path.suffix != ".jsonl":
        return [Question(text.rstrip("\n"), target, foil, corrupt)]
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    require(len(rows) > 0, "a file of prompts has a line", file=str(path))
    unknown = sorted({key for row in rows for key in row} - {*Question.__dataclass_fields__})
    require(not unknown, "a line has prompt, target, foil, corrupt", unknown=unknown)
    given = {"target": target, "foil": foil, "corrupt": corrupt}
    return [Question(**{**{k: v for k, v in given.items() if v is not None}, **row}) for row in rows]


def asked(
    tokenizer: Any, questions: Sequence[Question], *, variations: int = 8, seed: int = 0, chat: bool = False,
    metric: Metric | None = None, by_image: bool = False, swap: bool = True,
) -> Asked:  # fmt: skip
    """The pairs of these questions, each in so many variations. Raises ValueError as `make_pairs` does.

    by_image   the two prompts differ by their images: where no corrupted text is given the text is the same
    swap       whether the foil may take the place of the target where it stands in the prompt
    """
    require(len(questions) > 0 and variations >= 1, "a question, a variation", variations=variations)
    clean, corrupt, targets, foils, how = [], [], [], [], []
    g = torch.Generator().manual_seed(seed)
    for q in questions:
        ids = ids_of(tokenizer, q.prompt, chat)
        same = by_image and q.corrupt is None
        other, said = (ids, "the other image") if same else corrupted(tokenizer, q, ids, chat, swap)
        how.append(said)
        for i in range(variations):
            one = resampled(ids, g) if other is None else other
            both = (ids, one) if i == 0 else varied(ids, one, g)
            clean.append(both[0])
            corrupt.append(both[1])
            targets.append(one_token(tokenizer, str(q.target)))
            foils.append(None if q.foil is None else one_token(tokenizer, q.foil, "the foil"))
    require(len({f is None for f in foils}) == 1, "all questions have a foil, or none", foils=foils[:4])
    pad = tokenizer.pad_token_id or 0
    foil = None if foils[0] is None else torch.tensor(foils)
    pairs = Pairs(batch_of(clean, pad), batch_of(corrupt, pad), torch.tensor(targets), foil, metric=metric)  # type: ignore[arg-type]
    first = questions[0]
    tokens = [tokenizer.decode([i]) for i in ids_of(tokenizer, first.prompt, chat)]
    words = how[0] if len({*how}) == 1 else f"{how[0]}; others likewise"
    if variations > 1:
        words += (
            f"; {variations} variations of each prompt: a tenth of the tokens that both share change places"
        )
    return Asked(pairs, tokens, str(first.target), first.foil, words, len(questions))


def ids_of(tokenizer: Any, text: str | Sequence[int], chat: bool) -> list[int]:
    if not isinstance(text, str):
        return [int(i) for i in text]
    if not chat:
        return list(tokenizer.encode(text))
    require(bool(getattr(tokenizer, "chat_template", None)), "a tokenizer with a chat template", chat=chat)
    turn = [{"role": "user", "content": text}]
    marked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(marked, add_special_tokens=False))


def corrupted(
    tokenizer: Any, q: Question, ids: list[int], chat: bool, swap: bool
) -> tuple[list[int] | None, str]:
    """The tokens of the corrupted prompt (None: exchanged anew for each variation), and what was done, in words."""
    if q.corrupt is not None:
        other = ids_of(tokenizer, q.corrupt, chat)
        rule = "clean and corrupted prompts are equally long in tokens"
        require(len(other) == len(ids), rule, clean=len(ids), corrupted=len(other))
        return other, f"the given prompt, of whose {len(ids)} tokens {changed(ids, other)} differ"
    if q.foil is not None and swap:
        target, foil = one_token(tokenizer, str(q.target)), one_token(tokenizer, q.foil, "the foil")
        swaps = {target: foil, **twin(tokenizer, str(q.target), q.foil)}
        other = [swaps.get(i, i) for i in ids]
        if other != ids:
            return (
                other,
                f"every {q.target!r} of the prompt became {q.foil!r} ({changed(ids, other)} of {len(ids)} tokens)",
            )
    return None, f"{CORRUPTED:.0%} of the tokens, drawn anew for each pair, change places"


def twin(tokenizer: Any, target: str, foil: str) -> dict[int, int]:
    """The same words with, or without, a space before them, where they are one token too."""
    other = [t.strip() if t != t.strip() else " " + t for t in (target, foil)]
    ids = [tokenizer.encode(t, add_special_tokens=False) for t in other]
    return {ids[0][0]: ids[1][0]} if all(len(i) == 1 for i in ids) else {}


def changed(a: list[int], b: list[int]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def resampled(ids: list[int], g: torch.Generator) -> list[int]:
    """Part of the tokens between the first and the last change places."""
    return exchanged(ids, list(range(1, len(ids) - 1)), CORRUPTED, g)


def varied(clean: list[int], corrupt: list[int], g: torch.Generator) -> tuple[list[int], list[int]]:
    """Both prompts with the same exchange among the tokens that they share, but for the first and the last two."""
    shared = [i for i in range(1, len(clean) - 2) if clean[i] == corrupt[i]]
    at = order_of(shared, VARIED, g)
    return tuple([x[at.get(i, i)] for i in range(len(x))] for x in (clean, corrupt))  # type: ignore[return-value]


def exchanged(ids: list[int], places: list[int], share: float, g: torch.Generator) -> list[int]:
    at = order_of(places, share, g)
    return [ids[at.get(i, i)] for i in range(len(ids))]


def order_of(places: list[int], share: float, g: torch.Generator) -> dict[int, int]:
    """Place -> the place whose token it gets: a turn of a share of them, two or more."""
    count = max(2, round(share * len(places)))
    if len(places) < 2:
        return {}
    chosen = [places[i] for i in torch.randperm(len(places), generator=g)[:count].tolist()]
    return dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))
