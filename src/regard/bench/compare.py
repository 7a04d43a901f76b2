"""`regard.compare`: which method is best on this model, these tasks, this budget?"""

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
from regard.bench.asked import grid, named, specs
from regard.bench.cell import FULL, Cell
from regard.bench.compare_pictures import picture_grid, picture_tasks, run_pictures, vision_loader
from regard.bench.estimate import described, estimate
from regard.bench.executor import Executor, InProcess, executor_of
from regard.bench.forecast import forecast
from regard.bench.revisions import content, with_revisions
from regard.bench.told import told
from regard.bench.words import DTYPES
from regard.core import Method, require
from regard.kinds.cache import family
from regard.models.names import check_model, shipped_name
from regard.models.shipped import load, load_shipped, stored_dtype
from regard.ops.machine import cpu_facts, slow_on_cpu
from regard.report.folder import Folder, keys_of
from regard.report.html import task_pages, to_html
from regard.report.markdown import to_markdown
from regard.report.result import Result

PICTURES = 64  # how many images a task of images asks about
GROWS = ("methods", "tasks", "lengths", "budgets")  # what a later start of a run may ask for besides


def compare(
    model: Any = None,
    methods: Any = None,
    tasks: Any = None,
    lengths: int | Iterable[int] | None = None,
    budgets: int | float | str | Iterable[int | float | str] | None = None,
    *,
    out: str | Path,
    samples: int | None = None,
    seed: int = 0,
    text: str | Path | None = None,
    images: str | Path | None = None,
    chat: bool | None = None,
    system: str | None = None,
    extrapolate: bool = False,
    workers: int = 2,
    limit: float = 600.0,
    retry: bool = True,
    timing: bool = True,
    at_floor: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    executor: str | Executor | None = None,
    progress: Callable[[dict | None, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Any:
    """Measure methods against full attention on a grid of cells; write results.jsonl, report.html, report.md to `out`.

    model    a path or name, a loaded (model, tokenizer), or None for the shipped language model
    samples  how many texts a cell asks, 8, or images, 64, where nothing is said; all, of questions of one's own
    tasks    names, with settings as "needle:digits=3", or of a group ("ruler"), files of one's own (JSON lines as
             regard.tasks.own reads them, or a page), pages, or regard.method("needle", digits=3); None: those that are
             standard
    methods  likewise; names of cache pages, of masks, and of mechanisms that choose blocks of keys, with settings as
             "streaming_llm:sinks=8"; None: all cache pages. Only cache pages have budgets; of the others it is measured
             too from which length on, up to the longest, their first token comes sooner; "block_topk:target=mass:0.95"
             calibrates one to a share of attention mass, or "sparsity:0.9", on the model and at each length
    lengths  prompt lengths in tokens     budgets  tokens, fractions in (0, 1] or texts like "64MB"
    text     a file of your own to draw filler and perplexity text from
    chat     ask questions in the model's chat template; None: where it has one     system   its system prompt
    extrapolate  ask at lengths beyond the positions that the model's configuration names
    images   for tasks of images (pope, chair, counting, ocr, grounding), which compare steering and tokens pages: your
             own, a folder or file as regard.tasks.pictures reads it; None: rendered scenes
    workers  local processes of one thread each; a loaded model is measured in this process
    executor where cells run: "local", "submitit:partition=gpu,gpus=1" (Slurm), "ray:address=auto", or an Executor
    device   where a model that is loaded by path goes; None: the GPU where there is one
    dtype    "float32", "bfloat16" or "float16" for a model that is loaded by path; None: as its weights are
    timing   measure prefill and decode of each method, budget and length beside full attention, on running text
    at_floor measure methods also where full attention itself is near what guessing gives: it ranks no method there
    limit    seconds a cell may take      retry    run failed cells of an earlier start again; False: leave them
    dry_run  measure nothing: give {"cells", "kept", "workers", "seconds", "memory"}, from a probe of the model
    progress called with (row, done, total) as cells end, and with (None, done, total) at the start
    say      called, before cells run, with one line on the memory that they will take; run.json has it as "memory"

    Finished cells are on disk at once; the same call resumes, and measures anew where the content of the text, the
    model or a page of one's own is another. The same `out` takes more methods, tasks, lengths and budgets: its report
    is then of all; and another number of samples: it is then of the cells that this call asks for. A cell that fails is
    a row that says why.
    """
    if isinstance(model, str | Path):
        check_model(model)
    tasks = None if tasks is None else [named(task) for task in specs(tasks)]
    methods = None if methods is None else specs(methods)
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
    cells = grid(methods, tasks, lengths, budgets, samples, seed, text, chat, timing, at_floor, system)
    runner = runner_of(executor, model, workers, limit, out)
    folder = Folder(Path(out))
    if not extrapolate:
        refuse_beyond(cells, model)
    name, load_model = loader(model, trust_remote_code, device, dtype)
    cells = with_revisions(cells, model, dtype)
    memory = estimate(cells, model, runner, device, dtype)
    if dry_run:
        left = [c for c in cells if c.key not in keys_of(folder.read(), retry)]
        return {**forecast(cells, left, load_model, memory.get("workers", workers)), "memory": memory["text"]}
    head = header(name, cells, memory=memory, slow=slow_model(model, device, dtype))
    done = folder.open(head, grows=GROWS, replaces=("samples",))
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


def refuse_beyond(cells: Sequence[Cell], model: Any) -> None:
    """ValueError where prompts are longer than the positions that the model's configuration names."""
    try:
        most = getattr(described(model)[0], "max_position_embeddings", None)
    except (OSError, ValueError, KeyError):
        return  # loading it says what is wrong
    longest = max(cell.length for cell in cells)
    rule = "lengths are within the model's positions; extrapolate=True, --extrapolate asks beyond them"
    require(most is None or longest <= most, rule, length=longest, positions=most)


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


def slow_model(model: Any, device: str | None = None, dtype: str | None = None) -> str | None:
    """What is to be said of a model whose dtype this CPU does not multiply; None where there is nothing to say."""
    if isinstance(model, tuple):
        return slow_on_cpu(model[0].dtype, model[0].device)
    held = getattr(torch, dtype) if dtype else stored_dtype(model)
    place = device or ("cuda" if torch.cuda.is_available() and shipped_name(model) is None else "cpu")
    return None if held is None else slow_on_cpu(held, place)


def loader(
    model: Any, trust_remote_code: bool, device: str | None = None, dtype: str | None = None
) -> tuple[str, Callable[[], tuple[Any, Any]]]:
    """A name for the run's header, and a function that gives (model, tokenizer) in any process."""
    require(dtype in (None, *DTYPES), f"dtype is one of {DTYPES}", dtype=dtype)
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
        "system": cells[0].system,
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
