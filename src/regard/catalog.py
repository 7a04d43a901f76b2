"""The catalogue finds its pages by where they lie, in the package and outside it; a page is imported when asked for.

Pages of one's own come from `register(path or module)`, from the files and folders that the environment variable
REGARD_PAGES names (separated as in PATH), and from installed packages with an entry point in the group `regard.pages`.
Names are found without torch, which is imported with the first page or kind.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from fnmatch import fnmatch
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from regard.core import Method, Page, Unsupported, require, unknown
from regard.core.composed import composed, overlays
from regard.core.deprecation import warn
from regard.core.pages import changed_settings
from regard.core.spec import parse_spec
from regard.kinds import kind as kind_of
from regard.kinds import kinds
from regard.kinds.task import PictureTask, Task, TaskPage, ask, ask_pictures

HERE = Path(__file__).parent
ROOMS = ("methods/*/[!_]*.py", "methods/*/*/[!_]*.py", "tasks/[!_]*.py")
PAGES = "REGARD_PAGES"
GROUP = "regard.pages"

_registered: dict[str, str] = {}  # name -> path or module of a page of one's own


@cache
def built_in() -> dict[str, str]:
    """Name -> module of every page of the package, in alphabetical order: files of the rooms that define METHOD."""
    modules: dict[str, str] = {}
    for path in sorted((p for room in ROOMS for p in HERE.glob(room)), key=lambda p: p.stem):
        if not defines_page(path):
            continue
        module = "regard." + ".".join(path.relative_to(HERE).with_suffix("").parts)
        require(path.stem not in modules, "two pages share a name", one=modules.get(path.stem), other=module)
        modules[path.stem] = module
    return modules


def defines_page(path: Path) -> bool:
    return "\nMETHOD = " in path.read_text(encoding="utf8")


@cache
def installed() -> dict[str, str]:
    """Name -> module of the pages that other packages bring: entry points of the group `regard.pages`."""
    return {point.name: point.value.partition(":")[0] for point in entry_points(group=GROUP)}


@cache
def named_in(variable: str) -> dict[str, str]:
    """Name -> file of the pages that REGARD_PAGES names."""
    files: dict[str, str] = {}
    for part in filter(None, variable.split(os.pathsep)):
        path = Path(part).expanduser()
        require(path.exists(), f"{PAGES} names files and folders that exist", path=part)
        for file in sorted(path.glob("[!_]*.py")) if path.is_dir() else [path]:
            if defines_page(file):
                files[file.stem] = str(file.resolve())
    return files


def pages() -> dict[str, str]:
    """Name -> module, or file, of every page, in alphabetical order."""
    outside = {**installed(), **named_in(os.environ.get(PAGES, "")), **_registered}
    for name, where in outside.items():
        require(name not in built_in(), "a page of one's own has a name of its own", name=name, page=where)
    return dict(sorted({**built_in(), **outside}.items()))


def register(page: str | Path | ModuleType) -> str:
    """Add a page of one's own, a file or a module that defines METHOD; the name under which it is found now.

    A file of JSON lines, NAME.jsonl, is a task: regard.tasks.own says what its lines hold.

    It is listed, checked, compared and attached like the pages of the package, in this process and in those that
    `compare` starts.
    """
    if isinstance(page, ModuleType):
        name, where = page.__name__.rpartition(".")[2], page.__name__
        require(
            isinstance(getattr(page, "METHOD", None), Page),
            "a page defines METHOD, a page of some kind",
            module=where,
        )
    else:
        path = Path(page).expanduser().resolve()
        require(path.is_file(), "a page is a file that exists, or a module", page=str(page))
        own = path.suffix == ".jsonl"
        require(own or defines_page(path), "a page defines METHOD", page=str(page))
        rule = "the name of a page is one of letters, digits, _, - and ."
        require(re.fullmatch(r"[\w.-]+", path.stem), rule, name=path.stem, page=str(page))
        name, where = path.stem, str(path)
    require(name not in built_in(), "a page of one's own has a name of its own", name=name, page=where)
    before = _registered.get(name)
    _registered[name] = where
    try:
        get(name)
    except BaseException:  # what is refused is not there afterwards
        del _registered[name]
        _registered.update({} if before is None else {name: before})
        raise
    return name


def registered() -> dict[str, str]:
    """Name -> file or module of what `register` was given here."""
    return dict(_registered)


def adopt(pages: dict[str, str]) -> None:
    """Take over what another process had registered."""
    _registered.update(pages)


def path_of(name: str) -> Path:
    """The file of a page."""
    where = pages()[name]
    if name in built_in():
        return HERE / Path(*where.split(".")[1:]).with_suffix(".py")
    return Path(where) if where.endswith((".py", ".jsonl")) else Path(import_module(where).__file__ or where)


def revision_of(name: str) -> str | None:
    """What the file of a page of one's own holds, as a hash; None for pages of the package, which have its version."""
    if "+" in name:
        held = [revision for part in name.split("+") if (revision := revision_of(part)) is not None]
        return "+".join(held) or None
    return None if name in built_in() else sha256(path_of(name).read_bytes()).hexdigest()[:12]


