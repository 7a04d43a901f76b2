"""The battery on every mechanism page of the catalogue, and the table of who can do what."""

import pytest
import torch

from regard import catalog
from regard.core import Mechanism
from regard.core.shapes import PATTERNS
from regard.testing.mechanism import check_mechanism, support

NAMES = [name for name, page in catalog.every() if isinstance(page, Mechanism)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_page(name):
    report = check_mechanism(catalog.get(name))
    assert "held" in report.values()


def test_support_is_found_by_calling():
    table = support()
    assert sorted(table) == sorted(NAMES)
    assert table["softmax"] == dict.fromkeys(PATTERNS, "yes")
