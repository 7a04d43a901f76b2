"""The ledger of last measured claims: one JSON object a line in ledger.jsonl, the newest of a name counts."""

import json
import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from regard.core import Claim, unknown

HERE = Path(__file__).parent
LEDGER = HERE / "ledger.jsonl"
NOT_CLAIMS = ("__init__", "ledger")


def names() -> list[str]:
    """Names of all rows that have a claim."""
    return sorted(p.stem for p in HERE.glob("[!_]*.py") if p.stem not in NOT_CLAIMS)


def claim(name: str) -> Claim:
    if name not in names():
        raise unknown("claim", name, names())
    return import_module(f"regard.claims.{name}").CLAIM


def measured() -> dict[str, dict]:
    """The last measured result of each claim."""
    if not LEDGER.exists():
        return {}
    rows = [json.loads(line) for line in LEDGER.read_text(encoding="utf8").splitlines() if line.strip()]
    return {row["name"]: row for row in rows}


def measure(name: str) -> dict:
    """Measure one claim now: name, statement, bound, measured, verdict, seconds, versions."""
    found = claim(name)
    start = time.perf_counter()
    result = found.measure()
    seconds = time.perf_counter() - start
    return {
        "name": name,
        "statement": found.statement,
        "bound": found.bound,
        "measured": dict(result.numbers),
        "verdict": found.verdict(result),
        "note": found.contradicted,
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("regard", "torch", "transformers")},
        },
        "when": datetime.now(UTC).date().isoformat(),
    }


def record(rows: Iterable[dict]) -> None:
    """Put rows into the ledger in place of older ones of their names."""
    newest = {**measured(), **{row["name"]: row for row in rows}}
    text = "".join(
        json.dumps(newest[name], ensure_ascii=False, default=float) + "\n" for name in sorted(newest)
    )
    LEDGER.write_text(text, encoding="utf8")
