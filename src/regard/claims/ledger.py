"""The ledger of claims: found by where they lie, each with its last measured result in a .json of its name beside it.

claims/<kind>/<name>.py     the claim on the page of that kind and name; in findings/ are claims that are of no page
claims/<kind>/<name>.json   what `regard claims <name> --record` measured last
"""

import json
import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from regard.core import Claim, require, unknown
from regard.report.folder import write_whole

HERE = Path(__file__).parent


@cache
def paths() -> dict[str, Path]:
    """Name -> file of every claim, in alphabetical order."""
    listed: dict[str, Path] = {}
    for path in sorted(HERE.glob("*/[!_]*.py"), key=lambda p: p.stem):
        require(path.stem not in listed, "two claims share a name", one=listed.get(path.stem), other=path)
        listed[path.stem] = path
    return listed


def path_of(name: str) -> Path:
    if name not in paths():
        raise unknown("claim", name, paths())
    return paths()[name]


def names() -> list[str]:
    """Names of all claims."""
    return list(paths())


def claim(name: str) -> Claim:
    return import_module(f"regard.claims.{path_of(name).parent.name}.{name}").CLAIM


def measured() -> dict[str, dict]:
    """The last measured result of each claim that has one."""
    results = {name: path.with_suffix(".json") for name, path in paths().items()}
    return {n: json.loads(p.read_text(encoding="utf8")) for n, p in results.items() if p.exists()}


def measure(name: str) -> dict:
    """Measure one claim now: name, statement, bound, measured, verdict, seconds, versions."""
    chosen = claim(name)
    start = time.perf_counter()
    result = chosen.measure()
    seconds = time.perf_counter() - start
    return {
        "name": name,
        "statement": chosen.statement,
        "bound": chosen.bound,
        "measured": dict(result.numbers),
        "verdict": chosen.verdict(result),
        "note": chosen.contradicted,
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("regard", "torch", "transformers")},
        },
        "when": datetime.now(UTC).date().isoformat(),
    }


def record(rows: Iterable[dict]) -> None:
    """Write each result beside its claim, in place of the older one."""
    for row in rows:
        text = json.dumps(row, indent=2, ensure_ascii=False, default=float) + "\n"
        write_whole(path_of(row["name"]).with_suffix(".json"), text)
