"""The words of a comparison, checked as they are typed: a wrong one is found before torch is imported."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from regard import catalog
from regard.core.errors import require, unknown
from regard.core.spec import OVER
from regard.models.names import check_model
from regard.report.folder import writable

DTYPES = ("float32", "bfloat16", "float16")  # in which a model may be loaded
FILES = (".py", ".jsonl")  # of pages and tasks of one's own
SHORTEST = 1.0  # seconds that a cell is given at least
FULL = "full"
ROOM = "regard.tasks."  # where tasks lie


def check_words(
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    *,
    model: str | None = None,
    folder: Path | None = None,
    samples: int | None = None,
    workers: int = 1,
    limit: float = SHORTEST,
    dtype: str | None = None,
) -> None:
    """ValueError or KeyError with the rule and the value where a word cannot be meant."""
    if model is not None:
        check_model(model)
    check_names("method", methods, [*catalog.pages(), FULL])
    check_names("task", tasks, [*task_names(), *group_names()])
    require(samples is None or samples >= 1, "--samples is 1 or more", samples=samples)
    require(workers >= 1, "--workers is 1 or more", workers=workers)
    require(limit >= SHORTEST, f"--limit is {SHORTEST:g} second or more", limit=limit)
    require(dtype in (None, *DTYPES), f"--dtype is one of {', '.join(DTYPES)}", dtype=dtype)
    if folder is not None:
        require(not folder.is_file(), "--out is a folder", out=str(folder))
        writable(folder)


def check_names(what: str, specs: Sequence[str] | None, known: Sequence[str]) -> None:
    """Names of pages, of several laid over one another too; files are there."""
    require(specs is None or specs, f"at least one {what} is named", **{f"{what}s": specs})
    for part in (part for spec in specs or () for part in OVER.split(spec)):
        name = part.partition(":")[0].strip()
        if Path(name).suffix in FILES:
            require(Path(name).expanduser().is_file(), f"the file of a {what} is there", path=name)
        elif name not in known:
            raise unknown(what, name, known)


@cache
def group_names() -> tuple[str, ...]:
    """Groups of tasks, such as "ruler", by what their files say."""
    found = (re.search(r'\bgroup="(\w+)"', catalog.path_of(name).read_text("utf8")) for name in task_names())
    return tuple(sorted({match[1] for match in found if match}))


def task_names() -> list[str]:
    """Tasks of the package, and pages of one's own, whose kind nobody asks here."""
    built_in = catalog.built_in()
    return [name for name in catalog.pages() if built_in.get(name, ROOM).startswith(ROOM)]
