"""regard train."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regard.cli import asked
from regard.cli.console import Json, app, if_stopped, out, say_json, training
from regard.core.device import device_of
from regard.core.errors import require
from regard.train.suits import SUITS, suits

if TYPE_CHECKING:
    from regard.train.plan import Plan


@app.command()
def train(
    task: Annotated[
        str,
        typer.Option(
            help="mqar (associative recall), text (bytes of documentation), digits (8 x 8 images) or find (a "
            "digit among decoys)"
        ),
    ] = "mqar",
    mechanism: Annotated[
        list[str],
        typer.Option(
            help="A name with settings as NAME:key=value; or one for every layer, of images every stage: a,b. Given "
            "several times: a run of each, side by side."
        ),
    ] = ["softmax"],  # noqa: B006  (typer reads it)
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text of your own for --task text: a UTF-8 file, or a folder of .txt and .md files."
        ),
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help=f"Learning rates; the best on held-out data is kept. {suits('rates')}")
    ] = None,
    steps: Annotated[int | None, typer.Option(help=suits("steps"))] = None,
    batch: Annotated[int | None, typer.Option(help=suits("batch"))] = None,
    layers: Annotated[int | None, typer.Option(help=suits("layers"))] = None,
    width: Annotated[int | None, typer.Option(help=suits("width"))] = None,
    heads: Annotated[int | None, typer.Option(help=suits("heads"))] = None,
    mlp: Annotated[
        int | None, typer.Option(help=f"Inner width of the channel mixer; 0: none. {suits('mlp')}")
    ] = None,
    conv: Annotated[
        int | None, typer.Option(help="Tokens of the short convolution on q, k, v; 0: none. Of texts: 3.")
    ] = None,
    rope_theta: Annotated[
        float | None,
        typer.Option(
            "--rope-theta", "--rope", help="Base of rotary positions, 0: none; as needed. Of texts."
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a text: 128.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Key-value pairs of mqar: 16.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Words of mqar: 64.")] = None,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="Steps between two points of the curve, and checkpoints.")] = 50,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where it goes, resumed if it is there: runs/train/TASK-NAME")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or mps, which has to be there; none: cpu.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; none: one for narrow models.")] = None,
    as_json: Json = False,
) -> None:
    """Train a small model with any mechanism, and draw its curves. The same command goes on where it was stopped."""
    specs = list(dict.fromkeys(mechanism))
    of_texts = dict(conv=conv, rope_theta=rope_theta, length=length, pairs=pairs, vocab=vocab)
    given: dict[str, Any] = dict(
        rates=asked.numbers("--rates", rates, float), steps=steps, batch=batch, layers=layers, width=width, heads=heads,
        mlp=mlp, text=None if text is None else str(text), **of_texts,
    )  # fmt: skip
    asked.at_least(1, threads=threads)
    given = {name: value for name, value in given.items() if value is not None}
    plans = {spec: plan_of(task, spec, dict(seed=seed, every=every, **given)) for spec in specs}
    first = plans[specs[0]]
    for name, value in of_texts.items():
        rule = f"{name} is a setting of texts"
        require(not first.of_images or value is None, rule, task=task, **{name: value})
    folder = (
        folder
        or Path("runs/train")
        / f"{task}-{'-'.join(dict.fromkeys(n for p in plans.values() for n in p.mechanisms))}"
    )
    asked.free(folder, "run.json")
    place = device_of(device)
    kept = f"The run is kept in {folder} up to its last checkpoint, one in {every} steps; the same command goes on."
    total = len(plans) * len(first.rates) * first.steps
    with if_stopped(kept), training(as_json, total) as step:
        result = run_plans(plans, folder, step, threads, place)
    if as_json:
        say_json({**result, "folder": str(folder)})
        return
    out.print(result["sentence"], highlight=False)
    out.print(f"[bold]{folder / 'report.html'}[/bold]", highlight=False, soft_wrap=True)


def plan_of(task: str, spec: str, given: dict[str, Any]) -> "Plan":
    """The plan of one run; what is wrong with it is said here, before transformers is imported."""
    asked.choice("--task", task, SUITS)
    mechanisms, settings = asked.run(spec)
    from regard.train.plan import Plan

    return Plan.of(task, mechanisms=mechanisms, settings=settings, **given)


def run_plans(
    plans: "Mapping[str, Plan]", folder: Path, step: Any, threads: int | None, place: str | None
) -> dict:
    """One run, or several side by side."""
    from regard.train.run import train as train_one
    from regard.train.several import train_several

    if len(plans) > 1:
        return train_several(plans, folder, step, threads, place)
    (plan,) = plans.values()
    return train_one(plan, folder, step, threads, place)
