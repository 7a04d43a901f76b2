"""What every cache page holds, reads and merges is what its definition says, and every setting moves it.

tests/choices/NAME.py writes page NAME out for one text: slow, in plain Python, sharing nothing with the page.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from regard import catalog
from regard.methods.caches.streaming_llm import Config
from regard.testing.cache.choice import (
    STEPS,
    check_choice,
    check_default_choice,
)
from regard.testing.cache.definition import Definition, Merged, Moment
from regard.testing.cache.moves import asked_of, check_all_settings_move, check_moves
from regard.testing.cache.script import Tape, script

CHOICES = Path(__file__).parent / "choices"
PAGES = catalog.list_methods(kind="cache")


@cache
def written(name: str) -> type[Definition]:
    spec = spec_from_file_location(f"choices_{name}", CHOICES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Written


# what is asked of a page shares its runs, and goes to one process: tests/processes.py
ASKED = [pytest.param(name, what, id=f"{name}-{what}") for name in PAGES for what in asked_of(written(name))]
RUNS: dict[tuple, Tape] = {}


def run(name: str, settings: dict[str, Any], family: str = "llama") -> Tape:
    """The page under these settings, held to its definition; each run once."""
    key = name, family, tuple(sorted(settings.items()))
    if key not in RUNS:
        RUNS[key] = check_choice(catalog.method(name, **settings), written(name), family=family)
    return RUNS[key]


def test_every_cache_page_is_written_out():
    assert sorted(path.stem for path in CHOICES.glob("*.py")) == sorted(PAGES)


@pytest.mark.parametrize(("name", "what"), ASKED)
def test_choice_is_the_definition(name, what):
    for family, settings in asked_of(written(name))[what]:
        run(name, settings, family)


@pytest.mark.parametrize("name", PAGES)
def test_choice_without_padding_is_the_definition(name):
    """Rows of one length, whose tables are shared, and of which one token goes at a time."""
    definition = written(name)
    firsts = [one for one, _ in definition.moves.values()]
    for i, settings in enumerate(firsts):
        if settings not in firsts[:i]:
            check_choice(catalog.method(name, **settings), definition, script(STEPS, pads=(0, 0)))


def test_sinks_that_stand_behind_padding_move_too():
    """One slot of each row goes after the prompt, of the second row its padding: the newest token takes its place."""
    feeds = script((18, 1, 1, 1), pads=(0, 1))
    check_choice(catalog.method("streaming_llm", budget=17, sinks=2), written("streaming_llm"), feeds)


@pytest.mark.parametrize("name", PAGES)
def test_choice_under_the_defaults_is_the_definition(name):
    check_default_choice(catalog.method(name, **written(name).words), written(name))


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_moves_what_is_chosen(name):
    definition = written(name)
    check_all_settings_move(name, definition)
    for setting, pair in definition.moves.items():
        one, other = (run(name, settings, definition.families.get(setting, "llama")) for settings in pair)
        check_moves(f"{name}: {setting}", one, other)


# the law itself: what it must not let pass

SMALL = {"budget": 8}


def faulty(of: type[Definition], **functions: Any) -> type[Definition]:
    return type("Faulty", (of,), functions)


def test_a_token_too_many_is_found():
    h2o = written("h2o")
    other = faulty(h2o, keeps=lambda self, at: [[*tokens[:-1]] for tokens in h2o.keeps(self, at)])
    with pytest.raises(AssertionError, match=r"layer 0, KV head 0: holds .* by its definition"):
        check_choice(catalog.method("h2o", **SMALL), other)


def test_a_token_that_is_read_too_many_is_found():
    tidal = written("tidaldecode")
    other = faulty(tidal, searched=lambda self, at: [found[1:] for found in tidal.searched(self, at)])
    with pytest.raises(AssertionError, match=r"forward 1, layer 2, query head 0: reads .* by its definition"):
        check_choice(catalog.method("tidaldecode", **tidal.moves["k"][0]), other)


def test_a_merged_token_of_another_weight_or_value_is_found():
    razor = written("razor_attention")
    method = catalog.method("razor_attention", **razor.moves["budget"][0])
    faults = {
        "a merged token of weight": lambda k, v, count: (k, v, count + 1),
        "a merged token is 1": lambda k, v, count: (k, v + 1, count),
        "1 merged tokens, by its definition 0": lambda k, v, count: None,
    }
    for said, fault in faults.items():

        def merged(self: Definition, at: Moment, fault: Callable = fault) -> list[Merged | None]:
            return [None if token is None else fault(*token) for token in razor.merged(self, at)]

        with pytest.raises(AssertionError, match=said):
            check_choice(method, faulty(razor, merged=merged))


def test_a_key_at_another_position_is_found():
    streaming = written("streaming_llm")
    method = catalog.method("streaming_llm", **SMALL, positions="text")
    in_slots = faulty(
        streaming, __init__=lambda self, cfg, model: streaming.__init__(self, Config(**SMALL), model)
    )
    with pytest.raises(AssertionError, match=r"query head 0, token 18: .* away from its definition"):
        check_choice(method, in_slots)


def test_a_run_that_chooses_nothing_is_no_run():
    for name, settings in {"h2o": {"budget": 1.0}, "longheads": {"chunk": 64}}.items():
        with pytest.raises(AssertionError, match="chooses nothing"):
            check_choice(catalog.method(name, **settings), written(name))


def test_a_setting_that_moves_nothing_is_found():
    one = run("h2o", SMALL)
    with pytest.raises(AssertionError, match="recent changes nothing that is held or read"):
        check_moves("recent", one, one)


def test_a_setting_that_nobody_moves_is_found():
    h2o = written("h2o")
    with pytest.raises(AssertionError, match=r"settings \['recent'\]"):
        check_all_settings_move("h2o", faulty(h2o, moves={"budget": h2o.moves["budget"]}))
    both = {**h2o.moves, "recent": (SMALL, {"budget": 9, "recent": 0.2})}
    with pytest.raises(AssertionError, match=r"the two settings of recent differ in \['budget', 'recent'\]"):
        check_all_settings_move("h2o", faulty(h2o, moves=both))
