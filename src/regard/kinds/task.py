"""Tasks: workloads with a right answer, made from a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from regard.core import Kind, Method, Page, Unsupported, require

METRICS = ("exact", "recall", "nll")


@dataclass(frozen=True, eq=False)
class TaskPage(Page):
    """A workload. A page gives one of these, or both:

    samples(cfg, tokenizer, length, count, seed, source=None, *, chat=False) -> list of regard.tasks.Sample
                 questions for a language model: prompts of exactly `length` tokens, answers of one length
    generate(cfg, count, seed) -> (inputs, labels)
                 [count, length] ids for a model that is trained from nothing; labels of -100 are not scored

    metric       of samples: "exact", the answer is generated exactly (the share of turns, where there are several);
                 "recall", the share of the texts in `wanted` that stand in what is generated freely;
                 "nll", the answer's mean negative log-likelihood
    standard     whether compare asks it when no tasks are named
    group        a name by which compare asks all pages that say it, such as "ruler"
    """

    samples: Callable | None = None
    generate: Callable | None = None
    metric: str = "exact"
    standard: bool = False
    group: str = ""
    kind = "task"

    def __post_init__(self) -> None:
        require(self.metric in METRICS, f"metric is one of {METRICS}", metric=self.metric)
        require(self.samples or self.generate, "a task gives samples, or generate", title=self.card.title)


@dataclass(frozen=True)
class Task:
    """A task with its settings, as compare asks it.

    samples(tokenizer, length, count, seed, source=None, *, chat=False) -> list of Sample
    """

    name: str
    title: str
    metric: str
    samples: Callable[..., list[Any]]


def ask(method: Method) -> Task:
    """A configured task page as questions for a language model; Unsupported where it has none."""
    page = method.page
    if page.kind != "task":
        raise Unsupported(f"{method.name} is a {page.kind} page, not a task")
    if page.samples is None:
        raise Unsupported(
            f"{method.name} has no questions for a language model; train a model on it: regard train"
        )
    return Task(method.name, page.card.title, page.metric, partial(page.samples, method.config))


KIND = Kind(
    name="task",
    page=TaskPage,
    says="a workload with a right answer",
    verb='regard.compare(tasks=[NAME], out="runs")',
    room="tasks",
    checks="regard.testing.task:check_task_page",
)
