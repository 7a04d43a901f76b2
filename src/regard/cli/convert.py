"""regard convert, regard calibrate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import asked
from regard.cli.asked import Device
from regard.cli.console import Json, app, converting, if_stopped, out, say_json
from regard.core.device import device_of
from regard.models.names import check_model

FINETUNES = ("auto", "full", "lora", "none")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name, a GGUF file, lm or smollm2.")],
    method: Annotated[
        str, typer.Argument(help="A page that chooses blocks; settings as NAME:key=value, learned=FOLDER.")
    ],
    target: Annotated[str, typer.Option(help="mass:0.95 or sparsity:0.9, of every layer.")],
    folder: Annotated[
        Path, typer.Option("--out", help="A new folder for the result, which regard.attach takes.")
    ],
    length: Annotated[int, typer.Option(help="Tokens of the prompts.")] = 2048,
    samples: Annotated[int, typer.Option(help="Prompts.")] = 4,
    seed: int = 0,
    text: Annotated[Path | None, typer.Option(help="A text file of your own for the prompts.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """A setting for each layer under which sparse prefill meets a target on this model."""
    asked.choice("--target", target.partition(":")[0], ("mass", "sparsity"))
    name, settings = asked.mechanism(method)
    asked.at_least(1, length=length, samples=samples)
    check_model(model)
    asked.text_file(text)
    asked.free(folder, "regard.json")
    place = device_of(device)
    from regard.attaching.converted import configured, earlier
    from regard.attaching.knob import Target
    from regard.attaching.knob import calibrate as run
    from regard.models.shipped import load_any
    from regard.report import table
    from regard.report.folder import vacant
    from regard.tasks import Source

    chosen, wanted = configured(name, settings), Target.parse(target)
    vacant(folder, **earlier(folder))
    source = None if text is None else Source.from_path(text)
    loaded = load_any(model, device=place)
    with if_stopped("Nothing of this calibration is kept; the same command begins it again."):
        found = run(*loaded, chosen, wanted, length=length, samples=samples, seed=seed, source=source)
    found.save(folder)
    if as_json:
        say_json(dict(found.report))
        return
    rows = [{"layer": row["layer"], found.method.page.knob[0]: row["value"],
             **{key: f"{min(row[key]):.0%} to {max(row[key]):.0%}" for key in ("kept", "mass")}}
            for row in found.report["reached"]]  # fmt: skip
    out.print(
        table(
            rows, list(rows[0]), f"{found.method.label} at {target}: keys read and attention mass, over heads"
        )
    )
    out.print(
        f"[bold]{folder}[/bold]: regard.attach(model, regard.read_converted({str(folder)!r}))",
        highlight=False,
    )


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name, a GGUF file, lm or smollm2.")],
    mechanism: Annotated[
        str,
        typer.Option(
            help="hedgehog, lawcat, seer_attention, flux_attention, ...; settings as NAME:key=value"
        ),
    ] = "hedgehog",
    steps: Annotated[int | None, typer.Option(help="Steps of attention transfer.")] = None,
    finetune: Annotated[
        str,
        typer.Option(
            help="full, lora, none, or auto: none where attention stays and is read in part, else full"
        ),
    ] = "auto",
    finetune_steps: Annotated[int | None, typer.Option(help="Steps of the fine-tune after it.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text to learn from; none: Python's help pages.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of a training sequence; none: 256, longer for gates and routers."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Lengths at which before and after are measured.")
    ] = "256,512,1024",
    samples: Annotated[int, typer.Option(help="Questions of a task at a length.")] = 16,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 50,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where it goes, resumed if it is there: runs/convert/NAME")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Learn what a mechanism needs on a trained softmax model; what the model can do before, between and after."""
    asked.choice("--finetune", finetune, FINETUNES)
    at = asked.numbers("--lengths", lengths, int) or ()
    asked.at_least(1, length=length, samples=samples, every=every, lengths=min(at))
    asked.at_least(0, steps=steps, finetune_steps=finetune_steps)
    name, settings = asked.mechanism(mechanism)
    folder = folder or Path("runs/convert") / name
    check_model(model)
    asked.text_file(text)
    asked.free(folder, "regard.json", "unfinished")
    place = device_of(device)
    convertible(name, settings)
    from regard.bench.conversion import convert_folder
    from regard.report import table

    given = {"steps": steps, "finetune_steps": finetune_steps}
    counts = {key: count for key, count in given.items() if count is not None}
    kept = (
        f"Finished stages are kept in {folder}, the one under way up to its last checkpoint, one in {every} steps; "
        "the same command goes on."
    )
    with if_stopped(kept), converting(as_json) as bar:
        report = convert_folder(
            model.removeprefix("shipped:"), name, folder, text=text, length=length,
            finetune=None if finetune == "none" else finetune, lengths=at, samples=samples, seed=seed, every=every,
            device=place, show=bar.say, progress=bar.step, **counts, **settings,
        )  # fmt: skip
    if as_json:
        say_json({**report, "folder": str(folder)})
        return
    stages = list(report["rows"])
    tasks = [key for key in report["rows"][stages[-1]] if not key.startswith("bytes")]
    rows = [
        {"task": task_text(t), **{s: score_text(t, report["rows"][s].get(t)) for s in stages}} for t in tasks
    ]
    out.print(table(rows, ["task", *stages], title=f"{report['mechanism']} in {model}"))
    if report["state_bytes"] is not None:
        kept = ", ".join(f"{n} tokens {b / 1024:,.0f} KiB" for n, b in report["kv_bytes"].items())
        out.print(f"a text holds {report['state_bytes'] / 1024:,.0f} KiB at any length; keys and values: {kept}",
                  highlight=False)  # fmt: skip
    out.print(
        f"[bold]{folder}[/bold]: regard.load_converted({str(folder)!r})", highlight=False, soft_wrap=True
    )


def convertible(name: str, settings: dict[str, Any]) -> None:
    """Refuse a mechanism that has nothing to learn, and wrong settings, before a model is loaded."""
    from regard import catalog
    from regard.train.convertible import check

    check(catalog.method(name, **settings), "auto", None)


def task_text(task: str) -> str:
    """ "needle_256" as "needle at 256", "mass_needle_256" as "mass, needle at 256"."""
    *kind, name, length = task.split("_")
    return f"{''.join(f'{k}, ' for k in kind)}{name} at {length}"


def score_text(task: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} nats" if task.startswith("perplexity") else f"{value:.0%}"
