"""Checks that every task page must pass; yours too: `check_task(Method(name, METHOD, Config()))`."""

import re
from typing import Any

import torch

from regard import catalog
from regard.core import Method
from regard.kinds.task import TaskPage, ask
from regard.tasks.base import contains

LENGTHS = (256, 300, 1024)


class WordTokenizer:
    """A tokenizer with one id for each word, digit and sign, given out as they come; id 0 begins every text."""

    chat_template = None

    def __init__(self, bos: int | None = 0, spare: int = 200) -> None:
        self.bos_token_id, self.pieces, self.known, self.spare = bos, ["<s>"], {"<s>": 0}, spare
        self.all_special_ids = [0]

    def __len__(self) -> int:
        return len(self.pieces) + self.spare

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        for piece in re.findall(r"<s>|\d| ?[^\W\d]+|\s|.", text):
            if piece not in self.known:
                self.known[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.known[piece])
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def check_task_page(name: str) -> dict[str, str]:
    """The laws of its kind on a page of the catalogue, with its default and its test settings."""
    page = catalog.get(name)
    report: dict[str, str] = {}
    for settings in ({}, *page.test_settings):
        report |= check_task(Method(name, page, page.configure(**settings)))
    return report


def check_task(method: Method) -> dict[str, str]:
    """Every law that the task can be asked: "held" or "not applicable: reason". Raises AssertionError."""
    page: TaskPage = method.page
    report = {}
    for law, part in ((check_samples, "samples"), (check_seed, "samples"), (check_evidence, "samples"),
                      (check_first_token, "samples"), (check_generate, "generate")):  # fmt: skip
        name = law.__name__.removeprefix("check_")
        if getattr(page, part) is None:
            report[name] = f"not applicable: it gives no {part}"
            continue
        reason = law(method)
        report[name] = f"not applicable: {reason}" if reason else "held"
    return report


def samples(method: Method, length: int, count: int, seed: int, tokenizer: Any = None) -> list:
    return ask(method).samples(tokenizer or WordTokenizer(), length, count, seed)


def check_samples(method: Method) -> None:
    """As many as asked, prompts of exactly the asked length, answers of one length, depths and chances in [0, 1]."""
    for length in LENGTHS:
        drawn = samples(method, length, 5, 0)
        assert len(drawn) == 5, f"{method.label}: {len(drawn)} samples, 5 asked"
        sizes = {len(s.prompt) for s in drawn}
        assert sizes == {length}, f"{method.label}: prompts of {sizes} tokens, {length} asked"
        assert len({len(s.answer) for s in drawn}) == 1 and drawn[0].answer, (
            f"{method.label}: answers of one length"
        )
        assert all(0 <= s.depth <= 1 for s in drawn), f"{method.label}: depths lie in [0, 1]"
        assert all(0 <= s.chance < 1 for s in drawn), f"{method.label}: what guessing gives lies in [0, 1)"


def check_seed(method: Method) -> None:
    """A seed fixes the samples, another seed gives others."""
    first, again, other = (samples(method, 256, 4, seed) for seed in (7, 7, 8))
    assert first == again, f"{method.label}: one seed gives two sets of samples"
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True)), (
        f"{method.label}: the seed is not used"
    )


def check_evidence(method: Method) -> str | None:
    """The answer stands in the evidence and nowhere else; a task without one says (0, 0), of every sample."""
    drawn = samples(method, 512, 9, 3)
    known = [sample.evidence != (0, 0) for sample in drawn]
    if not any(known):
        return "its answers stand nowhere in the prompt"
    assert all(known), f"{method.label}: {known.count(False)} of {len(known)} samples have no evidence"
    for sample in drawn:
        first, past = sample.evidence
        assert contains(sample.prompt[first:past], sample.answer), (
            f"{method.label}: the answer is not in the evidence"
        )
        outside = sample.prompt[:first], sample.prompt[past:]
        assert not any(contains(part, sample.answer) for part in outside), (
            f"{method.label}: the answer stands elsewhere"
        )
    return None


def check_first_token(method: Method) -> None:
    """A prompt begins with the tokenizer's first token, once, and without one where there is none."""
    for bos, times in ((0, 1), (None, 0)):
        for sample in samples(method, 256, 3, 0, WordTokenizer(bos)):
            assert sample.prompt.count(0) == times, (
                f"{method.label}: {sample.prompt.count(0)} first tokens, not {times}"
            )


def check_generate(method: Method) -> None:
    """Inputs and labels of one shape, some labels scored, the same for the same seed."""
    inputs, labels = method.page.generate(method.config, 4, 0)
    assert inputs.shape == labels.shape and inputs.shape[0] == 4, (
        f"{method.label}: [4, length] inputs and labels"
    )
    assert not inputs.is_floating_point() and not labels.is_floating_point(), (
        f"{method.label}: ids are whole numbers"
    )
    assert bool((labels != -100).any(1).all()), f"{method.label}: a row without a label"
    again, other = (method.page.generate(method.config, 4, seed)[0] for seed in (0, 1))
    assert torch.equal(inputs, again), f"{method.label}: one seed gives two sets of inputs"
    assert not torch.equal(inputs, other), f"{method.label}: the seed is not used"
