"""Checks that every task page must pass; yours too: `check_task(Method(name, METHOD, Config()))`."""

from itertools import pairwise
from typing import Any

import torch

from regard import catalog
from regard.core import Method
from regard.kinds.task import TaskPage
from regard.tasks import Sample
from regard.tasks.base import contains, said
from regard.testing.task_places import check_places, check_windows
from regard.testing.task_scores import check_picture_scores, check_pictures, check_scores
from regard.testing.tokenizers import ChatTokenizer, WordTokenizer, samples

__all__ = ["ChatTokenizer", "WordTokenizer", "check_task", "check_task_page", "samples"]

LENGTHS = (256, 300, 1024)


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
    asked = (check_samples, check_seed, check_evidence, check_context, check_chat, check_first_token, check_places,
             check_windows, check_scores)  # fmt: skip
    of_pictures = ((law, "pictures") for law in (check_pictures, check_picture_scores))
    for law, part in (*((law, "samples") for law in asked), (check_generate, "generate"), *of_pictures):
        name = law.__name__.removeprefix("check_")
        if getattr(page, part) is None:
            report[name] = f"not applicable: it gives no {part}"
            continue
        reason = law(method)
        report[name] = f"not applicable: {reason}" if reason else "held"
    return report


def check_samples(method: Method) -> None:
    """As many as asked, prompts of exactly the asked length, all of one shape, depths and chances in [0, 1].

    Also where words differ in their number of tokens.
    """
    for length, letters in (*((length, None) for length in LENGTHS), (1024, 5)):
        drawn = samples(method, length, 5, 0, WordTokenizer(letters=letters))
        assert len(drawn) == 5, f"{method.label}: {len(drawn)} samples, 5 asked"
        sizes = {len(s.prompt) for s in drawn}
        assert sizes == {length}, f"{method.label}: prompts of {sizes} tokens, {length} asked"
        assert len({len(s.answer) for s in drawn}) == 1 and drawn[0].answer, (
            f"{method.label}: answers of one length"
        )
        assert len({s.shape for s in drawn}) == 1, f"{method.label}: questions and turns of one shape"
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
    """What is answered stands in the facts of its turn and nowhere else; a task without facts says so of every sample.

    Facts lie within the evidence and do not overlap. Wanted texts are looked for as they are scored: as texts, whatever
    the case of their letters; answers that are generated exactly as tokens.
    """
    tokenizer = WordTokenizer()
    drawn = samples(method, 512, 9, 3, tokenizer)
    known = [bool(sample.needed) for sample in drawn]
    if not any(known):
        return "its answers stand nowhere in the prompt"
    assert all(known), f"{method.label}: {known.count(False)} of {len(known)} samples have no evidence"
    for sample in drawn:
        hold_evidence(method.label, sample, tokenizer)
    return None


def hold_evidence(label: str, sample: Sample, tokenizer: Any) -> None:
    spans = sorted(sample.needed)
    assert all(0 <= first < past <= len(sample.prompt) for first, past in spans), (
        f"{label}: facts in the prompt"
    )
    assert all(a[1] <= b[0] for a, b in pairwise(spans)), f"{label}: two facts overlap"
    if sample.wanted:
        return hold_wanted(label, sample, tokenizer)
    if sample.turns:
        assert len(sample.facts) == len(sample.answers), f"{label}: a fact for each turn"
    for answer, (first, past) in zip(sample.answers, sample.needed, strict=True):
        assert contains(sample.prompt[first:past], answer), f"{label}: the answer is not in the evidence"
        outside = sample.prompt[:first], sample.prompt[past:], *(turn.question for turn in sample.turns)
        assert not any(contains(part, answer) for part in outside), f"{label}: the answer stands elsewhere"
    return None


