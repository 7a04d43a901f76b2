"""Workloads for compare and for training: every task is a page (a file of this folder that defines METHOD).

`regard.catalog.task(name)` gives a task with its settings; `Sample`, `Turn` and `Source` are what they are made of.
"""

from typing import Any

from regard.core.deprecation import moved
from regard.tasks.base import Sample, Turn
from regard.tasks.corpus import Source, held_out
from regard.tasks.zoology_mqar import mqar

__all__ = ["Sample", "Source", "Turn", "held_out", "mqar"]

_moved = moved(
    __name__,
    {"task": "regard.catalog:task", "Task": "regard.kinds.task:Task"},
)


def __getattr__(name: str) -> Any:
    return _moved(name)
