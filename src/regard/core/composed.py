"""Pages laid over others: the settings of all in one Config, and functions that act as the outermost page says.

A page that can be laid over another has `wrap`: (the page below, its own settings) -> the page that acts in its place.
One that has `joins` takes the page after it too, and its settings.
`composed` puts together what is typed as "snapkv+adakv": its Config is the base's, with a field for each page over it.
"""

from collections.abc import Callable, Mapping
from dataclasses import field, fields, make_dataclass, replace
from functools import cache
from typing import Any

from regard.core.errors import Unsupported, require
from regard.core.pages import Page

Named = tuple[str, Page]


def overlays(page: Page) -> bool:
    """Whether a page is one that is laid over others."""
    return getattr(page, "wrap", None) is not None


@cache
def composed(base: Named, *over: Named) -> Page:
    """The page `base` with the others over it, from the innermost to the outermost.

    Unsupported where one of them is no page that can be laid over another, or is no page for what lies below it.
    """
    refuse(base, over)
    config = config_of(base, over)
    first = stacked(base, over, config())
    title = " + ".join(page.card.title for _, page in (base, *over))
    functions = {
        f.name: acting(base, over, f.name)
        for f in fields(first)
        if callable(getattr(first, f.name)) and not isinstance(getattr(first, f.name), type)
    }
    neutral = {
        f"{name}.{setting}": value for name, page in over for setting, value in page.card.neutral.items()
    }
    card = replace(first.card, title=title, neutral={**first.card.neutral, **neutral})
    return replace(first, config=config, card=card, parts=(base, *over), test_settings=(), **functions)


def refuse(base: Named, over: tuple[Named, ...]) -> None:
    """Raise for pages that do not stand upon one another in this order."""
    names, before = [name for name, _ in (base, *over)], base[1]
    if overlays(before):
        raise Unsupported(f"{base[0]} is laid over another method, which stands before it: OTHER+{base[0]}")
    for at, (name, page) in enumerate(over, start=1):
        joined = getattr(before, "joins", "")
        if joined and overlays(page):
            raise Unsupported(
                f"after {'+'.join(names[:at])} stands a method that chooses by itself, not {name}"
            )
        if not joined and not overlays(page):
            raise Unsupported(
                f"{name} cannot be laid over {names[0]}: it chooses by itself, as {names[0]} does"
            )
        require(names.count(name) == 1, "a method is laid over another once", method="+".join(names))
        before = page
    if getattr(before, "joins", ""):
        raise Unsupported(
            f"{names[-1]} joins two methods; the second stands after it: {'+'.join(names)}+OTHER"
        )


def config_of(base: Named, over: tuple[Named, ...]) -> type:
    """The base's Config with a field for the settings of each page over it."""
    below: Any = base[1].config
    own = {f.name for f in fields(below)}
    for name, _ in over:
        require(
            name not in own,
            "a method that is laid over another has a name that is no setting of it",
            name=name,
        )
    parts = [(name, page.config, field(default_factory=page.config)) for name, page in over]

    def reduced(cfg: Any) -> tuple:
        return configured, ((base, *over), {f.name: getattr(cfg, f.name) for f in fields(cfg)})

    space = {"__reduce__": reduced, "__doc__": below.__doc__}
    return make_dataclass("Config", parts, bases=(below,), frozen=True, namespace=space)


def configured(parts: tuple[Named, ...], settings: Mapping[str, Any]) -> Any:
    """The Config of a composed page again, where it was pickled."""
    return composed(*parts).config(**settings)


def stacked(base: Named, over: tuple[Named, ...], cfg: Any) -> Any:
    """What acts under these settings."""
    return _stacked(base, over, tuple(getattr(cfg, name) for name, _ in over))


@cache
def _stacked(base: Named, over: tuple[Named, ...], configs: tuple) -> Any:
    page: Any = base[1]
    rest: Any = iter(zip(over, configs, strict=True))
    for (_, outer), cfg in rest:
        if getattr(outer, "joins", ""):
            (_, other), own = next(rest)
            page = outer.wrap(page, cfg, other, own)
        else:
            page = outer.wrap(page, cfg)
    return page


def acting(base: Named, over: tuple[Named, ...], name: str) -> Callable:
    """A function of the page whose last argument says the settings: of a view, or of the settings alone."""

    def act(*args: Any) -> Any:
        function = getattr(stacked(base, over, args[-1]), name)
        return None if function is None else function(*args)  # some settings leave it out

    act.__name__ = name
    return act
