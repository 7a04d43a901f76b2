"""What a comparison is asked: methods, tasks, lengths and budgets as people give them, and the cells of their grid."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from regard import catalog
from regard.attaching.converted import marker
from regard.attaching.knob import Target
from regard.attaching.sparse import is_sparse
from regard.bench.cell import FULL, Cell
from regard.bench.prefill import leaves_unread
from regard.bench.words import FILES
from regard.core import Method, Page, Unsupported, require
from regard.core.errors import present
from regard.core.pages import changed_settings
from regard.core.spec import parse_spec, split_specs
from regard.kinds.mask import build_mask, refuse_ahead
from regard.kinds.task import Task
from regard.ops import parse_budget

BUDGETS = (0.1, 0.25, 0.5)
LENGTHS = (256, 512, 1024)
SAMPLES = 8
OWN = (0,)  # the length of questions of one's own, which have lengths of their own
RUNNING_TEXT = "perplexity"  # the task whose texts are read where times are measured


def grid(
    methods, tasks, lengths, budgets, samples, seed, text, chat, timing=True, at_floor=False, system=None
) -> list[Cell]:
    """The cells of a comparison, full attention first, those of one task and length together; then what is timed."""
    budgets = tuple(parse_budget(budget) for budget in (BUDGETS if budgets is None else listed(budgets)))
    lengths = tuple(LENGTHS if lengths is None else listed(lengths))
    sizes = sizes_of(task_names(tasks), lengths, samples)
    require(budgets, "there is at least one budget", budgets=budgets)
    chosen = [parsed(m) for m in (catalog.list_methods(kind="cache") if methods is None else specs(methods))]
    require(chosen, "methods names at least one", methods=methods)
    read: dict[str, Any] = dict(seed=seed, text=None if text is None else str(text))
    asked: list[tuple[str, Any, dict]] = [(FULL, None, {})]
    for name, settings in chosen:
        if name != FULL:
            each = budgets if catalog.takes_budget(name) else (None,)
            asked += [(name, budget, settings) for budget in each]
    rest = dict(chat=chat, system=system, at_floor=at_floor, **read)
    cells = [
        Cell(name, task, length, budget, settings, samples=count, **rest)
        for task, length, count in sizes
        for name, budget, settings in asked
    ]
    return cells + (times(sizes, lengths, chosen, asked, read) if timing else [])


def times(sizes, lengths, chosen, asked, read) -> list[Cell]:
    """Cells of times: of each length once, of each task of one's own; from which length on a sparse prefill pays."""
    timed = dict.fromkeys((task if n in OWN else RUNNING_TEXT, n, count if n in OWN else 1)
                          for task, n, count in sizes)  # fmt: skip
    cells = [
        Cell(name, task, length, budget, settings, samples=count, what="timing", **read)
        for task, length, count in timed
        for name, budget, settings in asked
    ]
    partial = [pair for pair in chosen if pair[0] != FULL and catalog.get(pair[0]).kind != "cache"]
    return cells + [
        Cell(name, RUNNING_TEXT, max(lengths), None, settings, samples=1, what="crossing", **read)
        for name, settings in partial
    ]


def sizes_of(tasks: Sequence[str], lengths: Sequence[int], samples: int | None) -> list[tuple[str, int, int]]:
    """(task, length, samples) of each group of cells; of one's own questions all, where nobody says how many."""
    require(tasks and lengths, "there is at least one task and one length", tasks=tasks, lengths=lengths)
    require(samples is None or samples >= 1, "samples >= 1", samples=samples)
    whole = all(isinstance(n, int) and n >= 2 for n in lengths)
    require(whole, "lengths are whole numbers, at least 2 tokens", lengths=lengths)
    found = []
    for task in tasks:
        own = catalog.task(task).own
        count = min(samples or own, own) if own else samples or SAMPLES
        found += [(task, length, count) for length in (OWN if own else lengths)]
    return found


