"""Masks: who may attend to whom. A page builds a `Mask` of the algebra in core/mask.py from its settings."""

from collections.abc import Callable
from dataclasses import dataclass

from regard.core import Kind, Page


@dataclass(frozen=True, eq=False)
class MaskPage(Page):
    """Who may attend to whom: build(cfg) -> Mask."""

    build: Callable = None  # type: ignore[assignment]
    kind = "mask"


KIND = Kind(
    name="mask",
    page=MaskPage,
    says="who may attend to whom",
    verb='regard.attend(q, k, v, "softmax", mask=NAME); Attention(dim, heads, mask=NAME); regard.attach(model, NAME)',
    room="methods/masks",
    checks="regard.testing.mask:check_mask_page",
)
