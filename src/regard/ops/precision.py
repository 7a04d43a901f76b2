"""Precision is explicit: a function computes in the dtypes that it says, whatever autocast is on around it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def as_written(function: Callable) -> Callable:
    """The function with autocast off inside, on the device of its first tensor.

    >>> @as_written
    ... def product(a, b):
    ...     return a @ b
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     product(torch.ones(2, 2), torch.ones(2, 2)).dtype
    torch.float32
    """

    @wraps(function)
    def precise(first: Tensor, *rest: Any, **options: Any) -> Any:
        device = first.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(first, *rest, **options)
        with torch.autocast(device, enabled=False):
            return function(first, *rest, **options)

    return precise
