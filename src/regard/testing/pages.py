"""`check_page(name)`: what every page must pass, whatever its kind, and then the checks that its kind names."""

import pickle
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from regard import catalog
from regard.core import PATTERNS, Method, Page
from regard.kinds import kind


def check_page(name: str) -> Any:
    """The card, the settings, and the checks of its kind; what these return. Raises AssertionError."""
    page = catalog.get(name)
    check_card(name, page)
    check_config(name, page)
    check_pickles(name, page)
    where, _, check = kind(page.kind).checks.partition(":")
    return getattr(import_module(where), check)(name)


def check_card(name: str, page: Page) -> None:
    """The card is complete, its patterns are known, its neutral settings are ones that the page has."""
    card = page.card
    for field in ("title", "paper", "idea"):
        assert getattr(card, field), f"{name}: the card's {field} is empty"
    if kind(page.kind).costs:
        assert card.cost and card.state, f"{name}: the card says cost and state"
    assert 1950 < card.year < 2030, f"{name}: the card's year is {card.year}"
    assert set(page.patterns) <= set(PATTERNS), (
        f"{name}: patterns are some of {PATTERNS}, not {page.patterns}"
    )
    assert isinstance(page, kind(page.kind).page), (
        f"{name}: a {page.kind} page is a {kind(page.kind).page.__name__}"
    )
    page.configure(**card.neutral)


def check_config(name: str, page: Page) -> None:
    """The settings are a frozen dataclass with defaults, equal by content, and a wrong name is an error."""
    assert is_dataclass(page.config) and vars(page.config)["__dataclass_params__"].frozen, (
        f"{name}: Config is frozen"
    )
    assert page.config() == page.config(), f"{name}: two default Configs are equal"
    assert hash(page.config()) == hash(page.config()), f"{name}: a Config can be hashed"
    for settings in page.test_settings:
        page.configure(**settings)
    message = ""
    try:
        page.configure(no_such_setting=1)
    except ValueError as error:
        message = str(error)
    assert "has no setting 'no_such_setting'" in message, f"{name}: a setting that does not exist is accepted"


def check_pickles(name: str, page: Page) -> None:
    """A method goes to another process and to disk, and comes back as the same page with the same settings."""
    method = Method(name, page, page.config())
    try:
        back = pickle.loads(pickle.dumps(method))
    except (pickle.PicklingError, AttributeError) as error:
        raise AssertionError(f"{name}: cannot be pickled: {error}") from error
    assert back == method, f"{name}: pickled and read back it is another"
