"""`regard.compare`: which method is best on this model, these tasks, this budget?"""

import itertools
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from regard import catalog
from regard.attaching.converted import marker
from regard.attaching.knob import Target
from regard.attaching.sparse import is_sparse
from regard.bench.cell import FULL, Cell
from regard.bench.compare_pictures import picture_grid, picture_tasks, run_pictures, vision_loader
from regard.bench.estimate import estimate
from regard.bench.executor import Executor, InProcess, executor_of
from regard.bench.prefill import leaves_unread
from regard.bench.revisions import content, with_revisions
from regard.bench.told import told
from regard.core import Method, Unsupported, require
from regard.core.spec import parse_spec
from regard.kinds.cache import family
from regard.kinds.mask import build_mask, refuse_ahead
from regard.models.shipped import load, load_shipped, refuse_misspelt, shipped_name, stored_dtype
from regard.ops import parse_budget
from regard.ops.machine import cpu_facts, slow_on_cpu
from regard.report.folder import Folder, keys_of
from regard.report.html import task_pages, to_html
from regard.report.markdown import to_markdown
from regard.report.pictures import PictureResult
from regard.report.result import Result

BUDGETS = (0.1, 0.25, 0.5)
LENGTHS = (256, 512, 1024)
SAMPLES, PICTURES = 8, 64
LOADED = ("float32", "bfloat16", "float16")  # dtypes that a model may be loaded in
RUNNING_TEXT = "perplexity"  # the task whose texts are read where times are measured


