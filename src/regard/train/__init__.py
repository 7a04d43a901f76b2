"""Training of small backbones with any mechanism: `regard train --task mqar --mechanism hedgehog`.

`loop` is the training loop of all that is trained here, conversions and claims too. It lies below the models, so the
names of a run are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

WHERE = {"TASKS": "regard.train.tasks", "Plan": "regard.train.plan", "train": "regard.train.run"}

if TYPE_CHECKING:
    from regard.train.plan import Plan
    from regard.train.run import train
    from regard.train.tasks import TASKS

__all__ = ["TASKS", "Plan", "train"]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(
            f"module 'regard.train' has no attribute {name!r}; it has {', '.join(sorted(WHERE))}"
        )
    return getattr(import_module(WHERE[name]), name)
