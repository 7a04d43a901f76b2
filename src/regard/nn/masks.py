"""The masks of a layer: those that are fixed with it, and what one call is given."""

from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.core import Method, require
from regard.core.mask import Mask

TOKENS_OR_PAIRS = (
    "a layer's mask is bool, True = attend: [B, M] says which tokens are there, [B, 1|H, N, M] who sees whom"
)


def position_page(positions: str | Method | None, pattern: str) -> Method | None:
    method = catalog.method(positions) if isinstance(positions, str) else positions
    if method is not None:
        require(
            method.page.kind == "position",
            "positions is a position page",
            page=method.name,
            kind=method.page.kind,
        )
        # in self, what is causal is said by the page's own mask
        fits = pattern in method.page.patterns or (pattern == "self" and method.page.build is not None)
        require(fits, f"{method.name} is for {method.page.patterns}", pattern=pattern)
    return method


def fixed_mask(mask: Any, pattern: str) -> Mask | None:
    """The Mask of a mask page or a position page; a core Mask as it is."""
    if isinstance(mask, Method) and getattr(mask.page, "build", None) is None:
        return None
    mask = catalog.as_mask(mask, pattern)
    require(
        mask is None or isinstance(mask, Mask), "a layer's own mask is a mask page or a core Mask", mask=mask
    )
    return mask


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    return b if a is None else a if b is None else a & b


def split_given(
    mask: Any, pattern: str, batch: int, tokens: int
) -> tuple[Tensor | None, Tensor | None, Mask | None]:
    """(which tokens are there [B, tokens], who sees whom [B, H, N, M], Mask) of what a call is given: one of the three.

    Tokens may be numbers 0 and 1, as tokenizers give them. An additive mask (0 and -inf) and one of three axes, which
    may mean [B, N, M] or [H, N, M], are refused.
    """
    if mask is None or isinstance(mask, Mask | Method | str):
        return None, None, fixed_mask(mask, pattern)
    require(isinstance(mask, Tensor) and mask.dim() in (2, 4), TOKENS_OR_PAIRS, mask=mask)
    if mask.dim() == 4:
        require(
            mask.dtype == torch.bool, TOKENS_OR_PAIRS + "; of an additive mask that is mask == 0", mask=mask
        )
        return None, mask, None
    whole = not mask.is_floating_point() and not mask.is_complex()
    require(whole, TOKENS_OR_PAIRS + "; of an additive mask that is mask == 0", mask=mask)
    fits = mask.shape[0] in (1, batch) and mask.shape[1] == tokens
    require(fits, "a mask of tokens is [B, M]", mask=mask, B=batch, M=tokens)
    if mask.dtype != torch.bool and not torch.compiler.is_compiling():
        require(bool(((mask == 0) | (mask == 1)).all()), "a mask of tokens is 1 for a token and 0 for padding",
                smallest=mask.min(), largest=mask.max())  # fmt: skip
    return mask.bool().expand(batch, -1), None, None
