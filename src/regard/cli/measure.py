"""regard compare, regard claims, regard bench."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.console import Json, app, err, if_stopped, out, say_json, watching
from regard.cli.names import complete_pages, complete_tasks
from regard.core.spec import split_list, split_specs


@app.command()
def compare(
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face folder or name, a GGUF file, smollm2; none: the shipped lm."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names, with settings as NAME:key=value.", autocompletion=complete_pages),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Names or groups: regard list --kind task; ruler.", autocompletion=complete_tasks),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths in tokens.")] = None,
    budgets: Annotated[str | None, typer.Option(help='Tokens, fractions or bytes: "256,0.1,64MB".')] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Where rows and report go; resumed if it is there.")
    ] = Path("runs/compare"),
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
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    as_json: Json = False,
) -> None:
    """Which method is best on this model, these tasks, this budget? Exit status 1 if a cell failed."""
    from regard.bench.compare import compare as run
    from regard.bench.compare import slow_model
    from regard.report import show as show_result
    from regard.report.pictures import PictureResult

    tokens = split_list(lengths)
    if slow := slow_model(model, device, dtype):
        err.print(f"regard: {slow}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    kept = f"Finished cells are kept in {folder}; the same command goes on from there."
    shown = watching(as_json)
    with if_stopped(kept), shown as progress:
        result = run(
            model, split_specs(methods), split_specs(tasks), None if tokens is None else [int(n) for n in tokens],
            split_list(budgets), out=folder,
            samples=samples, seed=seed, text=text, images=images,
            workers=workers, limit=limit, retry=retry, timing=timing, at_floor=at_floor,
            trust_remote_code=trust_remote_code, device=device, dtype=dtype,
            executor=executor, progress=progress, say=shown.say,
        )  # fmt: skip
    if isinstance(result, PictureResult):
        say_pictures(result, folder, as_json)
    elif as_json:
        say_json(
            {
                "run": result.run,
                "sentence": result.sentence(),
                "at_floor": result.at_floor(),
                "summary": result.summary(),
                "rows": result.rows,
            }
        )
    else:
        show_result(result, out)
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


@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Rows to measure; none: all.")] = None,
    on: Annotated[
        str | None, typer.Option(help="On this model alone of those that a claim names: toy, lm, smollm2.")
    ] = None,
    ledger_only: Annotated[
        bool, typer.Option("--ledger", help="The last measured results; measure nothing.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write what is measured beside the claim.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Does the paper's claim hold here, now? Exit status 0 only if all hold, each on the last of its models."""
    from regard.claims import ledger
    from regard.report.folder import writable

    chosen = ledger.asked(names or (), on)
    if ledger_only:
        known = ledger.recorded()
        asked = dict.fromkeys(name for name, _ in chosen)
        say_claims([r for n in asked for r in known.get(n, []) if on in (None, r.get("model"))], as_json)
        return
    for name in {name for name, _ in chosen} if record else ():
        writable(ledger.path_of(name).parent)
    rows = []
    with if_stopped("What was measured is recorded." if record else "Nothing is kept: no --record."):
        for name, model in chosen:
            if not as_json:
                err.print(f"measuring {name}{f' on {model}' if model else ''} …", highlight=False)
            rows.append(ledger.measure(name, model))
            if record:
                ledger.record(rows[-1:])
    say_claims(rows, as_json)
    if not ledger.all_hold(rows):
        raise typer.Exit(1)


def say_claims(rows: list[dict], as_json: bool) -> None:
    """A line for each claim and model; of one that was not measured, why."""
    from regard.report import table

    if as_json:
        say_json(rows)
        return
    shown = [
        {"model": "", "seconds": "", **r, "measured": json.dumps(r["measured"], default=str)}
        if r["measured"]
        else {"model": "", "seconds": "", **r, "measured": r["note"]}
        for r in rows
    ]
    out.print(table(shown, ["name", "model", "verdict", "seconds", "bound", "measured"]))


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help="decode, attach, caches, mechanisms, sparse, grid or efficiency")
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes, for a look.")] = False,
    pattern: Annotated[str, typer.Option(help="Of the mechanisms, for efficiency.")] = "causal_self",
    names: Annotated[str | None, typer.Option("--methods", help="Which mechanisms, for efficiency.")] = None,
    as_json: Json = False,
) -> None:
    """Operator speed, paired with full attention in one process, against the machine's own bound."""
    from regard.bench.timing import LIMIT, QUICK_LIMIT, with_cpu
    from regard.ops.machine import cpu_facts
    from regard.report import table

    progress = None if as_json else lambda t: err.print(t, highlight=False)
    if name == "efficiency":
        from regard.bench import efficiency

        most, limit = (2_048, QUICK_LIMIT) if quick else (16_384, LIMIT)
        rows = with_cpu(efficiency.efficiency(split_list(names), pattern, most, progress, limit))
        shown = efficiency.shown(rows)
        columns = list(shown[0])
    else:
        from regard.bench import operators

        rows = operators.bench(name, quick=quick, progress=progress)
        shown = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        columns = ["case", "ratio", "of_bound", "spread", "note"]
    if as_json:
        # JSON has no NaN: what was not measured is null
        say_json([{k: None if v != v else v for k, v in row.items()} for row in rows])
    else:
        facts = cpu_facts()
        units = "" if facts["multiplies_bf16"] else "not "
        title = f"bench {name}, {facts['cpu']}, bfloat16 {units}multiplied natively ({facts['torch_uses']})"
        out.print(table(shown, columns, title=title))
