"""Tasks: workloads with a right answer, made from a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from regard.core import Kind, Method, Page, Unsupported, require

# metric -> what it says
METRICS = {
    "exact": "the answer is generated exactly",
    "recall": "the share of the wanted texts that stand in what is generated freely",
    "nll": "the answer's mean negative log-likelihood",
}
OF_PICTURES = {
    "yes_no": "whether yes or no is right",
    "chair": "what a caption names that is not there",
    "said": "whether the whole answer is right",
}


@dataclass(frozen=True, eq=False)
class TaskPage(Page):
    """A workload. A page gives one of these, or several:

    samples(cfg, tokenizer, length, count, seed, source=None, *, chat=False) -> list of regard.tasks.Sample
                 questions for a language model: prompts of exactly `length` tokens, answers of one length
    generate(cfg, count, seed) -> (inputs, labels)
                 [count, length] ids for a model that is trained from nothing; labels of -100 are not scored
    pictures(cfg, count, seed, source=None) -> list of regard.tasks.pictures.PictureQuestion
                 questions about images for a vision-language model, on `count` images; `source` are one's own

    metric       of samples: "exact", the answer is generated exactly (the share of turns, where there are several);
                 "recall", the share of the texts in `wanted` that stand in what is generated freely;
                 "nll", the answer's mean negative log-likelihood
                 of pictures: "yes_no"; "chair", what a caption names that is not there; "said", the whole answer
    standard     whether compare asks it when no tasks are named
    own          how many questions of one's own it has, of lengths of their own; 0: as many and as long as asked
    group        a name by which compare asks all pages that say it, such as "ruler"
    """

    samples: Callable | None = None
    generate: Callable | None = None
    pictures: Callable | None = None
    metric: str = "exact"
    standard: bool = False
    group: str = ""
    own: int = 0
    kind = "task"

    def __post_init__(self) -> None:
        known = tuple(OF_PICTURES if self.pictures else METRICS)
        require(self.metric in known, f"metric is one of {known}", metric=self.metric)
        given = self.samples or self.generate or self.pictures
        require(given, "a task gives samples, generate or pictures", title=self.card.title)


@dataclass(frozen=True)
class PictureTask:
    """A task of images with its settings: pictures(count, seed, source=None) -> list of PictureQuestion."""

    name: str
    title: str
    metric: str
    pictures: Callable[..., list[Any]]


@dataclass(frozen=True)
class Task:
    """A task with its settings, as compare asks it.

    samples(tokenizer, length, count, seed, source=None, *, chat=False) -> list of Sample
    """

    name: str
    title: str
    metric: str
    samples: Callable[..., list[Any]]
    own: int = 0


def ask(method: Method) -> Task:
    """A configured task page as questions for a language model; Unsupported where it has none."""
    page = method.page
    if page.kind != "task":
        raise Unsupported(f"{method.name} is a {page.kind} page, not a task")
    if page.samples is None:
        raise Unsupported(
            f"{method.name} has no questions for a language model; train a model on it: regard train"
        )
    return Task(method.name, page.card.title, page.metric, partial(page.samples, method.config), page.own)


def ask_pictures(method: Method) -> PictureTask:
    """A configured task page as questions about images; Unsupported where it has none."""
    page = method.page
    if page.kind != "task" or page.pictures is None:
        raise Unsupported(f"{method.name} asks nothing about images")
    return PictureTask(method.name, page.card.title, page.metric, partial(page.pictures, method.config))


KIND = Kind(
    name="task",
    page=TaskPage,
    says="a workload with a right answer",
    verb='regard.compare(tasks=[NAME], out="runs")',
    room="tasks",
    checks="regard.testing.task:check_task_page",
)