def hold_wanted(label: str, sample: Sample, tokenizer: Any) -> None:
    first, past = sample.evidence
    assert (first, past) == (min(sample.needed)[0], max(sample.needed)[1]), (
        f"{label}: the evidence spans the facts"
    )
    facts = [said(tokenizer, sample.prompt[slice(*span)]) for span in sample.needed]
    rest, last = [], 0
    for start, end in sorted(sample.needed):
        rest.append(said(tokenizer, sample.prompt[last:start]))
        last = end
    rest.append(said(tokenizer, sample.prompt[last:]))
    for text in (wanted.strip().lower() for wanted in sample.wanted):
        assert any(text in fact for fact in facts), f"{label}: {text!r} is not in the evidence"
        assert not any(text in part for part in rest), f"{label}: {text!r} stands elsewhere"
    assert len(set(sample.wanted)) == len(sample.wanted), f"{label}: a text is wanted twice"


def check_context(method: Method) -> str | None:
    """What is read before the question holds every fact whole, and nothing of a question."""
    tokenizer = WordTokenizer()
    drawn = samples(method, 512, 9, 3, tokenizer)
    if not any(sample.context or sample.written for sample in drawn):
        return "context and question are read together"
    for sample in drawn:
        written = len(sample.prompt) - 1 if not sample.context else sample.context + sample.written
        cuts = {sample.context or written - sample.written, written}
        for first, past in sample.needed:
            assert past <= written, f"{method.label}: a fact stands after the context"
            assert not any(first < cut < past for cut in cuts), f"{method.label}: the cut splits a fact"
        before = tokenizer.decode(sample.prompt[:written])
        for line in questions(sample, written, tokenizer):
            assert line not in before, f"{method.label}: the context holds the question {line!r}"
    return None


def questions(sample: Sample, start: int, tokenizer: Any) -> list[str]:
    """The lines of all questions, those of at least three words."""
    texts = [sample.prompt[start:], *(turn.question for turn in sample.turns)]
    lines = [line.strip() for ids in texts for line in tokenizer.decode(ids).splitlines()]
    return [line for line in lines if len(line.split()) >= 3]


def check_chat(method: Method) -> str | None:
    """In a chat, prompt and turns are one conversation: the template's marks around each message, its start once."""
    tokenizer = ChatTokenizer()
    plain, drawn = (samples(method, 512, 5, 3, tokenizer, chat) for chat in (False, True))
    if plain == drawn:
        return "it is no conversation"
    assert len({s.shape for s in drawn}) == 1, f"{method.label}: prompts and turns of one shape in a chat"
    for sample in drawn:
        assert len(sample.prompt) == 512, f"{method.label}: a prompt of {len(sample.prompt)} tokens in a chat"
        hold_conversation(method.label, sample, tokenizer)
        if sample.needed:
            hold_evidence(method.label, sample, tokenizer)
    return None


def hold_conversation(label: str, sample: Sample, tokenizer: ChatTokenizer) -> None:
    """The whole, up to the last answer, is what the template makes of messages that take turns."""
    turns = zip(sample.answers, sample.turns, strict=False)
    whole = tokenizer.decode(sample.prompt + [i for answer, turn in turns for i in (*answer, *turn.question)])
    assert whole.startswith(tokenizer.SYSTEM), f"{label}: a chat begins as the template does"
    *messages, reply = whole.removeprefix(tokenizer.SYSTEM).split(tokenizer.END)
    # what the model wrote is a message of its own, before the question
    asked = len(sample.turns) + 1 + bool(sample.written)
    roles = ["<user>", "<assistant>"] * asked
    assert len(messages) == 2 * asked - 1, f"{label}: {len(messages)} messages end, not {2 * asked - 1}"
    for role, message in zip(roles, [*messages, reply], strict=True):
        assert message.startswith(role), f"{label}: a message of {role} begins {message[:20]!r}"
        assert not any(r in message.removeprefix(role) for r in roles), f"{label}: marks within {message!r}"
    assert whole.count("<s>") == whole.count("<system>") == 1, f"{label}: the chat's start is said again"


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
