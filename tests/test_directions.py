"""Every setting moves its page in the direction that its description states, or the table says why it has none."""

import pytest
import torch

from regard import catalog
from regard.testing.directions import KINDS, check_directions, row, unsaid, ways
from regard.testing.directions.way import check_way, less, more

PAGES = [name for name, page in catalog.every() if page.kind in KINDS and ways(name)]


def test_every_setting_that_is_a_number_has_a_direction_or_a_reason():
    said = (
        "a row of testing/directions says what a larger value raises or lowers, or why there is no direction"
    )
    assert unsaid() == [], said


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_moves_its_page_the_way_that_it_says(name):
    torch.set_num_threads(1)
    check_directions(name)


# the law itself: what it must not let pass


def reads(**by: float):
    """A measure that gives what it is told, by the value of a setting `w`."""
    return lambda name, quantity, settings: {" (self)": by[f"at_{settings['w']}"], " (other)": 7.0}


def test_a_setting_that_moves_the_other_way_is_found():
    with pytest.raises(
        AssertionError, match=r"page \(self\): w 1 -> 2 takes reach from 5 to 4, and should raise it"
    ):
        check_way("page", "w", more("reach", 1, 2), reads(at_1=5.0, at_2=4.0))
    with pytest.raises(AssertionError, match="and should lower it"):
        check_way("page", "w", less("reach", 1, 2), reads(at_1=4.0, at_2=5.0))
    check_way("page", "w", less("reach", 1, 2), reads(at_1=5.0, at_2=4.0))


def test_a_setting_that_is_ignored_is_found():
    with pytest.raises(AssertionError, match="page: w 1 -> 2 leaves reach as it is"):
        check_way("page", "w", more("reach", 1, 2), reads(at_1=5.0, at_2=5.0))


def test_a_page_has_its_own_row_before_that_of_the_word():
    assert row("xattention", "threshold") != row("seer_attention", "threshold")
