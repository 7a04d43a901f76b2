"""What every page has, whatever its kind, and a page with its settings."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from typing import Any

from regard.core.card import Card
from regard.core.deprecation import moved, warn
from regard.core.settings import fitted

PATTERNS = ("self", "causal_self", "cross", "causal_cross")


@dataclass(frozen=True, eq=False)
class Page:
    """One paper: `config` is a frozen dataclass of its settings, defaults the paper's.

    `kind` names the contract (a module of regard.kinds); `patterns` are those of causal_self, self, cross and
    causal_cross that it can do; `test_settings` are small settings under which its checks run beside the defaults.
    """

    config: type
    card: Card
    kind = "page"
    patterns: tuple[str, ...] = ()
    test_settings: tuple[Mapping[str, Any], ...] = ()
    parts: tuple[
        tuple[str, "Page"], ...
    ] = ()  # (name, page) of a page that is made of others (core/composed.py)

    def configure(self, **settings: Any) -> Any:
        """The page's Config with these settings; a name or value that it does not take is an error."""
        return self.config(**fitted(self.card.title, self.config, settings))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as what it is, the METHOD of its module, whatever functions it is made of."""
        if self.parts:
            return import_module("regard.core.composed").composed, self.parts
        where = self.config.__module__
        if getattr(sys.modules.get(where), "METHOD", None) is self:
            return page_of, (where,)
        return super().__reduce_ex__(protocol)


def page_of(module: str) -> Page:
    """The page that a module defines."""
    return import_module(module).METHOD


@dataclass(frozen=True)
class Kind:
    """What the pages of one kind have in common; each module of regard.kinds defines one as KIND.

    page    the class that a page of this kind makes its METHOD of
    says    what such a page says, in a line
    verb    what a user does with it, as a line of Python in which NAME stands for the page
    room    where its pages lie in the package: a folder whose subfolders are families
    checks  "module:function" of what a page must pass: function(name) -> {law: verdict}
    costs   whether a page of this kind takes time and holds a state, which its card then says
    """

    name: str
    page: type[Page]
    says: str
    verb: str
    room: str
    checks: str
    costs: bool = False


@dataclass(frozen=True)
class Method:
    """A configured page: what `regard.method(name, **config)` returns and `attach`, `compare` and `attend` take."""

    name: str
    page: Any  # a Page of any kind
    config: Any

    def with_settings(self, **settings: Any) -> "Method":
        """The same page with these settings changed; a setting it does not have is an error with the near names."""
        return replace(self, config=self.page.configure(**{**vars(self.config), **settings}))

    def with_(self, **settings: Any) -> "Method":
        """The old name of with_settings."""
        warn("Method.with_", "Method.with_settings")
        return self.with_settings(**settings)

    def __str__(self) -> str:
        return self.label

    @property
    def label(self) -> str:
        """Name and the settings that differ from the page's defaults: `streaming_llm(budget=0.1)`."""
        changed = changed_settings(self.config, self.page.config())
        shown = [
            f"{name}={value!r}" if isinstance(value, str) else f"{name}={value}" for name, value in changed
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def changed_settings(config: Any, default: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(name, value) of the settings that differ from the defaults; of pages laid over, `name.setting`."""
    changed: list[tuple[str, Any]] = []
    for f in fields(config):
        value, usual = getattr(config, f.name), getattr(default, f.name)
        if is_dataclass(value) and type(value) is type(usual):
            changed += changed_settings(value, usual, f"{prefix}{f.name}.")
        elif value != usual:
            changed.append((prefix + f.name, value))
    return changed


_moved = moved(__name__, {f"{kind}Page": f"regard.core:{kind}Page" for kind in ("Mask", "Cache", "Position")})


def __getattr__(name: str) -> Any:
    return _moved(name)
