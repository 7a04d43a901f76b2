"""Tasks of lm-eval: found by name, asked of a model, their scores as rows of data."""

import hashlib
import io
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regard.core import require
from regard.report.words import number

DRAWS = 1000  # of lm-eval's bootstrap, for metrics whose standard error has no closed form
LISTS = "lm-eval ls tasks"  # the command that lists the names
# an instruction of lm-eval to itself: draw in this process, where it would fork one for each core
IN_PROCESS = "DISABLE_MULTIPROC"


@dataclass(frozen=True)
class Asking:
    """How tasks are asked: how many documents, with how many examples before each, drawn how, in chat turns or not."""

    limit: int | None = None
    num_fewshot: int | None = None
    seed: int = 1234
    chat: bool = False

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "limit >= 1 documents", limit=self.limit)
        require(
            self.num_fewshot is None or self.num_fewshot >= 0,
            "num_fewshot >= 0",
            num_fewshot=self.num_fewshot,
        )


@dataclass
class Loaded:
    """Single tasks by name, those of groups too; the groups; and what could not be loaded, with the error."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.tasks, *self.failed]


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block lm-eval neither prints nor logs what is no error: what matters is raised, or in the rows.

    Nor do it and the packages below it draw progress bars of their own.
    """
    with ExitStack() as stack:
        logger = logging.getLogger("lm_eval")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        stack.enter_context(in_process())
        stack.enter_context(without_bars())
        stack.enter_context(redirect_stdout(io.StringIO()))
        yield


@contextmanager
def in_process() -> Iterator[None]:
    """Within the block lm-eval draws its bootstraps in this process."""
    old = os.environ.get(IN_PROCESS)
    os.environ[IN_PROCESS] = "1"
    try:
        yield
    finally:
        del os.environ[IN_PROCESS]
        if old is not None:
            os.environ[IN_PROCESS] = old


@contextmanager
def without_bars() -> Iterator[None]:
    """Within the block documents are read and weights are loaded without a bar."""
    from datasets import utils as of_data
    from lm_eval.api import task as module
    from transformers.utils import logging as of_models

    bar, data, models = (
        module.tqdm,
        not of_data.are_progress_bars_disabled(),
        of_models.is_progress_bar_enabled(),
    )
    module.tqdm = lambda documents, **_: documents
    of_data.disable_progress_bars()
    of_models.disable_progress_bar()
    try:
        yield
    finally:
        module.tqdm = bar
        if data:
            of_data.enable_progress_bars()
        if models:
            of_models.enable_progress_bar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block random numbers are drawn from a seed; those outside go on as if it had not been."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def load_tasks(names: Sequence[str], include: str | Path | None, asking: Asking) -> Loaded:
    """Tasks and groups by name, wildcard or YAML file. A task whose data cannot be had is in `failed`.

    Raises KeyError with the near names for a name that is none.
    """
    require(names, "there is at least one task", tasks=list(names))
    manager, specs = indexed(names, include)
    loaded = Loaded()
    for spec in dict.fromkeys(specs):
        try:
            with seeded(asking.seed):
                found = manager.load([spec])
        except Exception as error:  # whatever lm-eval, datasets or the hub raise: it becomes a row
            loaded.failed[spec] = error
            continue
        loaded.tasks |= found["tasks"]
        loaded.groups |= found.get("groups", {})
    for task in loaded.tasks.values():
        set_fewshot(task, asking.num_fewshot)
    return loaded


def indexed(names: Sequence[str], include: str | Path | None) -> tuple[Any, list[str]]:
    """lm-eval's task manager, and the names with wildcards written out.

    Reading lm-eval's own thousands of tasks takes some ten seconds, so it is left out where `include` has all names.
    """
    from lm_eval.tasks import TaskManager

    require(
        include is None or Path(include).is_dir(), "the folder of tasks is there", include_path=str(include)
    )
    found: list[str] = []
    for defaults in (False, True):
        manager = TaskManager(
            include_path=None if include is None else str(include), include_defaults=defaults
        )
        single = set(manager.all_subtasks)
        found = [at for name in names for at in matching(name, manager) or [name]]
        if all(name in single or is_yaml(name) for name in found):
            return manager, found
    for name in found:
        if name not in manager.all_tasks and not is_yaml(name):
            raise unknown_task(name, manager.all_tasks)
    return manager, found


def matching(name: str, manager: Any) -> list[str]:
    return manager.match_tasks([name]) if any(letter in name for letter in "*?[") else []


