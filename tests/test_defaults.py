"""The defaults of pages are their papers': one that changes is changed here too, with its reason in the commit.

`python tests/test_defaults.py` writes what they are now into defaults.json.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from regard import catalog

KEPT = Path(__file__).parent / "defaults.json"


def defaults(name):
    config = catalog.get(name).config()
    return {field.name: repr(getattr(config, field.name)) for field in fields(config)}


@pytest.mark.parametrize("name", sorted(catalog.pages()))
def test_the_defaults_are_those_that_were_read_in_the_paper(name):
    kept = json.loads(KEPT.read_text(encoding="utf8"))
    assert defaults(name) == kept.get(name), f"tests/defaults.json has other settings of {name}"


def test_no_page_is_kept_that_is_gone():
    assert set(json.loads(KEPT.read_text(encoding="utf8"))) == set(catalog.pages())


if __name__ == "__main__":
    found = {name: defaults(name) for name in sorted(catalog.pages())}
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
