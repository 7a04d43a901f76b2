"""The old place of `regard.train.convert` and `regard.attaching.converted`; it goes with the next release."""

from regard.models._moved import forward

__getattr__ = forward(
    __name__, "regard.train.convert", "regard.attaching.converted", "regard.attaching.replacement"
)
