"""A disturbance has to be given, unless nothing is taken away."""

import pytest

from regard.methods.steering import icd as page


def test_an_empty_prefix_is_refused():
    with pytest.raises(ValueError, match="a disturbance"):
        page.streams(page.Config())
    assert page.streams(page.Config(strength=0.0)) == ()
    (stream,) = page.streams(page.Config(prefix=(4, 2)))
    assert stream.prefix == (4, 2) and stream.hide is None
