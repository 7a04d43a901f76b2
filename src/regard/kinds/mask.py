"""Masks: who may attend to whom. A page builds a `Mask` of the algebra in core/mask.py from its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core import Kind, Method, Page, Unsupported, require
from regard.core.mask import Mask


@dataclass(frozen=True, eq=False)
class MaskPage(Page):
    """Who may attend to whom.

    build(cfg) -> Mask
    looks_ahead   whether it is its point that tokens see later ones: a bool, or a function of cfg. Under
                  causal_self that would be hidden, so it is refused there: what is causal is said by the mask itself.
                  Attached to a causal model it takes causality's place
    """

    build: Callable = None  # type: ignore[assignment]
    looks_ahead: bool | Callable[[Any], bool] = False
    kind = "mask"


def build_mask(method: Method, causal: bool) -> Mask:
    """The mask of a configured page; `causal`: later tokens are hidden beside it."""
    build = getattr(method.page, "build", None)
    require(build is not None, "a mask is a mask page, or a position page that has one", page=method.name)
    if causal:
        refuse_ahead(method)
    built = build(method.config)
    require(isinstance(built, Mask), "build(cfg) gives a Mask", page=method.name, built=built)
    return built


def looks_ahead(method: Method) -> bool:
    """Whether it is the point of this mask, under its settings, that tokens see later ones."""
    ahead = method.page.looks_ahead
    return bool(ahead(method.config) if callable(ahead) else ahead)


def refuse_ahead(method: Method) -> None:
    """An error where it is this page's point that tokens see later ones: causal attention would hide that."""
    if looks_ahead(method):
        raise Unsupported(
            f"{method.name} lets tokens see later ones, which causal attention hides: ask for pattern='self', since "
            "what is causal is said by the mask itself"
        )


KIND = Kind(
    name="mask",
    page=MaskPage,
    says="who may attend to whom",
    verb='regard.attend(q, k, v, "softmax", mask=NAME); regard.nn.Attention(dim, heads, mask=NAME); '
    "regard.attach(model, NAME)",
    room="methods/masks",
    checks="regard.testing.mask:check_mask_page",
)
