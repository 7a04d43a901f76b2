"""Where tensors go, as it is typed: the word is judged without torch, whether the place is there with it."""

import re

from regard.core.errors import require

RULE = "the device is cpu, cuda, cuda:N or mps"


def device_of(name: str | None) -> str | None:
    """The device of this name, which is there; None for None. What is asked for is never replaced by another.

    >>> device_of("cpu"), device_of(None)
    ('cpu', None)
    >>> device_of("cudaa")
    Traceback (most recent call last):
    ...
    ValueError: must hold: the device is cpu, cuda, cuda:N or mps (device='cudaa')
    """
    if name is None:
        return None
    require(re.fullmatch(r"cpu|mps|cuda(:\d+)?", name), RULE, device=name)
    if name == "cpu":
        return name
    import torch

    if name == "mps":
        require(torch.backends.mps.is_available(), "mps is there: torch finds no such device", device=name)
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(name.partition(":")[2] or 0)
    require(number < count, "a GPU of this number is there, as torch finds them", device=name, gpus=count)
    return name
