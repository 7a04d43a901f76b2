"""Every option moves its result: a setting under another valid value gives something else, on both paths the same.

`moving(page)` says for each field of a page's Config under which change the result differs, None where under none.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from itertools import chain, islice
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from regard.core import Page, Unsupported
from regard.kinds.block import BlockPage
from regard.kinds.mask import MaskPage
from regard.kinds.mechanism import Mechanism
from regard.kinds.position import PositionPage
from regard.testing.block import DEPTHS, BlockCase
from regard.testing.case import Case, Inputs, NotApplicable, same
from regard.testing.labels import example_roles
from regard.testing.laws.grids import on_grid, sides_in
from regard.testing.mask import odd_settings
from regard.testing.position import where
from regard.testing.twice import leaves

N, SEEN = 41, 1e-7
Result = list[Tensor]


def other_values(annotation: Any, value: Any) -> Iterator[Any]:
    """Values near this one, and small ones, of the types that the annotation allows."""
    kinds = set(get_args(annotation)) or {annotation}
    if isinstance(value, bool):
        yield not value
        return
    yield from (word for word in kinds if isinstance(word, str) and word != value)
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            for other in other_values(type(part), part):
                yield (*value[:i], other, *value[i + 1 :])
        yield from (value[::-1], value[1:] + value[:1])  # of shares that add up to 1
        yield from ((1, 0), (0,), (1,), (2,), (0.5,), (0, 1), (1.0, 2.0), (2, 2))
    if type(value) is int or (value is None and int in kinds):
        near = () if value is None else (value + 1, value - 1, 2 * value, value // 2)
        yield from (x for x in (*near, 1, 2, 3, 5, 9, 20, 64) if x != value)
    if type(value) is float or (value is None and float in kinds):
        near = () if value is None else (1.5 * value, 0.5 * value, value + 0.3)
        yield from (x for x in (*near, 0.0, 0.3, 0.7, 1.0, 2.0, 8.0) if x != value)
    if value is not None and type(None) in kinds:
        yield None


def words(cfg: Any, name: str) -> list[str]:
    """The words that a setting of type str takes, as its error names them."""
    if not isinstance(getattr(cfg, name), str):
        return []
    try:
        replace(cfg, **{name: "no_such_word"})
    except ValueError as error:
        return [w for w in re.findall(r"\w+", str(error)) if w != getattr(cfg, name)]
    return []


def changes(cfg: Any, name: str) -> Iterator[Any]:
    """The settings with other values of one field, those that the Config takes."""
    values = other_values(get_type_hints(type(cfg))[name], getattr(cfg, name))
    for value in chain(values, words(cfg, name)):
        try:
            yield replace(cfg, **{name: value})
        except (ValueError, TypeError):
            continue


def differ(a: Result, b: Result) -> bool:
    """Whether two results, tensor by tensor, are not the same numbers."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return True
    return any(
        float((x.double() - y.double()).abs().nan_to_num(0).max()) > SEEN for x, y in zip(a, b) if x.numel()
    )


def moving(page: Page, skipped: Collection[str] = ()) -> dict[str, str | None]:
    """For each field that is no setting of speed the change that moves the result: "window=3 -> 4", or None."""
    found: dict[str, str | None] = {}
    idle = {*getattr(page, "speed_settings", ()), *counts(page), *skipped}
    for name in (f.name for f in fields(page.config) if f.name not in idle):
        found[name] = next(moved_by(page, name), None)
    return found


def counts(page: Page) -> set[str]:
    """Settings that say how many tokens there are: they go with the inputs."""
    change = getattr(page, "for_tokens", None)
    if change is None:
        return set()
    one, other = (vars(change(page.config(), n)) for n in (N, N + 2))
    return {name for name in one if one[name] != other[name]}


