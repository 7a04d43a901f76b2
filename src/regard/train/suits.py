"""Settings of a training run that suit its task where none are given. Here nothing is imported: `--help` reads them."""

from typing import Any

TEXTS: dict[str, Any] = dict(rates=(3e-3, 1e-2), steps=400, batch=32, layers=2, width=64, heads=1, mlp=0)
IMAGES: dict[str, Any] = dict(rates=(2e-3, 4e-3), steps=600, batch=32, layers=4, width=48, heads=4, mlp=96)
SUITS: dict[str, dict[str, Any]] = {"mqar": TEXTS, "text": TEXTS, "digits": IMAGES, "find": IMAGES}
HELD_OUT = 0.1  # the last part of a text, which is not trained on


def suits(name: str) -> str:
    """What a setting is by default, for a line of help.

    >>> suits("batch"), suits("rates")
    ('32; of images 32.', '0.003,0.01; of images 0.002,0.004.')
    """
    said = (x if not isinstance(x, tuple) else ",".join(map(str, x)) for x in (TEXTS[name], IMAGES[name]))
    return "{}; of images {}.".format(*said)
