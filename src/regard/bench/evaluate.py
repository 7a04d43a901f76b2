"""`regard.evaluate`: lm-eval's tasks under cache policies, masks and sparse prefills, beside full attention."""

import hashlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.converted import configured
from regard.bench import harness_tasks as tasks_of
from regard.bench.asked import BUDGETS, parsed
from regard.bench.cell import FULL
from regard.bench.compare import loader, machine
from regard.bench.executor import why
from regard.bench.harness import language_model, refuse_missing
from regard.bench.harness_tasks import Asking, Loaded
from regard.bench.revisions import content_of
from regard.core import require
from regard.models.revision import revision
from regard.ops.budget import Budget, parse_budget
from regard.report.folder import Folder, keys_of
from regard.report.scores import Evaluation, with_differences

PACKAGES = ("regard", "torch", "transformers", "lm_eval", "datasets", "numpy")
Progress = Callable[[dict | None, int, int], None]


@dataclass(frozen=True)
class Question:
    """One task under one method at one budget. `requests` is all that the task asks, by its content."""

    method: str
    task: str
    budget: Budget | None = None
    settings: dict = field(default_factory=dict)
    asking: Asking = field(default_factory=Asking)
    requests: str | None = None
    revisions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name that is the same in every run of the same question."""
        identity = json.dumps(asdict(self), sort_keys=True, default=str)
        return f"{self.method}-{self.task}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.method}({settings})" if settings else self.method

    @property
    def caches(self) -> bool:
        """Whether a cache policy acts: it acts on what is decoded, all else on prompts."""
        return self.method != FULL and catalog.get(self.method).kind == "cache"

    def facts(self) -> dict[str, Any]:
        names = ("method", "label", "task")
        budget = None if self.budget is None else self.budget.value
        return {name: getattr(self, name) for name in names} | {"budget": budget, "seed": self.asking.seed}

    def row(self, **facts: Any) -> dict:
        """The row that says how the question went; its scores stand in rows of their own."""
        return {"kind": "evaluation", "key": self.key, **self.facts(), "status": "ok", "error": "",
                "revisions": self.revisions, **facts}  # fmt: skip


def evaluate(
    model: Any = None,
    methods: Iterable[str] | None = None,
    tasks: Iterable[str] = (),
    budgets: Iterable[int | float | str] | None = None,
    *,
    out: str | Path,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    include_path: str | Path | None = None,
    seed: int = 1234,
    chat: bool = False,
    log_samples: bool = False,
    retry: bool = True,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Score lm-eval's tasks under each method at each budget, beside full attention; write results.jsonl to `out`.

    model         a path or name, a loaded (model, tokenizer), or None for the shipped language model
    methods       as in `regard.compare`, without a target; full attention is always asked, and first
    tasks         names of lm-eval's tasks, groups or tags, wildcards, or YAML files
    budgets       of cache pages: tokens, fractions in (0, 1] or texts like "64MB"
    limit         documents of a task that are asked; None: all
    num_fewshot   examples before each document, drawn by `seed`; None: as the task says
    batch_size    rows of a batch; scores do not depend on it
    include_path  a folder with tasks of one's own, as YAML
    chat          write the context in the turns of the tokenizer's chat template
    log_samples   write what was asked, answered and scored by document, to `out`/samples-KEY.jsonl
    retry         ask again what failed at an earlier start
    progress      called with (row, documents done, documents of all) as batches end, first with (None, done, all)

    What has ended is on disk at once, and the same call goes on from there. What fails is a row that says why: a method
    that cannot act on the model, a task without its data, a context that does not fit the model.

    Raises KeyError with near names for unknown methods and tasks, ValueError where lm-eval is not installed.
    """
    refuse_missing()
    progress = progress or (lambda row, done, total: None)
    asking = Asking(limit, num_fewshot, seed, chat)
    chosen, budgets = asked_methods(methods, budgets)
    name, load_model = loader(model, trust_remote_code, device)
    with tasks_of.quiet():
        loaded = tasks_of.load_tasks(list(tasks), include_path, asking)
        lm = language_model(*load_model(), batch_size=batch_size)
        questions = grid(chosen, budgets, loaded, lm, asking, content_of(model))
        folder = Folder(Path(out))
        known = folder.open(header(name, questions, chosen, list(tasks), batch_size))
        answer(
            questions,
            loaded,
            lm,
            folder,
            finished(questions, known, folder, retry, log_samples),
            log_samples,
            progress,
        )
        return found(folder, questions, loaded)


