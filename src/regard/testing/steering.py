"""Checks that every steering page must pass: neutral is nothing, a text is steered as if it were alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.attaching import pictures
from regard.attaching.attachment import attach
from regard.core import Method
from regard.kinds.steering import SteeringPage
from regard.testing.pictures import alone, batch, families_of, said
from regard.testing.twice import check_twice


def two_documents(ids: Tensor) -> Tensor:
    """[B, N]: of each prompt's tokens 3 to 5 are document 0 and 6 to 8 document 1."""
    place = (ids != 0).cumsum(1) - 1
    inside = (ids != 0) & (place >= 3) & (place < 9) & (ids.shape[1] > 1)
    return torch.where(inside, (place - 3) // 3, -1)


ROLES = {"context": lambda ids: (ids > 20) & (ids < 60), "document": two_documents}


class Words:
    """A tokenizer for methods with texts of their own: every word is a number."""

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [4 + sum(map(ord, word)) % 90 for word in text.split()]}


def check_steering_page(name: str) -> dict[str, str]:
    """The laws of its kind on a page of the catalogue."""
    page = catalog.get(name)
    assert isinstance(page, SteeringPage), f"{name}: a steering page is a SteeringPage"
    laws = [check_twice]
    if page.search is not None:
        laws += [check_search]
    elif page.acts_on_models:
        laws += [check_neutral, check_acts, check_alone, check_sampling, check_bfloat16]
    with short_answers():
        return {law.__name__.removeprefix("check_"): law(name, page) for law in laws}


@contextmanager
def short_answers(tokens: int = 3) -> Iterator[None]:
    """What a page asks of its own about a picture is answered in so many tokens, which random models never end."""
    before, pictures.LONGEST = pictures.LONGEST, tokens
    try:
        yield
    finally:
        pictures.LONGEST = before


def settings_of(page: SteeringPage) -> dict[str, Any]:
    """Its test settings, or its own."""
    return dict(page.test_settings[0]) if page.test_settings else {}


def configured(name: str, page: SteeringPage, **changed: Any) -> Method:
    return Method(name, page, page.config(**{**settings_of(page), **changed}))


def steered(method: Method, model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    with torch.no_grad(), attach(model, method, roles=ROLES, tokenizer=Words()):
        return said(model, dict(inputs), **settings)


def reached(name: str, method: Method) -> list[str]:
    """The families on which it acts; those that it refuses by name are left out."""
    return families_of(name, method.label, lambda model, inputs: steered(method, model, inputs, steps=1))


def check_neutral(name: str, page: SteeringPage) -> str:
    """Its neutral setting leaves every logit as it is, to the last bit."""
    assert page.card.neutral, f"{name}: the card says under which setting nothing changes"
    method = configured(name, page, **page.card.neutral)
    families = reached(name, method)
    for family in families:
        model, inputs = batch(family)
        with torch.no_grad():
            plain = said(model, inputs)
        logits = steered(method, model, inputs)
        assert torch.equal(logits, plain), (
            f"{name} on {family}: neutral moves logits by {(logits - plain).abs().max():.1e}"
        )
    return ", ".join(families)


def check_acts(name: str, page: SteeringPage) -> str:
    """Under its test settings the logits change, the same way twice, and nothing stays behind."""
    method, moved = configured(name, page), []
    for family in reached(name, method)[::2]:
        model, inputs = batch(family)
        with torch.no_grad():
            plain = said(model, inputs)
        first, again = (steered(method, model, inputs) for _ in "12")
        assert torch.equal(first, again), f"{name} on {family}: asked twice it says something else"
        assert not first.isnan().any(), f"{name} on {family}: logits that are no numbers"
        with torch.no_grad():
            after = said(model, inputs)
        assert torch.equal(plain, after), f"{name} on {family}: something stays behind"
        if not torch.equal(plain, first):
            moved.append(family)
    assert moved, f"{name} changes nothing under its test settings"
    return "changes " + ", ".join(moved)


def check_alone(name: str, page: SteeringPage) -> str:
    """A text of a padded batch is steered as it is alone."""
    method = configured(name, page)
    for family in reached(name, method)[:2]:
        model, inputs = batch(family)
        both = steered(method, model, inputs)
        for text in (0, 1):
            one = steered(method, model, alone(inputs, text))
            gap = apart(one[0], both[text])
            assert gap <= 1e-3, (
                f"{name} on {family}: text {text} of a batch is {gap:.1e} off what it is alone"
            )
    return "held"


def check_sampling(name: str, page: SteeringPage) -> str:
    """Sampling from a seed, and beams, run under it."""
    method = configured(name, page)
    family = reached(name, method)[0]
    model, inputs = batch(family)
    found = []
    for _ in range(2):
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            attach(model, method, roles=ROLES, tokenizer=Words()),
        ):
            torch.manual_seed(0)
            found.append(
                model.generate(**inputs, max_new_tokens=4, do_sample=True, pad_token_id=0, eos_token_id=2)
            )
    assert torch.equal(*found), f"{name} on {family}: the same seed samples something else"
    with torch.no_grad(), attach(model, method, roles=ROLES, tokenizer=Words()):
        model.generate(
            **inputs, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0, eos_token_id=2
        )
    return "held"


def check_search(name: str, page: SteeringPage) -> str:
    """At its neutral setting a search is transformers' beam search; a text of a batch is found as it is alone."""
    neutral, method = configured(name, page, **page.card.neutral), configured(name, page)
    how: dict[str, Any] = dict(max_new_tokens=7, pad_token_id=0, eos_token_id=2)
    moved = False
    for family in ("llava", "gemma3mm", "smolvlm"):
        model, inputs = batch(family)
        with torch.no_grad(), attach(model, method):
            both = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
        for text in (0, 1):
            one, found = alone(inputs, text), []
            with torch.no_grad():
                plain = model.generate(**one, **how, num_beams=neutral.config.beams, do_sample=False)
            for each in (neutral, method):
                with torch.no_grad(), attach(model, each):
                    found.append(model.generate(**one, **how))
            assert torch.equal(found[0], plain), f"{name} on {family}: neutral is not plain beam search"
            own = found[1][0, one["input_ids"].shape[1] :]
            assert torch.equal(own, both[text, : len(own)]), (
                f"{name} on {family}: a text of a batch is found otherwise"
            )
            moved = moved or not torch.equal(found[0], found[1])
    assert moved, f"{name} finds what beam search finds under its test settings"
    return "held"


def check_bfloat16(name: str, page: SteeringPage) -> str:
    """It runs in bfloat16."""
    method = configured(name, page)
    family = reached(name, method)[0]
    model, inputs = batch(family)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    logits = steered(method, deepcopy(model).to(torch.bfloat16), inputs)
    assert not logits.isnan().any(), f"{name} on {family} in bfloat16: logits that are no numbers"
    return "held"


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; where both are -inf there is none."""
    gap = torch.where(a == b, torch.zeros_like(a), (a - b).abs())
    return gap.max().item()