def family_of(name: str) -> str:
    """The folder within the room of its kind, such as "linear"; "" for pages that lie in none."""
    if name not in built_in():
        return ""
    parts = built_in()[name].split(".")
    return parts[3] if len(parts) > 4 else ""


def get(name: str) -> Page:
    """The page of this name; KeyError with the near names if there is none."""
    if "+" in name:
        return composed(*((part.strip(), get(part.strip())) for part in name.split("+")))
    known = pages()
    if name not in known:
        raise unknown("method", name, known)
    where = known[name]
    if where.endswith(".jsonl"):
        from regard.tasks.own import own_task

        return own_task(Path(where))
    page = (imported(Path(where)) if where.endswith(".py") else import_module(where)).METHOD
    require(
        isinstance(page, Page) and page.kind in kinds(),
        "METHOD is a page of a known kind",
        name=name,
        page=page,
    )
    return page


@cache
def imported(path: Path) -> ModuleType:
    """A file outside the package as a module."""
    spec = importlib.util.spec_from_file_location(f"regard_page_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    # dataclasses look for their module there
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def method(name: str, **config: Any) -> Method:
    """A configured page, `method("streaming_llm", sinks=4, window=512)`; a name may bring settings: "h2o:budget=20%".

    Of methods laid over one another, `method("snapkv+adakv", window=16, floor=0.1)`; one that is laid over others lies
    over the one that its page names where none is given.
    """
    spec, (name, settings) = name, parse_spec(name)
    twice = sorted({*settings} & {*config})
    require(not twice, "every setting is given once", twice=twice, method=spec)
    page: Any = get(name)
    if overlays(page):
        from regard.kinds.cache import WHOLE

        base = get(page.over) if page.over else WHOLE
        after = ((page.joins, get(page.joins)),) if page.joins else ()
        page = composed((page.over or "full", base), (name, page), *after)
    return Method(name, page, page.configure(**settings, **config))


def takes_budget(name: str) -> bool:
    """Whether a method has a budget: a cache method that keeps or reads a part of the tokens."""
    acting = method(name).page
    return acting.kind == "cache" and any(f.name == "budget" for f in fields(acting.config))


def laid_over(methods: Iterable[Method]) -> Method:
    """One method of several, in the order in which they are given: one that chooses, and those laid over it."""
    base, *over = methods
    names = "+".join(m.name for m in (base, *over))
    page, settings = get(names), {f.name: getattr(base.config, f.name) for f in fields(base.config)}
    for m in over:
        below = {
            name: value for name, value in changed_settings(m.config, m.page.config()) if "." not in name
        }
        require(not below, f"what lies below {m.name} has its settings itself, in {base.name}", **below)
        settings[m.name] = getattr(m.config, m.name)
    return Method(names, page, page.configure(**settings))


def from_spec(spec: str | Method, kind: str | None = None) -> Method:
    """A configured page as people type it, "streaming_llm:sinks=8"; `kind` says which kind it has to be."""
    configured = spec if isinstance(spec, Method) else method(spec)
    if kind is not None and configured.page.kind != kind:
        known = ", ".join(list_methods(kind=kind))
        raise Unsupported(
            f"{configured.name} is a {configured.page.kind} page; here stand {kind} pages: {known}"
        )
    return configured


def task(name: str | Method, **config: Any) -> Task:
    """A task with its settings, as questions for a language model; a name may bring them: "needle:digits=3".

    >>> task("needel")
    Traceback (most recent call last):
    ...
    KeyError: "no task is called 'needel'; near names: needle"
    """
    if not isinstance(name, str):
        return ask(name.with_settings(**config))
    name, settings = parse_spec(name)
    known = list_methods(kind="task")
    if name not in known:
        raise unknown("task", name, known)
    return ask(method(name, **{**settings, **config}))


def picture_task(name: str | Method, **config: Any) -> PictureTask:
    """A task of images with its settings, as questions for a vision-language model: "pope:split=popular"."""
    settings: dict[str, Any] = {}
    if isinstance(name, str):
        name, settings = parse_spec(name)
        known = list_methods(kind="task")
        if name not in known:
            raise unknown("task", name, known)
        name = method(name)
    return ask_pictures(name.with_settings(**{**settings, **config}))


def asks_pictures(name: str) -> bool:
    """Whether the task of this name, which may bring settings, is about images."""
    page = get(parse_spec(name)[0])
    return isinstance(page, TaskPage) and page.pictures is not None


def metric_of(name: str) -> str:
    """The metric of a task, of whatever sort."""
    return (picture_task if asks_pictures(name) else task)(name).metric


def grouped_tasks(names: Iterable[str]) -> list[str]:
    """Names of tasks, those of a group in the place of its name; each once.

    >>> grouped_tasks(["needle", "perplexity", "needle"])
    ['needle', 'perplexity']
    """
    groups: dict[str, list[str]] = {}
    for name in list_methods(kind="task"):
        groups.setdefault(getattr(get(name), "group", ""), []).append(name)
    groups.pop("", None)
    expanded = (groups.get(name, [name]) for name in names)
    return list(dict.fromkeys(chain.from_iterable(expanded)))


def standard_tasks() -> list[str]:
    """The tasks that compare asks when none are named."""
    tasks = ((name, get(name)) for name in list_methods(kind="task"))
    return [name for name, page in tasks if isinstance(page, TaskPage) and page.standard]


def as_mask(mask: Any, pattern: str = "self") -> Any:
    """A mask page, by its name or with its settings, as the Mask that it builds; all else as it is.

    Unsupported where a page's point is to look ahead, and `pattern` is causal_self, which would hide it.
    """
    if isinstance(mask, str):
        mask = method(mask)
    from regard.kinds.mask import build_mask

    return build_mask(mask, causal=pattern == "causal_self") if isinstance(mask, Method) else mask


def kind_by_room(name: str) -> str | None:
    """The kind of a page of the package, by where it lies; None for pages of one's own, which have to be asked."""
    where = built_in().get(name, "") + "."
    rooms = {kind.name: f"regard.{kind.room.replace('/', '.')}." for kind in kinds().values()}
    return next((kind for kind, room in rooms.items() if where.startswith(room)), None)


def every() -> Iterator[tuple[str, Page]]:
    """(name, page) of all."""
    return ((name, get(name)) for name in pages())


def list_methods(
    filter: str = "*", *, kind: str | None = None, pattern: str | None = None, family: str | None = None,
    needs: str | None = None,
) -> list[str]:  # fmt: skip
    """Names of the pages that fit: a name with wildcards, a kind, a pattern that it can do, a family, what it needs.

    >>> list_methods("linear*")
    ['linear_attention']
    >>> list_methods("re*", kind="cache")
    ['recycled_attention']
    """
    if kind is not None:
        kind_of(kind)
    return [
        name
        for name in pages()
        if fnmatch(name, filter)
        and (kind is None or kind_by_room(name) in (None, kind))
        and (page := get(name)).kind == (kind or page.kind)
        and (pattern is None or pattern in page.patterns)
        and family in (None, family_of(name))
        and (needs is None or needs in page.card.needs)
    ]


def find(kind: str | None = None, pattern: str | None = None) -> list[str]:
    """The old name of list_methods."""
    warn("regard.find", "regard.list_methods")
    return list_methods(kind=kind, pattern=pattern)
