"""A training run in a folder: rows as they come, one checkpoint a rate, the best model as a Hugging Face folder.

run.json        the settings       results.jsonl   the points of the curves
last.safetensors    weights and optimizer of the rate under way, replaced whole
best/           the model of the best rate so far, as transformers saves it
result.json, report.html   when all rates are done
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from regard.core import require
from regard.core.device import device_of
from regard.ops.threads import threads as using_threads
from regard.report.folder import Folder, fill
from regard.report.training import training_page
from regard.train.checkpoints import facts_of, restore, save_checkpoint
from regard.train.loop import cosine, fit
from regard.train.plan import Plan
from regard.train.tasks import TASKS

LAST = "last.safetensors"
Progress = Callable[[dict], None]


def train(
    plan: Plan,
    out: str | Path,
    progress: Progress | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> dict:
    """Train every rate, or go on where this folder was left; the result, which result.json holds too.

    `progress` hears {"rate", "step", "done" of all rates, "loss", "score"} after every step. `threads`: None
    takes one for models narrower than 256, where a second is no help on busy cores. `device`: None is the CPU.
    """
    place = device_of(device) or "cpu"
    try_out(plan)
    folder = Folder(Path(out))
    folder.open({"title": f"{plan.label} on {plan.subject}", "settings": plan.to_dict()})
    rows = recovered(folder)
    if (folder.path / "result.json").exists():
        (folder.path / LAST).unlink(missing_ok=True)  # a kill may have come before it was taken away
        return json.loads((folder.path / "result.json").read_text(encoding="utf8"))
    with using_threads(threads or (1 if plan.width < 256 else torch.get_num_threads())):
        for rate in plan.rates:
            under_way = facts_of(folder.path / LAST)
            if final(rows, rate, plan) is not None and (under_way is None or under_way["rate"] != rate):
                continue
            model = train_rate(plan, rate, folder, rows, progress, place)
            keep_best(plan, rows, rate, model, folder.path / "best")
    result = summary(plan, rows, folder)
    head = {"title": f"{plan.label} on {plan.subject}", "settings": plan.to_dict()}
    folder.write("report.html", training_page(head, rows, result))
    folder.write("result.json", json.dumps(result, indent=1))
    (folder.path / LAST).unlink(missing_ok=True)
    return result


def try_out(plan: Plan) -> None:
    """Make the model and the data of a plan once, so that what cannot be is refused before a folder is begun."""
    plan.model()
    TASKS[plan.task].batch(plan, 0)
    TASKS[plan.task].test(plan)


def train_rate(
    plan: Plan, rate: float, folder: Folder, rows: list[dict], progress: Progress | None, device: str = "cpu"
) -> PreTrainedModel:
    """The trained model: from the last checkpoint of this rate to the last step; new points are added to rows."""
    model, task = plan.model().to(device), TASKS[plan.task]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.1)
    start = resume(folder.path / LAST, model, optimizer, rate)
    losses, began = list[float](), time.perf_counter()

    def after_step(step: int, loss: float) -> None:
        nonlocal began
        losses.append(loss)
        require(math.isfinite(loss), "the loss is finite; a smaller learning rate may help", loss=loss, rate=rate,
                step=step)  # fmt: skip
        score = None
        if (step + 1) % plan.every == 0 or step + 1 == plan.steps:
            score = evaluate(model, plan)
            row = {
                "key": f"{rate}/{step + 1}", "rate": rate, "step": step + 1, "loss": sum(losses) / len(losses),
                "score": score, "seconds": round(time.perf_counter() - began, 2),
            }  # fmt: skip
            save_checkpoint(folder.path / LAST, model.state_dict(), optimizer, row)
            folder.add(row)
            rows.append(row)
            losses.clear()
            began = time.perf_counter()
        if progress:
            done = plan.rates.index(rate) * plan.steps + step + 1
            progress({"rate": rate, "step": step + 1, "done": done, "loss": loss, "score": score})

    def loss_at(step: int) -> Tensor:
        inputs, labels = (t.to(device) for t in task.batch(plan, step))
        return task.loss(task.logits(model, inputs), labels)

    fit(optimizer, loss_at, plan.steps, schedule=cosine(), start=start, after_step=after_step)
    return model


def recovered(folder: Folder) -> list[dict]:
    """The rows of the run; the last one comes from the checkpoint where a kill fell between the two writes."""
    rows, last = folder.rows(), facts_of(folder.path / LAST)
    if last is not None and last["key"] not in rows:
        folder.add(last)
        rows[last["key"]] = last
    return list(rows.values())


@torch.no_grad()
def evaluate(model: PreTrainedModel, plan: Plan) -> float:
    """The task's score on data that is not trained on."""
    model.eval()
    inputs, labels = TASKS[plan.task].test(plan)
    task, place = TASKS[plan.task], getattr(model, "device", "cpu")
    parts = [
        task.measure(task.logits(model, x.to(place)), y.to(place))
        for x, y in zip(inputs.split(plan.batch), labels.split(plan.batch), strict=True)
    ]
    model.train()
    return sum(p[0] for p in parts) / sum(p[1] for p in parts)


def resume(path: Path, model: PreTrainedModel, optimizer: Any, rate: float) -> int:
    """Put the checkpoint of this rate back; the step that comes next, 0 where there is none."""
    row = facts_of(path)
    if row is None or row["rate"] != rate:
        return 0
    restore(path, model.state_dict(), optimizer)
    return row["step"]


def keep_best(plan: Plan, rows: list[dict], rate: float, model: PreTrainedModel, path: Path) -> None:
    """`best` becomes the model of this rate if no earlier rate scores better; each file is moved into place whole."""
    scores = {r: final(rows, r, plan) for r in plan.rates if final(rows, r, plan) is not None}
    if TASKS[plan.task].better(scores.values()) != scores[rate]:
        return
    with quiet():
        fill(path, model.save_pretrained, last="model.safetensors", replace=True)


@contextmanager
def quiet():
    """No progress bars of transformers within ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def final(rows: list[dict], rate: float, plan: Plan) -> float | None:
    """The score of a rate at its last step, None while it is not done."""
    return next((r["score"] for r in rows if r["rate"] == rate and r["step"] == plan.steps), None)


def summary(plan: Plan, rows: list[dict], folder: Folder) -> dict:
    """The best rate and its score, in numbers and in a sentence."""
    task = TASKS[plan.task]
    scores = {rate: final(rows, rate, plan) for rate in plan.rates}
    best = task.better(scores, key=scores.get)
    ((what, amount),) = task.amount(plan).items()
    facts = {
        "parameters": plan.model().num_parameters(), what: amount,
        f"{what} per second": amount * len(plan.rates) / max(1e-9, sum(r["seconds"] for r in rows)),
    }  # fmt: skip
    known = task.facts(plan, folder.path / "best")
    judged = f" On {known['judged on']} others: {known['judged']:.1%}." if known else ""
    score = f"{scores[best]:.1%}" if task.score == "accuracy" else f"{scores[best]:.3f} {task.score}"
    return {
        "task": plan.task, "mechanism": plan.label, "rate": best, "score": scores[best], "score_name": task.score,
        "scores": {f"{task.score} at rate {r:g}": s for r, s in scores.items()}, "facts": facts,
        "sentence": f"{plan.label} on {plan.subject}: {task.score} {score.removesuffix(' ' + task.score)} after "
                    f"{plan.steps} steps, at the best of {len(plan.rates)} learning rates ({best:g}).{judged}",
        "model": str(folder.path / "best"), **known,
    }  # fmt: skip
