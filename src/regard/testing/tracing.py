"""Checks that every tracing page must pass: observing changes nothing, and what it switches off is switched off."""

from dataclasses import dataclass

import torch

from regard import catalog
from regard.attaching.attachment import attach
from regard.core import Edit, Method, Observer
from regard.explaining.tracing import read_all, scored
from regard.kinds.tracing import TracingPage
from regard.testing.twice import check_twice
from regard.testing.zoo import build

FAMILIES = ("llama", "gemma3")


def check_tracing_page(name: str) -> dict[str, str]:
    """The laws of its kind on a page of the catalogue."""
    page = catalog.get(name)
    assert isinstance(page, TracingPage), f"{name}: a tracing page is a TracingPage"
    for part in ("measure", "reference", "cases"):
        assert callable(getattr(page, part)), f"{name}: a tracing page gives {part}"
    report = {}
    for law in (check_twice, check_observing, check_score, check_ablation):
        report[law.__name__.removeprefix("check_")] = law(name, page)
    return report


def check_observing(name: str, page: TracingPage) -> str:
    """Its observer sees every layer and leaves the model's logits as they are, to the last bit."""
    if page.observer is None:
        return "not applicable: it has no observer"
    observer = page.observer()
    assert isinstance(observer, Observer), (
        f"{name}: observer() gives an Observer, not {type(observer).__name__}"
    )
    for family in FAMILIES:
        model, inputs = build(family)
        with torch.no_grad():
            plain = model(**inputs).logits
            with attach(model, observer) as attached:
                seen = model(**inputs).logits
        assert torch.equal(plain, seen), (
            f"{name} on {family}: observing moves the logits by {(plain - seen).abs().max():.1e}"
        )
        layers = {record[0] for record in attached.records[observer.name]}
        assert layers == set(range(model.config.num_hidden_layers)), (
            f"{name} on {family}: it saw layers {layers}"
        )
    return "held"


@dataclass
class Question:
    """A prompt whose answer, two tokens, stands in it."""

    prompt: list[int]
    answer: list[int]
    evidence: tuple[int, int]


def check_score(name: str, page: TracingPage) -> str:
    """Asked through regard.trace it gives every head of every layer a finite score, the same for the same questions."""
    if page.score is None:
        return "not applicable: it scores nothing while a model answers"
    for family in FAMILIES:
        model, _ = build(family)
        g = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 100, (3, 12), generator=g).tolist()
        questions = [Question(prompt, prompt[4:6], (3, 8)) for prompt in prompts]
        first, again = (
            scored(model, read_all(model, [questions]), Method(name, page, page.config())) for _ in "12"
        )
        shape = (model.config.num_hidden_layers, model.config.num_attention_heads)
        assert tuple(first.scores.shape) == shape, f"{name}: scores {first.scores.shape}, not {shape}"
        assert bool(first.scores.isfinite().all()), f"{name} on {family}: a score that is not finite"
        assert torch.equal(first.scores, again.scores), f"{name}: asked twice it says something else"
    return "held"


def check_ablation(name: str, page: TracingPage) -> str:
    """Its edits name the heads they are given, change the logits, and no heads give no edits."""
    if page.ablate is None:
        return "not applicable: it switches nothing off"
    cfg = page.config()
    assert tuple(page.ablate([], cfg)) == (), f"{name}: no heads, and yet edits"
    for family in FAMILIES:
        model, inputs = build(family)
        edits = page.ablate([(0, 0), (1, 1)], cfg, "both")
        assert edits and all(isinstance(edit, Edit) for edit in edits), f"{name}: ablate gives edits"
        with torch.no_grad():
            plain = model(**inputs).logits
            with attach(model, list(edits)):
                without = model(**inputs).logits
        assert not torch.equal(plain, without), f"{name} on {family}: two heads off change nothing"
    return "held"
