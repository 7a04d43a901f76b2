"""regard compare."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.asked import numbers
from regard.cli.console import Json, app, err, if_stopped, out, say_json, watching
from regard.cli.names import complete_pages, complete_tasks
from regard.core.device import device_of
from regard.core.spec import split_list, split_specs

QUICK = {"lengths": "256", "budgets": "0.25", "timing": False}


@app.command()
def compare(
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face folder or name, a GGUF file, smollm2; none: the shipped lm."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, with settings as NAME:key=value, laid over one another as A+B; files of your own.",
            autocompletion=complete_pages,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Names or groups: regard list --kind task; ruler. Your own: FILE.jsonl, FILE.py.",
            autocompletion=complete_tasks,
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths in tokens: 256,512,1024.")] = None,
    budgets: Annotated[
        str | None, typer.Option(help='Tokens, fractions or bytes: "256,0.1,25%,64MB".')
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Where rows and report go, resumed if it is there: runs/compare-MODEL."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file of your own for filler and perplexity.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images and annotations of your own, for pope, chair and the like.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples in a cell: 8 texts, or 64 images, where it is not said.")
    ] = None,
    seed: int = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask in the model's chat template; where it has one."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt, in the chat template.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Ask beyond the positions that the model names.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A first look: length 256, budget 0.25, no timing, where not said."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say cells, time and memory, from a probe; measure nothing.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    limit: Annotated[float, typer.Option(help="Seconds a cell may take.")] = 600.0,
    executor: Annotated[
        str | None,
        typer.Option(
            help="local, submitit:partition=NAME,gpus=1,mem=32GB,minutes=60 (Slurm) or ray:address=HOST:PORT."
        ),
    ] = None,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Time prefill and decode, once for each length.")
    ] = True,
    at_floor: Annotated[
        bool, typer.Option("--at-floor", help="Measure methods also where full attention only guesses.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry/--no-retry", help="Run failed cells of an earlier start again.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; none: the GPU where there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; none: as the weights are.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no network for a model.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    as_json: Json = False,
) -> None:
    """Which method is best on this model, these tasks, this budget? Exit status 1 if a cell failed."""
    from regard.bench.words import check_words

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if quick:
        lengths, budgets, timing = lengths or QUICK["lengths"], budgets or QUICK["budgets"], False
    folder, wanted, asked = folder or default_folder(model), split_specs(methods), split_specs(tasks)
    tokens = numbers("--lengths", lengths, int)
    check_words(
        wanted, asked, model=model, folder=folder, samples=samples, workers=workers, limit=limit, dtype=dtype
    )
    device = device_of(device)
    from transformers.utils import logging

    from regard.bench.compare import compare as run
    from regard.bench.compare import slow_model

    logging.disable_progress_bar()
    if slow := slow_model(model, device, dtype):
        err.print(f"regard: {slow}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    kept = f"Finished cells are kept in {folder}; the same command goes on from there."
    shown = watching(as_json)
    with if_stopped(kept), shown as progress:
        result = run(
            model, wanted, asked, tokens, split_list(budgets), out=folder, samples=samples, seed=seed, text=text,
            images=images, chat=chat, system=system, extrapolate=extrapolate, dry_run=dry_run, workers=workers,
            limit=limit, retry=retry, timing=timing, at_floor=at_floor, trust_remote_code=trust_remote_code,
            device=device, dtype=dtype, executor=executor, progress=progress, say=shown.say,
        )  # fmt: skip
    say_forecast(result, folder, as_json) if dry_run else say_result(result, folder, as_json)


def default_folder(model: str | None) -> Path:
    """Where a comparison goes that names no folder: by the model's name.

    >>> default_folder("HuggingFaceTB/SmolLM2-135M").as_posix(), default_folder(None).as_posix()
    ('runs/compare-SmolLM2-135M', 'runs/compare-lm')
    """
    name = Path((model or "lm").removeprefix("shipped:")).name.removesuffix(".gguf")
    return Path("runs") / f"compare-{name or 'model'}"


def say_forecast(facts: dict, folder: Path, as_json: bool) -> None:
    """What a run would take."""
    from regard.bench.forecast import forecast_text

    if as_json:
        say_json({**facts, "folder": str(folder)})
        return
    out.print(f"{forecast_text(facts)}; {facts['memory']}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"nothing was measured; {folder} is as it was", highlight=False, markup=False, soft_wrap=True)


def say_result(result: Any, folder: Path, as_json: bool) -> None:
    """What a comparison found; exit status 1 if a cell failed."""
    from regard.report import show as show_result
    from regard.report.pictures import PictureResult
    from regard.report.questions import questions

    if isinstance(result, PictureResult):
        say_pictures(result, folder, as_json)
    elif as_json:
        say_json(
            {
                "run": result.run,
                "sentence": result.sentence(),
                "questions": dict(questions(result)),
                "at_floor": result.at_floor(),
                "summary": result.summary(),
                "rows": result.rows,
            }
        )
    else:
        show_result(result, out)
        for question, answer in questions(result):
            out.print(f"{question}: {answer}", highlight=False, markup=False)
        out.print(f"\n[bold]{folder / 'report.html'}[/bold]", highlight=False, soft_wrap=True)
    if failed := result.failed():
        say_failed(failed, result.size())
        raise typer.Exit(1)


def say_pictures(result: Any, folder: Path, as_json: bool) -> None:
    """What a comparison on images found."""
    from regard.report.picture_page import show_pictures

    if as_json:
        rows = [{**row, "verdict": result.verdict(row)} for row in result.rows]
        say_json(
            {"run": result.run, "sentence": result.sentence(), "readings": result.readings(), "rows": rows}
        )
    else:
        show_pictures(result, out)
        out.print(f"\n[bold]{folder / 'report.html'}[/bold]", highlight=False, soft_wrap=True)


def say_failed(failed: list[dict], cells: int) -> None:
    """How many cells failed, and why the first did, where programs do not read."""
    first = failed[0]
    text = f"regard: {len(failed)} of {cells} cells failed; the first, {first['label']} on {first['task']} at length "
    text += f"{first['length']}: {first['status']}: {first['error']}"
    err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
