"""The table of which mechanism can do which pattern."""

from regard import catalog
from regard.core.shapes import PATTERNS
from regard.kinds.mechanism import Mechanism
from regard.testing.mechanism import support

NAMES = [name for name, page in catalog.every() if isinstance(page, Mechanism)]


def test_support_is_found_by_calling():
    table = support()
    assert sorted(table) == sorted(NAMES)
    assert table["softmax"] == dict.fromkeys(PATTERNS, "yes")
