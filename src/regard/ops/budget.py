"""How many tokens a cache may keep or read: asked for in tokens, as a fraction, or in bytes."""

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.errors import present, require

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """Exactly one of the three is set."""

    tokens: int | None = None
    fraction: float | None = None
    bytes: int | None = None

    @property
    def value(self) -> int | float | str:
        """As people write it: 512, 0.1 or "64MB"; parse_budget reads it back."""
        if self.tokens is not None:
            return self.tokens
        if self.fraction is not None:
            return self.fraction
        size = present(self.bytes, "a budget is in tokens, a fraction or bytes", budget=self.bytes)
        unit = next(u for u in ("GB", "MB", "KB", "B") if size % UNITS[u] == 0)
        return f"{size // UNITS[unit]}{unit}"

    def __str__(self) -> str:
        return str(self.value)

    def resolve(self, real: Tensor, bytes_per_token: int) -> Tensor:
        """Tokens for each row: [B] integers, at least 1 and at most the row's `real` [B] tokens so far.

        Bytes are those of the whole sequence over all layers and heads; `bytes_per_token` says what one token
        of one row takes there.
        """
        if self.tokens is not None:
            return real.clamp(max=self.tokens)
        if self.fraction is not None:
            return torch.ceil(real.double() * self.fraction - 1e-9).long().clamp(min=1)
        size = present(self.bytes, "a budget is in tokens, a fraction or bytes", budget=self.bytes)
        rule = "the byte budget holds at least one token"
        require(size >= bytes_per_token, rule, budget=size, one_token=bytes_per_token)
        return real.clamp(max=size // bytes_per_token)


def tokens_within(size: int, slot: int, layers: list[int | None], room: Callable[[int], int]) -> int:
    """The most tokens t with which a cache holds at most `size` bytes: `slot` for each slot of each layer.

    A layer without a window has t slots and one for the token to come; one with a window that t covers has the
    window and room(window) to grow.

    >>> tokens_within(1000, 10, [None, None], room=lambda n: 16)  # 2 layers of 49 + 1 slots of 10 bytes
    49
    >>> tokens_within(1000, 10, [None, 6], room=lambda n: 16)  # 77 + 1 slots, and 6 + 16
    77
    """

    def held(t: int) -> int:
        covered = [w for w in layers if w is not None and t >= w - 1]
        return slot * (sum(w + room(w) for w in covered) + (len(layers) - len(covered)) * (t + 1))

    most = range(size // slot + 1)
    tokens = bisect_right(most, size, key=held) - 1
    require(tokens >= 1, "the byte budget holds at least one token", budget=size, one_token=held(1))
    return tokens


def parse_budget(budget: "int | float | str | Budget") -> Budget:
    """Read a budget as people write it: an int is tokens, a float in (0, 1] a fraction, a text like "64MB" bytes.

    Texts are read as numbers where they are ones, so that a command line can hand over what was typed: "512", "0.1",
    "10%". A Budget is given back as it is.

    >>> parse_budget(512), parse_budget(0.1), parse_budget("64MB")
    (Budget(tokens=512, fraction=None, bytes=None), Budget(tokens=None, fraction=0.1, bytes=None), \
Budget(tokens=None, fraction=None, bytes=64000000))
    >>> parse_budget(1.5)
    Traceback (most recent call last):
    ...
    ValueError: must hold: a fractional budget lies in (0, 1] (budget=1.5)
    """
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, str) and (number := re.fullmatch(r"\s*([0-9.]+)\s*(%?)\s*", budget)):
        if number[2]:
            budget = float(number[1]) / 100
        else:
            budget = float(number[1]) if "." in number[1] else int(number[1])
    if isinstance(budget, str):
        match = present(
            re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?i?B)\s*", budget, flags=re.IGNORECASE),
            'a byte budget reads like "64MB" (B, KB, MB, GB, KiB, MiB, GiB)',
            budget=budget,
        )
        size = int(float(match[1]) * UNITS[match[2].upper()])
        require(size > 0, "a byte budget is above zero", budget=budget)
        return Budget(bytes=size)
    require(
        not isinstance(budget, bool) and isinstance(budget, int | float),
        "a budget is an int (tokens), a float in (0, 1] or a text such as '64MB'",
        budget=budget,
    )
    if isinstance(budget, float):
        require(0 < budget <= 1, "a fractional budget lies in (0, 1]", budget=budget)
        return Budget(fraction=budget)
    require(budget >= 1, "a token budget is at least 1", budget=budget)
    return Budget(tokens=budget)
