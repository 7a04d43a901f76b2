"""Workloads for compare: each a seeded generator of samples and a metric. `TASKS` holds them by name."""

from regard.core import unknown
from regard.tasks.base import Sample, Task
from regard.tasks.corpus import Source, held_out
from regard.tasks.needle import NEEDLE
from regard.tasks.perplexity import PERPLEXITY
from regard.tasks.recall import RECALL
from regard.tasks.zoology_mqar import mqar

__all__ = ["TASKS", "Sample", "Source", "Task", "held_out", "mqar", "task"]

TASKS: dict[str, Task] = {t.name: t for t in (NEEDLE, RECALL, PERPLEXITY)}


def task(name: str) -> Task:
    """The task of this name.

    >>> task("needel")
    Traceback (most recent call last):
    ...
    KeyError: "no task is called 'needel'; near names: needle"
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
