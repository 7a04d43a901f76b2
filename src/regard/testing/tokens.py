"""Checks that every tokens page must pass: removing is hiding, neutral is nothing, a text is reduced as if alone."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.reduction import Reduction
from regard.core import Method
from regard.kinds.tokens import TokensPage
from regard.testing.pictures import alone, batch, families_of, said, two_images
from regard.testing.twice import check_twice

NEAR = 1e-5
PLACES = {torch.float32: NEAR, torch.bfloat16: 6e-2}


def check_tokens_page(name: str) -> dict[str, str]:
    """The laws of its kind on a page of the catalogue."""
    page = catalog.get(name)
    assert isinstance(page, TokensPage), f"{name}: a tokens page is a TokensPage"
    assert page.before is not None or page.after is not None, f"{name}: a tokens page gives before or after"
    report = {}
    for law in (check_twice, check_neutral, check_removal, check_alone, check_images, check_bfloat16):
        report[law.__name__.removeprefix("check_")] = law(name, page)
    return report


def small(name: str, page: TokensPage) -> Method:
    """The page under its test settings, or its own."""
    settings = page.test_settings[0] if page.test_settings else {}
    return Method(name, page, page.config(**settings))


def answers(
    method: Method, model: Any, inputs: Mapping[str, Tensor], how: str, steps: int = 4
) -> tuple[Tensor, list]:
    """Logits of a few steps under a method, and how many visual tokens each layer saw."""
    reduction = Reduction(method, how)
    with torch.no_grad(), attach(model, reduction):
        logits = said(model, dict(inputs), steps)
    return logits, reduction.kept


def reached(name: str, method: Method) -> list[str]:
    """The families on which the page acts; those that it refuses by name are left out."""
    return families_of(name, method.label, lambda model, inputs: answers(method, model, inputs, "mask", 1))


def check_neutral(name: str, page: TokensPage) -> str:
    """Its neutral setting leaves every logit as it is, to the last bit, hidden or removed."""
    assert page.card.neutral, f"{name}: the card says under which setting nothing changes"
    method = Method(name, page, page.config(**{**vars(small(name, page).config), **page.card.neutral}))
    for family in reached(name, method):
        model, inputs = batch(family)
        with torch.no_grad():
            plain = said(model, inputs)
        for how in ("mask", "remove"):
            logits, kept = answers(method, model, inputs, how)
            whole = all(n == row[0] for row in kept for n in row)
            assert whole, f"{name} on {family}: neutral, and yet layers see {kept}"
            assert torch.equal(logits, plain), (
                f"{name} on {family}: neutral {how} moves logits by {(logits - plain).abs().max():.1e}"
            )
    return "held"


def check_removal(name: str, page: TokensPage) -> str:
    """Removed or hidden, the logits are the same: in a padded batch and over decode steps."""
    method, report = small(name, page), []
    for family in reached(name, method):
        model, inputs = batch(family)
        with torch.no_grad():
            plain = said(model, inputs)
        hidden, kept = answers(method, model, inputs, "mask")
        removed, same = answers(method, model, inputs, "remove")
        assert kept == same, f"{name} on {family}: {kept} are left hidden, {same} removed"
        gap = (hidden - removed).abs().max().item()
        assert gap <= NEAR, f"{name} on {family}: removal is {gap:.1e} off the mask"
        assert not torch.equal(plain, hidden), f"{name} on {family}: tokens went and nothing changed ({kept})"
        report.append(f"{family} {kept[0][-1]}")
    return "visual tokens at the last layer: " + ", ".join(report)


def check_alone(name: str, page: TokensPage) -> str:
    """A text of a padded batch is answered as it is alone."""
    method = small(name, page)
    for family in reached(name, method)[:2]:
        model, inputs = batch(family)
        both, kept = answers(method, model, inputs, "remove")
        for text in (0, 1):
            one, own = answers(method, model, alone(inputs, text), "remove")
            assert own[0] == kept[text], f"{name} on {family}: of a batch {kept[text]} stay, alone {own[0]}"
            gap = (one[0] - both[text]).abs().max().item()
            assert gap <= 1e-4, (
                f"{name} on {family}: text {text} of a batch is {gap:.1e} off what it is alone"
            )
    return "held"


def check_images(name: str, page: TokensPage) -> str:
    """Two images in a text: removal is hiding."""
    method = small(name, page)
    for family in reached(name, method)[::2]:
        model, inputs = two_images(family)
        hidden, kept = answers(method, model, inputs, "mask")
        removed, same = answers(method, model, inputs, "remove")
        assert kept == same, f"{name} on {family}, two images: {kept} hidden, {same} removed"
        gap = (hidden - removed).abs().max().item()
        assert gap <= NEAR, f"{name} on {family}, two images: removal is {gap:.1e} off the mask"
    return "held"


def check_bfloat16(name: str, page: TokensPage) -> str:
    """It runs in bfloat16, and what it gives is finite."""
    method = small(name, page)
    family = reached(name, method)[0]
    model, inputs = batch(family)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    logits, _ = answers(method, deepcopy(model).to(torch.bfloat16), inputs, "remove")
    assert bool(logits.isfinite().all()), f"{name} on {family} in bfloat16: logits that are not finite"
    return "held"