def listed(given: Any) -> list[Any]:
    """What is given as one, or as several."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Path)
    return list(given) if several else [given]


def specs(given: Any) -> list[Any]:
    """Methods or tasks as they are given: one or several, texts with commas, files, pages, methods."""
    parts = [split_specs(part) if isinstance(part, str) else [part] for part in listed(given)]
    for part, found in zip(listed(given), parts, strict=True):
        require(found, "a name is no empty text", given=part)
    return [spec for found in parts for spec in found or ()]


def task_names(tasks: Any) -> list[str]:
    """Names of the tasks that are asked, with their settings, groups unfolded; files are registered."""
    if tasks is None:
        return catalog.standard_tasks()
    names = catalog.grouped_tasks([named(task) for task in specs(tasks)])
    for name in names:
        catalog.task(name)
    return names


def named(given: Any) -> str:
    """A method or a task by name, with its settings: from a text, a file that is registered, a page or a Method."""
    if isinstance(given, str | Path):
        return of_file(str(given))
    if isinstance(given, Task):
        rule = "a Task is one of the catalogue's: regard.catalog.task(name, ...), or the file of one's own"
        made_of = getattr(given.samples, "args", ())  # the page's settings, of one that the catalogue made
        require(made_of, rule, task=given.name)
        given = Method(given.name, catalog.get(given.name), made_of[0])
    if isinstance(given, Method):
        changed = changed_settings(given.config, given.page.config())
        said = ",".join(f"{key}={value!r}" for key, value in changed)
        return f"{given.name}:{said}" if said else given.name
    rule = "a method or a task is given by name, as a file, a page of the catalogue or a Method"
    require(isinstance(given, Page), rule, given=given)
    known = next((name for name, page in catalog.every() if page is given), None)
    return present(known, "a page is in the catalogue: regard.register(its file)", page=given.card.title)


def of_file(spec: str) -> str:
    """The name of what a text names; where it is a file of one's own, that is registered: "my_page.py:window=4"."""
    where, colon, settings = spec.partition(":")
    if Path(where).suffix not in FILES:
        return spec
    return f"{catalog.register(where)}{colon}{settings}"


def parsed(given: Any) -> tuple[str, dict]:
    """("streaming_llm", {"sinks": 8}) from "streaming_llm:sinks=8"; the page checks names and values."""
    if isinstance(given, Method):
        name, settings = given.name, dict(changed_settings(given.config, given.page.config()))
    else:
        name, settings = parse_spec(named(given))
    rule = "budgets are asked of all methods, with budgets="
    require("budget" not in settings, rule, method=name, budget=settings.get("budget"))
    if name != FULL:
        target, learned = settings.get("target"), settings.get("learned")
        own = {key: value for key, value in settings.items() if key not in ("target", "learned")}
        method = catalog.method(name, **own)
        check_comparable(method)
        check_learned(method, learned)
        if target is not None:
            Target.parse(target)
            known = is_sparse(method) and method.page.knob is not None
            require(
                known,
                "a target is for mechanisms that choose blocks by a setting",
                method=name,
                target=target,
            )
    return name, settings


def check_learned(method: Method, folder: str | None) -> None:
    """What a page learned on the model comes from a conversion's folder."""
    learns = method.page.kind == "mechanism" and method.page.init is not None
    require(
        folder is None or learns,
        "learned= is for pages that learn on a model",
        method=method.name,
        learned=folder,
    )
    if not learns:
        return
    hint = f"regard convert MODEL --mechanism {method.name} --out FOLDER, then {method.name}:learned=FOLDER"
    require(folder is not None, f"this page learns on the model first: {hint}", method=method.name)
    held = marker(Path(str(folder)))["method"]
    require(held == method.name, "the folder holds what this page learned", method=method.name, holds=held)


def check_comparable(method: Method) -> None:
    """Cache pages, masks that need no roles, mechanisms that choose blocks of keys; all else is refused by name."""
    if method.page.kind == "mask":
        refuse_ahead(method)
        needs = build_mask(method, causal=True).needs
        require(
            not needs,
            "a mask of compare reads no roles: nobody gives them here",
            mask=method.name,
            needs=needs,
        )
    elif method.page.kind != "cache" and not leaves_unread(method):
        known = ", ".join(catalog.list_methods(kind="cache"))
        raise Unsupported(
            f"{method.name} is a {method.page.kind} page; here stand cache pages, masks, and mechanisms that choose "
            f"blocks of keys (regard list --family sparse): {known}"
        )