def is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def unknown_task(name: str, names: Sequence[str]) -> KeyError:
    """The error for a wrong name. lm-eval knows thousands: where none is near, it says what lists them."""
    near = get_close_matches(name, names, n=3, cutoff=0.5) or [known for known in names if name in known][:3]
    told = f"near names: {', '.join(near)}" if near else f"`{LISTS}` lists them"
    return KeyError(f"no task of lm-eval is called {name!r}; {told}")


def set_fewshot(task: Any, wanted: int | None) -> None:
    """As lm-eval does it: a task that says 0 keeps it, one that says nothing has none."""
    own = task.get_config("num_fewshot")
    if own is None or (wanted is not None and own != 0):
        task.set_config(key="num_fewshot", value=wanted or 0)


def requests_of(task: Any, lm: Any, asking: Asking) -> str:
    """What a task asks, documents and the examples before them, in 12 characters: two cells of one value are paired."""
    task.set_fewshot_seed(seed=asking.seed)
    chat = (
        {"chat_template": lm.apply_chat_template, "tokenizer_name": lm.tokenizer_name} if asking.chat else {}
    )
    with seeded(asking.seed):
        task.build_all_requests(
            limit=asking.limit, apply_chat_template=asking.chat, fewshot_as_multiturn=asking.chat, **chat
        )
    return digest(task)


def digest(task: Any) -> str:
    whole = hashlib.sha256()
    for instance in task.instances:
        asked = [instance.request_type, instance.arguments, instance.doc]
        whole.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return whole.hexdigest()[:12]


def ask(name: str, task: Any, lm: Any, asking: Asking, expected: str) -> tuple[list[dict], dict, list[dict]]:
    """(a row for each metric and filter, facts of the task, lm-eval's samples) of a task asked of a model.

    expected   what `requests_of` gave: other requests than these would not be paired with those of other methods
    """
    from lm_eval.evaluator import evaluate

    task.set_fewshot_seed(seed=asking.seed)
    with seeded(asking.seed):
        found = evaluate(
            lm, {"tasks": {name: task}}, limit=asking.limit, bootstrap_iters=DRAWS, log_samples=True,
            apply_chat_template=asking.chat, fewshot_as_multiturn=asking.chat,
        )  # fmt: skip
    require(digest(task) == expected, "a task asks the same of every method", task=name)
    samples = found["samples"][name]
    facts = {
        "version": found["versions"][name],
        "num_fewshot": found["n-shot"][name],
        "documents": found["n-samples"][name]["effective"],
    }
    return score_rows(found["results"][name], found["higher_is_better"][name], samples), facts, samples


def score_rows(results: Mapping, better: Mapping[str, bool], samples: Sequence[Mapping]) -> list[dict]:
    """One row for each metric under each filter; `items` are [document, what the metric is computed from there]."""
    rows = []
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        items = [[s["doc_id"], plain(s[metric])] for s in samples if s["filter"] == chosen and metric in s]
        rows.append(
            {
                "metric": metric,
                "filter": chosen,
                "value": number(value),
                "stderr": number(results.get(f"{metric}_stderr,{chosen}")),
                "higher_is_better": better.get(metric),
                "items": items,
            }
        )
    return rows


def plain(value: Any) -> Any:
    """A sample's value as JSON has it: numbers, texts, lists of them.

    >>> plain((np.float64(-2.5), 3)), plain(True)
    ([-2.5, 3], True)
    """
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value


def aggregation(task: Any, metric: str) -> Callable[[list], float] | None:
    """How a metric's value comes from its samples; None: it is their mean."""
    from lm_eval.api.metrics import mean

    function = task.aggregation().get(metric, mean)
    return None if function is mean else function


def group_rows(
    groups: Mapping[str, Any], rows: Sequence[Mapping], documents: Mapping[str, int]
) -> list[dict]:
    """Scores of the groups as lm-eval forms them from their tasks; `rows` are those of one method at one budget."""
    from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

    metrics: dict[str, dict] = {
        name: {"name": name, "alias": name, "sample_len": n} for name, n in documents.items()
    }
    for row in rows:
        key, stderr = f"{row['metric']},{row['filter']}", f"{row['metric']}_stderr,{row['filter']}"
        found = "N/A" if row["stderr"] is None else row["stderr"]
        metrics.get(row["task"], {}).update({key: row["value"], stderr: found})
    held = {n: g for n, g in groups.items() if all(t.task_name in documents for t in g.get_all_tasks())}
    made = aggregate_groups(EvalAcc(metrics=metrics, groups=dict(held))).metrics  # type: ignore[arg-type]
    return [{**row, "task": name, "documents": made[name].get("sample_len")}
            for name in held for row in score_rows(made[name], {}, [])]  # fmt: skip
