"""Key rerotation over methods that let tokens go at every step, and over one that turns keys back itself."""

import pytest
from tests.test_choices import written

from regard import catalog
from regard.testing.cache.choice import check_choice
from regard.testing.cache.definition import Definition

# a share grows with the text: in some steps a row lets nothing go while another does
BASES = {"h2o": {"budget": 0.4}, "leverage": {"budget": 8}}


def over(base: str) -> type[Definition]:
    """The base's choice, with keys that are turned."""
    turned = written("key_rerotation")
    return type("Written", (written(base),), {name: vars(turned)[name] for name in ("projected", "stores")})


@pytest.mark.parametrize("base", BASES)
def test_what_is_stored_is_turned_whatever_lies_below(base):
    check_choice(catalog.method(f"{base}+key_rerotation", **BASES[base]), over(base))
