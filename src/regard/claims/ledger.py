"""The ledger of claims: found by where they lie, each with its last measured result in a .json of its name beside it.

claims/<kind>/<name>.py     the claim on the page of that kind and name; in findings/ are claims that are of no page
claims/<kind>/<name>.json   what `regard claims <name> --record` measured last: one result, or, of a claim that names
                            models, {"name": ..., "on": {model: result}}, a result for each that was measured

A result on a model is a row, and so is that a model is not installed: such a row is shown and never recorded.
Rows stand in the order of the claim's models, and the last one that was measured decides (`deciding`).
"""

import json
import platform
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from regard.core import Claim, require, unknown
from regard.core.claim import TOY
from regard.core.errors import NotInstalled
from regard.report.folder import write_whole

HERE = Path(__file__).parent
NOT_MEASURED = "not measured"


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


def asked(chosen: Sequence[str] = (), on: str | None = None) -> list[tuple[str, str | None]]:
    """(claim, model) of what is to be measured: these claims, or all, on all of their models or on this one.

    A claim that needs no model has None. Raises KeyError for an unknown name, ValueError for a claim asked for on a
    model that it does not name.
    """
    from regard.models.shipped import PRETRAINED, SHIPPED

    ours = [TOY, *SHIPPED, *PRETRAINED]
    if on is not None and on not in ours:
        raise unknown("model of ours", on, ours)
    pairs = [(name, model) for name in chosen or names() for model in claim(name).models or (None,)]
    found = pairs if on is None else [pair for pair in pairs if pair[1] == on]
    without = sorted({*chosen} - {name for name, _ in found})
    require(not without, "the claim names the model on which it is asked for", model=on, claims=without)
    return found


# measuring


def measure(name: str, model: str | None = None) -> dict:
    """The row of one claim, measured now: name, model, statement, bound, measured, verdict, seconds, versions.

    `parts` of the bound, line by line, where it has several; `holds_here` names those that hold now though the claim
    is known to be contradicted in them.
    """
    chosen = claim(name)
    require(model in (chosen.models or (None,)), "a model of the claim", name=name, model=model)
    given = () if model is None else (model,)
    said = {"name": name, **({"model": model} if given else {})}
    said |= {"statement": chosen.statement, "bound": chosen.bound}
    if absent := why_absent(model):
        return {**said, "measured": {}, "verdict": NOT_MEASURED, "note": absent}
    start = time.perf_counter()
    result = chosen.measure(*given)
    seconds = time.perf_counter() - start
    held = [part for part in chosen.parts_that_fail(model) if result.parts.get(part)]
    return {
        **said,
        "measured": dict(result.numbers),
        **({"parts": dict(result.parts)} if result.parts else {}),
        **({"holds_here": held} if held else {}),
        "verdict": chosen.verdict(result, model),
        "note": chosen.note(model),
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("regard", "torch", "transformers")},
        },
        "when": datetime.now(UTC).date().isoformat(),
    }


def pretrained(name: str) -> str | Path:
    """Where a pretrained model is loaded from. (The ledger is read without transformers.)"""
    from regard.models.shipped import pretrained

    return pretrained(name)


def why_absent(model: str | None) -> str:
    """What to install for a model that is not here; empty where it is."""
    from regard.models.shipped import PRETRAINED

    if model not in PRETRAINED:
        return ""
    try:
        pretrained(model)
    except NotInstalled as error:
        return f"needs {model}: {error}"
    return ""


# what was measured


def record(rows: Iterable[dict]) -> None:
    """Write each result beside its claim in place of the older one, of the same model where the claim names models.

    A single result, of a time when the claim named no models, counts as that of the first of them.
    """
    for row in rows:
        if row.get("verdict") == NOT_MEASURED:
            continue
        path, model = path_of(row["name"]).with_suffix(".json"), row.get("model")
        if model is not None:
            models = claim(row["name"]).models
            known = {r.get("model", models[0]): r for r in read(path)} | {model: row}
            row = {"name": row["name"], "on": {m: bare(known[m]) for m in models if m in known}}
        write_whole(path, json.dumps(row, indent=2, ensure_ascii=False, default=float) + "\n")


def bare(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("name", "model")}


def read(path: Path) -> list[dict]:
    """The rows of one file; none where there is no file."""
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf8"))
    if "on" not in data:
        return [data]
    return [{"name": data["name"], "model": model, **result} for model, result in data["on"].items()]


def recorded() -> dict[str, list[dict]]:
    """Name -> the last measured rows of each claim that has any, those on several models in the claim's order."""
    found = {name: read(path.with_suffix(".json")) for name, path in paths().items()}
    return {name: rows for name, rows in found.items() if rows}


# what it comes to


def deciding(rows: Sequence[dict]) -> dict:
    """The row that decides a claim: that on the last of its models that was measured; if none was, the last."""
    measured = [row for row in rows if row["verdict"] != NOT_MEASURED]
    return (measured or rows)[-1]


def all_hold(rows: Iterable[dict]) -> bool:
    """Whether every claim of these rows holds: by the row of the last model, which has to have been measured."""
    return all(last["verdict"] == "holds" for last in {row["name"]: row for row in rows}.values())


def in_words(rows: Sequence[dict]) -> str:
    """Verdicts in a line, the deciding one first: "holds (smollm2), contradicted (lm)"; "" without rows."""
    if not rows:
        return ""
    first = deciding(rows)
    ordered = [first, *(row for row in reversed(rows) if row is not first)]
    return ", ".join(r["verdict"] + (f" ({r['model']})" if "model" in r else "") for r in ordered)
