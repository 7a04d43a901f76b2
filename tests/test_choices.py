"""What every cache page holds, reads and merges is what its definition says, and every setting moves it.

tests/choices/NAME.py writes page NAME out for one text: slow, in plain Python, sharing nothing with the page.
"""

from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from regard import catalog
from regard.testing.cache.choice import (
    check_all_settings_move,
    check_choice,
    check_default_choice,
    check_moves,
    settings_of,
)
from regard.testing.cache.definition import Definition
from regard.testing.cache.script import Tape

CHOICES = Path(__file__).parent / "choices"
PAGES = catalog.list_methods(kind="cache")


@cache
def written(name: str) -> type[Definition]:
    spec = spec_from_file_location(f"choices_{name}", CHOICES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Written


RUNS: dict[tuple, Tape] = {}


def run(name: str, settings: dict[str, Any], family: str = "llama") -> Tape:
    """The page under these settings, held to its definition; each run once."""
    key = name, family, tuple(sorted(settings.items()))
    if key not in RUNS:
        RUNS[key] = check_choice(catalog.method(name, **settings), written(name), family=family)
    return RUNS[key]


def test_every_cache_page_is_written_out():
    assert sorted(path.stem for path in CHOICES.glob("*.py")) == sorted(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_choice_is_the_definition(name):
    for family, settings in settings_of(written(name)):
        run(name, settings, family)


@pytest.mark.parametrize("name", PAGES)
def test_choice_under_the_defaults_is_the_definition(name):
    check_default_choice(catalog.method(name), written(name))


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_moves_what_is_chosen(name):
    definition = written(name)
    check_all_settings_move(catalog.get(name).config, definition)
    for setting, pair in definition.moves.items():
        one, other = (run(name, settings, definition.families.get(setting, "llama")) for settings in pair)
        check_moves(f"{name}: {setting}", one, other)
