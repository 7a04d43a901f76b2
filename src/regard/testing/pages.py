"""`check_page(name)`: what every page must pass, whatever its kind, and then the checks that its kind names."""

import pickle
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import is_dataclass
from importlib import import_module
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from regard import catalog
from regard.core import PATTERNS, Method, Page
from regard.kinds import kind


def check_page(name: str) -> Any:
    """The card, the settings, and the checks of its kind; what these return. Raises AssertionError."""
    page = catalog.get(name)
    check_whatever_its_kind(name, page)
    return check_kind(name, page)


def check_kind(name: str, page: Page) -> Any:
    """The checks of its kind alone; what these return."""
    where, _, check = kind(page.kind).checks.partition(":")
    return getattr(import_module(where), check)(name)


def check_whatever_its_kind(name: str, page: Page) -> None:
    """The card, the settings, and that it reaches another process."""
    for check in (check_card, check_config, check_settings, check_pickles):
        check(name, page)


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


def check_settings(name: str, page: Page) -> None:
    """The defaults fit their annotations; a value of another type is an error with setting and value."""
    hints, default = get_type_hints(page.config), page.config()
    assert page.configure(**vars(default)) == default, f"{name}: its own defaults are accepted"
    for setting, annotation in hints.items():
        for value in wrong_values(annotation):
            message = ""
            try:
                page.configure(**{setting: value})
            except (ValueError, TypeError) as error:
                message = str(error)
            says = setting in message and (str(value) in message or isinstance(value, list))
            assert says, f"{name}: {setting}={value!r} is no {annotation}, and the error is {message!r}"


def wrong_values(annotation: Any) -> Iterator[Any]:
    """Values that this annotation does not allow; a misspelled word where there is a choice of words."""
    kinds = (
        set(get_args(annotation) or (annotation,)) if get_origin(annotation) is not tuple else {annotation}
    )
    kinds |= {int} if float in kinds else set()
    words = [word for word in get_args(annotation) if isinstance(word, str)]
    if get_origin(annotation) is Literal:
        kinds, misspelled = {type(word) for word in words}, [word[:-1] + "~" for word in words]
        yield from misspelled
    for value in ("no_such_value", 2.5, 3, True, None, ["x"], object):
        if type(value) not in kinds | ({NoneType} if None in kinds else set()):
            yield value


def check_pickles(name: str, page: Page) -> None:
    """A method goes to another process and to disk, and comes back as the same page with the same settings."""
    for settings in ({}, *page.test_settings):
        same_after_pickling(name, Method(name, page, page.configure(**settings)))


def same_after_pickling(name: str, thing: Any) -> None:
    """Equal after pickle, and after deepcopy."""
    try:
        back = pickle.loads(pickle.dumps(thing))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"{name}: cannot be pickled: {error}") from error
    assert back == thing, f"{name}: pickled and read back it is another"
    assert deepcopy(thing) == thing, f"{name}: its copy is another"