def compare(
    model: Any = None,
    methods: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    lengths: Iterable[int] | None = None,
    budgets: Iterable[int | float | str] | None = None,
    *,
    out: str | Path,
    samples: int | None = None,
    seed: int = 0,
    text: str | Path | None = None,
    images: str | Path | None = None,
    chat: bool | None = None,
    workers: int = 2,
    limit: float = 600.0,
    retry: bool = True,
    timing: bool = True,
    at_floor: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    executor: str | Executor | None = None,
    progress: Callable[[dict | None, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Result | PictureResult:
    """Measure methods against full attention on a grid of cells; write results.jsonl, report.html, report.md to `out`.

    model    a path or name, a loaded (model, tokenizer), or None for the shipped language model
    samples  how many texts a cell asks, 8, or images, 64, where nothing is said
    tasks    names, with settings as "needle:digits=3", or of a group ("ruler"); None: those that are standard
    methods  names of cache pages, of masks, and of mechanisms that choose blocks of keys, with settings as
             "streaming_llm:sinks=8"; None: all cache pages. Only cache pages have budgets; of the others it is measured
             too from which length on, up to the longest, their first token comes sooner; "block_topk:target=mass:0.95"
             calibrates one to a share of attention mass, or "sparsity:0.9", on the model and at each length
    lengths  prompt lengths in tokens     budgets  tokens, fractions in (0, 1] or texts like "64MB"
    text     a file of your own to draw filler and perplexity text from
    images   for tasks of images (pope, chair, counting, ocr, grounding), which compare steering and tokens pages: your
             own, a folder or file as regard.tasks.pictures reads it; None: rendered scenes
    workers  local processes of one thread each; a loaded model is measured in this process
    executor where cells run: "local", "submitit:partition=gpu,gpus=1" (Slurm), "ray:address=auto", or an Executor
    device   where a model that is loaded by path goes; None: the GPU where there is one
    dtype    "float32", "bfloat16" or "float16" for a model that is loaded by path; None: as its weights are
    timing   measure prefill and decode of each method, budget and length beside full attention, on running text
    at_floor measure methods also where full attention itself is near what guessing gives: it ranks no method there
    limit    seconds a cell may take      retry    run failed cells of an earlier start again; False: leave them
    progress called with (row, done, total) as cells end, and with (None, done, total) at the start
    say      called, before cells run, with one line on the memory that they will take; run.json has it as "memory"

    Finished cells are on disk at once; the same call resumes, and measures anew where the content of the text, the
    model or a page of one's own is another. The same `out` takes more methods, tasks, lengths and budgets: its report
    is then of all. A cell that fails is a row that says why.
    """
    if isinstance(model, str | Path) and shipped_name(model) is None:
        refuse_misspelt(model)
    about = picture_tasks(tasks, model)
    if about is not None:
        rule = "tasks of images have no lengths, and no budgets: keep= is a setting"
        require(lengths is None and budgets is None, rule, lengths=lengths, budgets=budgets)
        cells = picture_grid(methods, about, PICTURES if samples is None else samples, seed, images)
        runner = runner_of(executor, model, workers, limit, out)
        name, load_model = vision_loader(model, trust_remote_code, device)
        cells = with_revisions(cells, model, dtype)
        return run_pictures(cells, runner, load_model, header(name, cells), out, retry, progress or nothing)
    require(images is None, "images= is for tasks of images", images=images)
    cells = grid(
        methods,
        tasks,
        lengths,
        budgets,
        SAMPLES if samples is None else samples,
        seed,
        text,
        chat,
        timing,
        at_floor,
    )
    runner = runner_of(executor, model, workers, limit, out)
    folder = Folder(Path(out))
    name, load_model = loader(model, trust_remote_code, device, dtype)
    cells = with_revisions(cells, model, dtype)
    memory = estimate(cells, model, runner, device, dtype)
    head = header(name, cells, memory=memory, slow=slow_model(model, device, dtype))
    done = folder.open(head, grows=("methods", "tasks", "lengths", "budgets"))
    kept = keys_of(done, retry)
    todo = [c for c in cells if c.key not in kept]
    progress = progress or nothing
    progress(None, len(cells) - len(todo), len(cells))
    if say is not None and todo:
        say(memory["text"])
    for count, row in enumerate(runner.run(todo, load_model), len(cells) - len(todo) + 1):
        folder.add(row)
        progress(row, count, len(cells))
    return report(folder)


def nothing(row: dict | None, done: int, total: int) -> None:
    """Progress that nobody watches."""


def runner_of(
    executor: str | Executor | None, model: Any, workers: int, limit: float, out: str | Path
) -> Executor:
    """Where the cells run; a loaded model is only here."""
    if isinstance(executor, str):
        here = isinstance(model, tuple)
        rule = "an executor by name loads the model where cells run: give its path or name"
        require(not here, rule, executor=executor, model=type(model[0]).__name__ if here else model)
        return executor_of(executor, workers=workers, limit=limit, out=out)
    if executor is not None:
        return executor
    return (
        InProcess()
        if isinstance(model, tuple)
        else executor_of("local", workers=workers, limit=limit, out=out)
    )


def report(folder: Folder) -> Result:
    """Draw the report of what the folder holds: report.html and report.md."""
    result = Result.load(folder.path)
    folder.write("report.html", to_html(result))
    for at, page in task_pages(result).items():
        folder.write(at, page)
    folder.write("report.md", to_markdown(result))
    return result


def grid(
    methods, tasks, lengths, budgets, samples, seed, text, chat, timing=True, at_floor=False
) -> list[Cell]:
    """The cells of a comparison, full attention first, those of one task and length together; then what is timed."""
    budgets = tuple(parse_budget(budget) for budget in (BUDGETS if budgets is None else budgets))
    lengths = tuple(LENGTHS if lengths is None else lengths)
    tasks = tuple(catalog.standard_tasks() if tasks is None else catalog.grouped_tasks(tasks))
    for name in tasks:
        catalog.task(name)
    require(tasks and lengths, "there is at least one task and one length", tasks=tasks, lengths=lengths)
    require(samples >= 1, "samples >= 1", samples=samples)
    require(all(n >= 2 for n in lengths), "lengths are at least 2 tokens", lengths=lengths)
    chosen = [parsed(m) for m in (catalog.list_methods(kind="cache") if methods is None else methods)]
    read: dict[str, Any] = dict(seed=seed, text=None if text is None else str(text), chat=chat)
    asked: list[tuple[str, Any, dict]] = [(FULL, None, {})]
    for name, settings in chosen:
        if name != FULL:
            each = budgets if catalog.takes_budget(name) else (None,)
            asked += [(name, budget, settings) for budget in each]
    cells = [
        Cell(name, task, length, budget, settings, samples=samples, at_floor=at_floor, **read)
        for task, length in itertools.product(tasks, lengths)
        for name, budget, settings in asked
    ]
    timed = [
        Cell(name, RUNNING_TEXT, length, budget, settings, samples=1, what="timing", **read)
        for length in (lengths if timing else ())
        for name, budget, settings in asked
    ]
    unread = [
        Cell(name, RUNNING_TEXT, max(lengths), None, settings, samples=samples, what="crossing", **read)
        for name, settings in chosen
        if timing and name != FULL and catalog.get(name).kind != "cache"
    ]
    return cells + timed + unread


def slow_model(model: Any, device: str | None = None, dtype: str | None = None) -> str | None:
    """What is to be said of a model whose dtype this CPU does not multiply; None where there is nothing to say."""
    if isinstance(model, tuple):
        return slow_on_cpu(model[0].dtype, model[0].device)
    held = getattr(torch, dtype) if dtype else stored_dtype(model)
    place = device or ("cuda" if torch.cuda.is_available() and shipped_name(model) is None else "cpu")
    return None if held is None else slow_on_cpu(held, place)


def parsed(spec: str) -> tuple[str, dict]:
    """("streaming_llm", {"sinks": 8}) from "streaming_llm:sinks=8"; the page checks names and values."""
    name, settings = parse_spec(spec)
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


def loader(
    model: Any, trust_remote_code: bool, device: str | None = None, dtype: str | None = None
) -> tuple[str, Callable[[], tuple[Any, Any]]]:
    """A name for the run's header, and a function that gives (model, tokenizer) in any process."""
    require(dtype in (None, *LOADED), f"dtype is one of {LOADED}", dtype=dtype)
    by_path = not isinstance(model, tuple) and shipped_name(model) is None
    require(dtype is None or by_path, "dtype= is of a model that is loaded by path", dtype=dtype)
    if isinstance(model, tuple):
        return type(model[0]).__name__, lambda: model
    name = shipped_name(model)
    if name is not None:
        return f"the shipped model {name!r}", partial(load_shipped, name, device or "cpu")
    require(isinstance(model, str | Path), "model is a path, a name or (model, tokenizer)", model=model)
    path = Path(model)
    local = path.exists() or path.is_absolute() or str(model).startswith(".")
    require(
        not local or path.suffix == ".gguf" or (path / "config.json").exists(),
        "the model path holds a config.json, or is a GGUF file",
        path=str(model),
    )
    return str(model), partial(
        load, str(model), dtype=dtype or "auto", trust_remote_code=trust_remote_code, device=device
    )


def header(name: str, cells: Sequence[Cell], **facts: Any) -> dict:
    """What run.json says, with `facts` beside; a later start must agree in `settings`."""
    settings = {
        "model": name,
        "methods": sorted({c.label for c in cells}),
        "tasks": sorted({c.task for c in cells if c.what in ("cell", "pictures")}),
        "lengths": sorted({c.length for c in cells}),
        "budgets": sorted({str(c.budget) for c in cells if c.budget is not None}),
        "samples": cells[0].samples,
        "seed": cells[0].seed,
        "text": cells[0].text,
        "chat": cells[0].chat,
    }
    packages = ("regard", "torch", "transformers", "numpy")
    return {
        "kind": "run",
        "model": name,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings,
        "content": content(cells),
        "families": {c.method: family_of(catalog.method(c.method)) for c in cells if c.method != FULL},
        **told(cells),
        "cells": [c.key for c in cells],
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "machine": machine(),
        **facts,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def family_of(method: Method) -> str:
    """What a method does, in a few words: under these the report's table is folded."""
    return family(method.page) if method.page.kind == "cache" else f"{method.page.kind} pages"


def machine() -> dict:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": device,
        **cpu_facts(),
    }
