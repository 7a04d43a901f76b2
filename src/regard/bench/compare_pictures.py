"""`regard.compare` on tasks of images: every method beside the model's own answers, its controls and its cost."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from regard import catalog
from regard.bench.cell import FULL, Cell
from regard.bench.executor import Executor
from regard.core import Unsupported, require
from regard.core.spec import parse_spec
from regard.models.shipped import is_vision, load_shipped, load_vision, shipped_name
from regard.report.folder import Folder, keys_of
from regard.report.picture_page import to_html, to_markdown
from regard.report.pictures import PictureResult

TASKS = ("pope", "chair")
ALWAYS = ("random_tokens", "uniform_grid", "downsampling")  # in every table that has a tokens method


def picture_tasks(tasks: Iterable[str] | None, model: Any) -> tuple[str, ...] | None:
    """The tasks, where they are about images; None where they are about text. A mixture is refused."""
    if tasks is None:
        return TASKS if not isinstance(model, tuple) and model is not None and is_vision(model) else None
    tasks = tuple(catalog.grouped_tasks(tasks))
    about = [catalog.asks_pictures(name) for name in tasks]
    require(all(about) or not any(about), "tasks are all about images, or all about text", tasks=tasks)
    return tasks if any(about) else None


def picture_grid(
    methods: Iterable[str] | None, tasks: Iterable[str], samples: int, seed: int, source: str | Path | None
) -> list[Cell]:
    """The model as it is first, then each method; random and plain reductions beside every tokens method."""
    known = [name for kind in ("steering", "tokens") for name in catalog.list_methods(kind=kind)]
    asked = [name for name in known if getattr(catalog.get(name), "acts_on_models", True)]
    standard = [name for name in asked if getattr(catalog.get(name), "standard", True)]
    specs = [parse_spec(spec) for spec in (standard if methods is None else methods)]
    for name, settings in specs:
        if name == FULL:
            continue
        kind = catalog.method(name, **settings).page.kind
        if kind not in ("steering", "tokens"):
            raise Unsupported(
                f"{name} is a {kind} page; tasks of images compare steering and tokens pages: {', '.join(asked)}"
            )
    reductions = [settings for name, settings in specs if name != FULL and catalog.get(name).kind == "tokens"]
    if reductions:
        keep = next((s["keep"] for s in reductions if "keep" in s), None)
        named = {name for name, _ in specs}
        specs += [(name, {} if keep is None else {"keep": keep}) for name in ALWAYS if name not in named]
    rest: dict[str, Any] = dict(
        length=0, seed=seed, samples=samples, text=None if source is None else str(source), what="pictures"
    )
    specs = [(name, settings) for name, settings in specs if name != FULL]
    return [
        Cell(name, task, settings=settings, **rest)
        for task in tasks
        for name, settings in [(FULL, {}), *specs]
    ]


def vision_loader(
    model: Any, trust_remote_code: bool, device: str | None
) -> tuple[str, Callable[[], tuple[Any, Any]]]:
    """A name for the run's header, and a function that gives (model, processor) in any process."""
    if isinstance(model, tuple):
        return type(model[0]).__name__, lambda: model
    name = shipped_name(model if model is not None else "vlm")
    if name is not None:
        rule = "tasks of images ask a vision-language model"
        require(is_vision(name), rule, model=name)
        return f"the shipped model {name!r}", partial(load_shipped, name, device or "cpu")
    require(is_vision(model), "tasks of images ask a vision-language model", model=str(model))
    return str(model), partial(load_vision, str(model), trust_remote_code, device)


def run_pictures(
    cells: list[Cell], runner: Executor, load: Callable, header: dict, out: str | Path, retry: bool,
    progress: Callable[[dict | None, int, int], None],
) -> PictureResult:  # fmt: skip
    """Measure what is not on disk yet; rows, report.html and report.md in `out`."""
    folder = Folder(Path(out))
    kept = keys_of(folder.open(header), retry)
    todo = [c for c in cells if c.key not in kept]
    progress(None, len(cells) - len(todo), len(cells))
    for count, row in enumerate(runner.run(todo, load), len(cells) - len(todo) + 1):
        folder.add(row)
        progress(row, count, len(cells))
    result = PictureResult.load(folder.path)
    folder.write("report.html", to_html(result))
    folder.write("report.md", to_markdown(result))
    return result
