"""G-Search asks log2(tokens) times a layer and gives what has passed; a sigmoid has its budget."""

import math

import pytest

from regard.methods.tokens import g_search as page


def test_the_search_asks_little_and_what_it_gives_has_passed():
    asked = {}

    def performance(kept):
        asked[kept] = float(sum(kept) % 3 != 1)  # not at all monotone
        return asked[kept]

    found = page.search(performance, layers=5, tokens=63)
    assert asked[found] == 1.0 and len(asked) <= 1 + 5 * math.log2(64)


def test_a_sigmoid_keeps_the_budget_at_any_steepness():
    for steepness in (0.0, 3.0, 200.0):
        shares = page.sigmoid(7, steepness, 0.3)
        assert sum(shares) / 7 == pytest.approx(0.3) and list(shares) == sorted(shares, reverse=True)


def test_a_schedule_that_rises_is_refused():
    with pytest.raises(ValueError, match="kept falls"):
        page.Config(kept=(4, 9))
