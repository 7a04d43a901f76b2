"""One cell of a comparison: a method at a budget on a task at a length. Data that can be pickled.

Whoever hands cells on imports neither transformers nor what measures them (bench/measuring.py): jobs and actors.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from regard import catalog
from regard.bench.words import FULL
from regard.core.deprecation import moved
from regard.ops.budget import Budget, parse_budget

__all__ = ["FULL", "Cell"]


@dataclass(frozen=True)
class Cell:
    """What one worker is asked to measure. `settings` are the method's own beside the budget.

    `text` is where a worker reads it; what it reads there, the model and pages of one's own are told apart by their
    content, in `revisions`.
    """

    method: str
    task: str
    length: int
    budget: Budget | None = None
    settings: dict = field(default_factory=dict)
    seed: int = 0
    samples: int = 8
    batch_tokens: int = 8192
    at_floor: bool = False  # measured also where full attention is near what guessing gives
    text: str | None = None
    chat: bool | None = None
    system: str | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    what: str = (
        "cell"  # or "timing": what a step and a prefill take; "crossing": from which length on its first token
        # comes sooner; "pictures": about images
    )

    def __post_init__(self) -> None:
        if self.budget is not None:
            object.__setattr__(self, "budget", parse_budget(self.budget))

    @property
    def key(self) -> str:
        """A name that is the same in every run of the same cell."""
        facts = asdict(self)
        if facts["what"] == "cell":
            del facts["what"]
        for name in ("revisions", "at_floor", "system"):  # where they say nothing, as if they were not there
            if not facts[name]:
                del facts[name]
        if self.revisions and self.text is not None:
            facts["text"] = None  # its content counts, not where it lies
        identity = json.dumps(facts, sort_keys=True, default=str)
        return f"{self.method}-{self.task}-{self.length}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.method}({settings})" if settings else self.method

    def row(self, **facts: Any) -> dict:
        """The row of a result for this cell."""
        fields = {k: getattr(self, k) for k in ("key", "method", "label", "task", "length", "seed")}
        fields["budget"] = None if self.budget is None else self.budget.value
        return {
            "kind": self.what,
            **fields,
            "metric": catalog.metric_of(self.task),
            "status": "ok",
            "error": "",
            **facts,
        }


__getattr__ = moved(
    __name__,
    {
        "Run": "regard.bench.passes:Pass",
        "Bench": "regard.bench.measuring:Bench",
        "measure": "regard.bench.measuring:measure",
    },
)