def asked_methods(
    methods: Iterable[str] | None, budgets: Iterable[int | float | str] | None
) -> tuple[list[tuple[str, dict]], tuple[Budget, ...]]:
    """(name, settings) of each method, and the budgets of those that have one."""
    chosen = [parsed(spec) for spec in methods or ()]
    for name, settings in chosen:
        rule = "no target is met here; `regard calibrate` finds the settings that meet it"
        require("target" not in settings, rule, method=name, target=settings.get("target"))
    caches = [name for name, _ in chosen if name != FULL and catalog.get(name).kind == "cache"]
    require(budgets is None or caches, "budgets are for cache pages", methods=[name for name, _ in chosen])
    return chosen, tuple(map(parse_budget, BUDGETS if budgets is None else budgets))


def grid(
    chosen: Sequence[tuple[str, dict]], budgets: Sequence[Budget], loaded: Loaded, lm: Any, asking: Asking,
    content: str | None,
) -> list[Question]:  # fmt: skip
    """Task by task, full attention first."""
    questions = []
    for task in loaded.names:
        requests = tasks_of.requests_of(loaded.tasks[task], lm, asking) if task in loaded.tasks else None
        for name, settings in [(FULL, {}), *((n, s) for n, s in chosen if n != FULL)]:
            learned = settings.get("learned")
            facts = {
                "model": content,
                "method": None if name == FULL else catalog.revision_of(name),
                "learned": None if learned is None else revision(learned),
            }
            held = {key: value for key, value in facts.items() if value is not None}
            cache = name != FULL and catalog.get(name).kind == "cache"
            questions += [Question(name, task, budget, settings, asking, requests, held)
                          for budget in (budgets if cache else (None,))]  # fmt: skip
    return questions


def finished(
    questions: Sequence[Question], known: Mapping[str, dict], folder: Folder, retry: bool, log_samples: bool
) -> set[str]:
    """Keys of questions that need not be asked again; with `log_samples`, those whose samples are there."""
    ended = keys_of({key: row for key, row in known.items() if row["kind"] == "evaluation"}, retry)
    if log_samples:
        failed = {key for key in ended if known[key]["status"] != "ok"}
        ended = {key for key in ended if key in failed or (folder.path / samples_file(key)).exists()}
    return ended & {question.key for question in questions}


def samples_file(key: str) -> str:
    return f"samples-{key.replace('/', '_')}.jsonl"


def answer(
    questions: Sequence[Question], loaded: Loaded, lm: Any, folder: Folder, ended: set[str], log_samples: bool,
    progress: Progress,
) -> None:  # fmt: skip
    """Ask what has not ended, and write rows as they come: scores first, so that a question that ended has them."""
    sizes = {name: len({i.doc_id for i in task.instances}) for name, task in loaded.tasks.items()}
    total = sum(sizes.get(question.task, 0) for question in questions)
    done = sum(sizes.get(question.task, 0) for question in questions if question.key in ended)
    progress(None, done, total)
    for question in questions:
        if question.key in ended:
            continue
        size, waiting = sizes.get(question.task, 0), question.row()
        step = lambda share, at=done, n=size, row=waiting: progress(row, at + int(share * n), total)  # noqa: E731
        try:
            scores, row, samples = measure(question, loaded, lm, step)
        except Exception as error:
            scores, row, samples = [], question.row(**why(error)), []
        if log_samples and scores:
            folder.write(samples_file(question.key), lines(question, samples))
        for score in scores:
            folder.add(score)
        folder.add(row)
        done += size
        progress(row, done, total)


