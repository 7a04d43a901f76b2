"""Several mechanisms trained under one plan into one folder: a run of each, as it would be alone, and one report.

run.json        what is trained       NAME/     the run of that name, which goes on by itself
result.json, report.html              when all have ended
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regard.core import require
from regard.report.folder import Folder
from regard.report.training import several_page
from regard.train.plan import Plan
from regard.train.run import train, try_out
from regard.train.tasks import TASKS

OWN = ("mechanisms", "settings", "pages")  # what plans of one folder may differ in


def train_several(
    plans: Mapping[str, Plan],
    out: str | Path,
    progress: Callable[[dict], None] | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> dict:
    """Train each plan in `out`/NAME, or go on there; what they came to side by side, which result.json holds too.

    plans     by name; they differ in their mechanisms and these' settings alone, or ValueError
    progress  as of `train`, with "run", the name, and "done" of all runs
    """
    folders = folders_of(plans)
    first = next(iter(plans.values()))
    common = shared(plans)
    for plan in plans.values():
        try_out(plan)
    folder = Folder(Path(out))
    runs = {name: {key: plan.to_dict().get(key) for key in OWN} for name, plan in plans.items()}
    head = {"title": f"{', '.join(plans)} on {first.subject}", "settings": {**common, "runs": runs}}
    folder.open(head)
    results, rows, before = {}, [], 0
    for name, plan in plans.items():
        hear = None if progress is None else heard(progress, name, before)
        results[name] = train(plan, folder.path / folders[name], hear, threads, device)
        before += len(plan.rates) * plan.steps
        kept = Folder(folder.path / folders[name]).rows().values()
        rows += [{**row, "run": name} for row in kept if row["rate"] == results[name]["rate"]]
    result = {"task": first.task, "sentence": compared(first, results), "runs": results}
    folder.write("report.html", several_page(head, rows, result, folders))
    folder.write("result.json", json.dumps(result, indent=1))
    return result


def folders_of(plans: Mapping[str, Plan]) -> dict[str, str]:
    """Name -> the name of its folder; two that would share one are refused."""
    require(len(plans) >= 2, "two runs at least stand side by side", runs=list(plans))
    found = {name: re.sub(r"[^\w.+=-]+", "-", name) for name in plans}
    require(len({*found.values()}) == len(found), "runs have names of their own", runs=list(plans))
    return found


def shared(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """The settings that all plans have in common, which is all but their mechanisms."""
    each = [{k: v for k, v in plan.to_dict().items() if k not in OWN} for plan in plans.values()]
    apart = {
        k: [one.get(k) for one in each] for k in each[0] if any(one.get(k) != each[0][k] for one in each)
    }
    require(not apart, "runs of one folder differ in their mechanisms alone", **apart)
    return each[0]


def heard(progress: Callable[[dict], None], name: str, before: int) -> Callable[[dict], None]:
    return lambda point: progress({**point, "run": name, "done": before + point["done"]})


def compared(plan: Plan, results: Mapping[str, dict]) -> str:
    """One sentence on the scores, and what to hold against it."""
    task = TASKS[plan.task]
    judged = all("judged" in r for r in results.values())
    scores = {name: r["judged"] if judged else r["score"] for name, r in results.items()}
    order = sorted(scores, key=scores.get, reverse=task.better is max)
    said = ", ".join(f"{name} {score_text(scores[name], task.score)}" for name in order)
    unit = task.score if judged or task.score != "accuracy" else f"held-out {task.score}"
    rates = (
        f"the best of {len(plan.rates)} learning rates" if len(plan.rates) > 1 else f"rate {plan.rates[0]:g}"
    )
    chosen = len(plan.rates) > 1 and not judged
    unit = unit[0].upper() + unit[1:]
    return f"{unit} on {plan.subject} after {plan.steps} steps, each at {rates}: {said}. {caveat(results, chosen)}"


def score_text(score: float, unit: str) -> str:
    return f"{score:.1%}" if unit == "accuracy" else f"{score:.3f}"


def caveat(results: Mapping[str, dict], chosen: bool) -> str:
    """What such scores do not show: seeds, what the rates were chosen on, and sizes where they differ."""
    sizes = {name: r["facts"]["parameters"] for name, r in results.items()}
    least, most = min(sizes.values()), max(sizes.values())
    also = ", and the rates were chosen on the same held-out data" if chosen else ""
    text = f"One seed{also}: a small difference may turn with another seed."
    if most > 1.01 * least:
        text += f" Parameters: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}."
    return text