def moved_by(page: Page, name: str) -> Iterator[str]:
    # what only says how parameters begin is asked with those that belong to the other value
    for begin in (False, True) if isinstance(page, Mechanism | BlockPage) and page.init else (False,):
        for ask, cfg in questions(page):
            base = ask(cfg, cfg)
            for other in islice(changes(cfg, name), 14):
                try:
                    result = ask(other, other if begin else cfg)
                except (
                    Unsupported,
                    NotApplicable,
                    NotImplementedError,
                    ValueError,
                    RuntimeError,
                    IndexError,
                ):
                    continue  # a value that these inputs do not fit
                if differ(result, base):
                    yield f"{name}={getattr(cfg, name)!r} -> {getattr(other, name)!r}"


def questions(page: Page) -> Iterator[tuple[Callable[[Any, Any], Result], Any]]:
    """(ask, settings): ask(settings, those before the change) gives what is compared."""
    configs = [page.configure(**options) for options in (*page.test_settings, {})]
    if isinstance(page, Mechanism):
        for cfg in dict.fromkeys(configs):
            for pattern in page.patterns:
                yield mechanism(page, pattern), cfg
    elif isinstance(page, BlockPage):
        depths = DEPTHS if {"layer", "layers"} <= {f.name for f in fields(page.config)} else ()
        configs += [replace(cfg, layer=layer, layers=layers) for cfg in configs for layer, layers in depths]
        yield from ((block(page), cfg) for cfg in dict.fromkeys(configs))
    elif isinstance(page, MaskPage | PositionPage):
        configs += [page.config(**options) for options in odd_settings(page)]
        yield from ((places(page), cfg) for cfg in dict.fromkeys(configs))
    else:
        yield from twice(page)


def mechanism(page: Mechanism, pattern: str) -> Callable[[Any, Any], Result]:
    def ask(cfg: Any, before: Any) -> Result:
        return both_paths(Case(page, cfg, pattern), Case(page, before, pattern).inputs(N, N + 2))

    return ask


def block(page: BlockPage) -> Callable[[Any, Any], Result]:
    def ask(cfg: Any, before: Any) -> Result:
        return both_paths(BlockCase(page, cfg, page.pattern), BlockCase(page, before, page.pattern).inputs(N))

    return ask


def both_paths(case: Case, inputs: Inputs) -> Result:
    """What the reference gives, which is what fast gives; parameters stay where the settings keep their shapes."""
    # a grid stays, whatever the settings
    own = case.inputs(N, N + 2) if case.page.grid is None else on_grid(case, sides_in(inputs), N)
    alike = {n: p.shape for n, p in own.params.items()} == {n: p.shape for n, p in inputs.params.items()}
    inputs = own if not alike else replace(inputs, x=own.x, y=own.y, roles=own.roles)
    outs = [case.run(path, inputs)[0] for path in case.paths.values()]
    for out in outs[1:]:
        same(f"{case.page.card.title}, {case.cfg}, {case.pattern}: fast = reference", out, outs[0], case.tol)
    return outs[:1]


def places(page: MaskPage | PositionPage) -> Callable[[Any, Any], Result]:
    """What tokens see, and where they stand."""

    def ask(cfg: Any, before: Any) -> Result:
        found = []
        roles = example_roles({*page.card.needs, "padding"}, N, before)
        if isinstance(page, PositionPage):
            found.append(where(page, cfg, roles))
        if page.build is not None:
            mask = page.build(cfg)
            found.append(mask.dense(N, roles=roles if mask.needs else None).long())
        return found

    return ask


def twice(page: Any) -> Iterator[tuple[Callable[[Any, Any], Result], Any]]:
    """A page whose mathematics is given twice: on its own cases, with the settings in them changed."""
    for case in (case for seed in range(2) for case in page.cases(seed)):
        at = [i for i, part in enumerate(case) if isinstance(part, page.config)]
        if not at:
            continue

        def ask(cfg: Any, before: Any, case: tuple = case, at: int = at[0]) -> Result:
            args = (*case[:at], cfg, *case[at + 1 :])
            found, wanted = leaves(page.measure(*args)), leaves(page.reference(*args))
            for x, y in zip(found, wanted, strict=True):
                near = 1e-9 if x.dtype == torch.float64 else 1e-5
                same(f"{page.card.title}, {cfg}: measure = reference", x.double(), y.double(), near)
            return found

        yield ask, case[at[0]]