def measure(
    question: Question, loaded: Loaded, lm: Any, step: Callable[[float], None]
) -> tuple[list[dict], dict, list[dict]]:
    """(rows of scores, the question's row, lm-eval's samples). A task that could not be loaded raises its error."""
    start, name = time.perf_counter(), question.task
    if name in loaded.failed:
        raise loaded.failed[name]
    task, method = loaded.tasks[name], method_of(question, lm)
    asked, answered = sum(i.repeats or 1 for i in task.instances), [0]

    def advanced(requests: int) -> None:
        answered[0] += requests
        step(min(1.0, answered[0] / asked))

    lm.at_once, lm.advanced = not question.caches, advanced
    with (
        nullcontext() if method is None else attach(lm.model, method, tokenizer=lm.tokenizer) as attached,
        lm.metered(attached) as meter,
    ):
        rows, facts, samples = tasks_of.ask(name, task, lm, question.asking, question.requests or "")
        held = meter.facts()
    common = {"kind": "score", "cell": question.key, **question.facts(), **facts}
    scores = [{**common, **row, "key": f"{question.key}/{row['metric']},{row['filter']}"} for row in rows]
    seconds = time.perf_counter() - start
    return scores, question.row(**facts, **held, batch_size=lm.batch_size, seconds=seconds), samples


def method_of(question: Question, lm: Any) -> Any:
    """What is attached; None: the model as it is."""
    if question.method == FULL:
        return None
    budget = {} if question.budget is None else {"budget": question.budget}
    return configured(question.method, {**budget, **question.settings}, lm.model.device)


def lines(question: Question, samples: Sequence[dict]) -> str:
    """One line of JSON for each document and filter: lm-eval's sample, and whose it is."""
    from lm_eval.utils import handle_non_serializable

    made = [
        json.dumps({**question.facts(), **sample}, ensure_ascii=False, default=handle_non_serializable)
        for sample in samples
    ]
    return "".join(line + "\n" for line in made)


def found(folder: Folder, questions: Sequence[Question], loaded: Loaded) -> Evaluation:
    """What the folder holds of these questions, with the scores of groups and the differences to full attention."""
    known = folder.rows()
    cells = [known[question.key] for question in questions if question.key in known]
    good = [cell["key"] for cell in cells if cell["status"] == "ok"]
    order = {key: n for n, key in enumerate(good)}
    rows = sorted(
        (row for row in known.values() if row["kind"] == "score" and row["cell"] in order),
        key=lambda row: order[row["cell"]],
    )
    rows = with_differences(rows, lambda task, metric: tasks_of.aggregation(loaded.tasks[task], metric))
    groups = with_differences(grouped(rows, loaded), lambda task, metric: None)
    run = json.loads((folder.path / "run.json").read_text(encoding="utf8"))
    return Evaluation(run, [*rows, *groups], cells)


def grouped(rows: Sequence[dict], loaded: Loaded) -> list[dict]:
    """The scores of groups, for each method at each budget."""
    sides: dict[tuple, list[dict]] = {}
    for row in rows:
        sides.setdefault((row["method"], row["label"], row["budget"]), []).append(row)
    made = []
    for (method, label, budget), own in sides.items():
        documents = {row["task"]: row["documents"] for row in own}
        common = {"kind": "score", "cell": "", "key": "", "method": method, "label": label, "budget": budget}
        for row in tasks_of.group_rows(loaded.groups, own, documents):
            shares = [leaf["share"] for leaf in own if leaf["metric"] == row["metric"]]
            made.append({**common, "share": all(shares), **row})
    return made


def header(
    name: str,
    questions: Sequence[Question],
    chosen: Sequence[tuple[str, dict]],
    tasks: Sequence[str],
    rows: int,
) -> dict:
    """What run.json says; a later start must agree in `settings`."""
    asking = questions[0].asking
    settings = {
        "model": name,
        "methods": sorted({question.label for question in questions}),
        "tasks": sorted(tasks),
        "budgets": sorted({str(q.budget) for q in questions if q.budget is not None}),
        **asdict(asking),
    }
    return {
        "kind": "evaluation run",
        "model": name,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings,
        "batch_size": rows,
        "content": {what: held for q in questions for what, held in q.revisions.items()},
        "cells": [question.key for question in questions],
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "machine": machine(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
