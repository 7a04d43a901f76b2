"""Checks that every cache page must pass; yours too: `check_cache(regard.method("mine", budget=8))`.

The oracle: whatever a policy holds or reads, the model must answer as a full cache does in which exactly the other
tokens are hidden. A policy is run through a script of forwards, what each head could read is recorded, and the
script is run again through transformers' own cache with an explicit softmax and transformers' own masks. An attention
of the page's own is held to its reference, on the same cache (testing/cache/own.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from regard import catalog
from regard.core import Method, Unsupported
from regard.core.composed import overlays
from regard.kinds.cache import CachePage
from regard.testing.cache.checks import (
    check_attention_budget,
    check_bfloat16,
    check_budget,
    check_bytes,
    check_generation,
    check_neutral,
    check_oracle,
    check_rows,
    check_two_calls,
    full_bytes,
)
from regard.testing.cache.handling import check_by_place, check_draft, check_goes_on, check_window
from regard.testing.cache.oracle import movable
from regard.testing.cache.rows import check_rows_move
from regard.testing.cache.script import FAMILIES, PADS, play, script
from regard.testing.zoo import DECODERS, build

# states beside keys in every layer, and layers that read the keys of another
MIXED = ("falconh1", "gemma3n")


def small(page: CachePage, **settings: Any) -> Mapping[str, Any]:
    """Settings under which a page acts on twenty tokens: its own, or a budget of 8 and small numbers.

    Of a page that is laid over another these are that one's, with its own beside.
    """
    own = page.test_settings[0] if page.test_settings else {}
    if overlays(page) and page.over:
        return {**small(catalog.get(page.over), **settings), **own}
    if own:
        return {**own, **settings}
    default = page.config()
    numbers = {
        f.name: 3
        for f in fields(default)
        if type(getattr(default, f.name)) is int and getattr(default, f.name) > 8
    }
    budget = {"budget": 8} if any(f.name == "budget" for f in fields(default)) else {}
    for options in ({**numbers, **budget, **settings}, {**budget, **settings}):
        try:
            type(default)(**options)
        except ValueError:
            continue
        return options
    return settings


def check_cache_page(name: str) -> dict[str, float]:
    """The checks of its kind on a page of the catalogue, under its test settings."""
    return check_cache(name)


def check_cache(
    method: str | Method,
    families: Iterable[str] = FAMILIES,
    *,
    budgets: Iterable = (8, 0.4, "bytes"),
) -> dict[str, float]:
    """Every check of a cache page on tiny models of these families; "bytes" is half of the full prompt's.

    Returns how far the policy moved the logits, by family: a policy that moves none was not tested. Raises
    AssertionError with the check, the method and the family.
    """
    method = catalog.method(method, **small(catalog.get(method))) if isinstance(method, str) else method
    families, effect = tuple(families), {}
    for family in families:
        model, _ = build(family)
        if not movable(method, model):
            refused(method, family)
            continue
        effect[family] = check_oracle(method, family)
        check_rows(method, family)
    for family in MIXED:
        if movable(method, build(family)[0]):
            check_oracle(method, family)
            check_neutral(method, family)
            check_rows_move(method, family)
    assert max(effect.values()) > 1e-3, (
        f"{method.label} changed nothing on {families}: settings too large to test it"
    )
    first = next(iter(effect))
    for family in DECODERS:
        check_neutral(method, family)
    if any(f.name == "budget" for f in fields(method.config)):
        for budget in budgets:
            some = full_bytes(build(first)[0], script()[:1], len(PADS)) // 2
            budget = f"{some}B" if budget == "bytes" else budget
            check_budget(method, first, budget, method.page.reads_generated)
            check_attention_budget(method, first, budget)
    check_window(method)
    for family in DECODERS:
        if movable(method, build(family)[0]):
            check_by_place(method, family)
    for check in (
        check_bytes, check_two_calls, check_generation, check_rows_move, check_goes_on, check_draft, check_bfloat16,
    ):  # fmt: skip
        check(method, first)
    return effect


def refused(method: Method, family: str) -> None:
    """A policy that moves keys says that it cannot on other rotary positions, or answers each row as it does alone."""
    model, _ = build(family)
    try:
        play(model, method, script())
    except Unsupported as error:
        if method.name not in str(error) and "position" not in str(error):
            raise AssertionError(f"{error} does not say what cannot be moved") from error
        return
    check_rows(method, family)
