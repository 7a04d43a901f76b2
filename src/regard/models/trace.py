"""The old place of `regard.explaining.tracing`; it goes with the next release."""

from regard.models._moved import forward

__getattr__ = forward(__name__, "regard.explaining.tracing")
