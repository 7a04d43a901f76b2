"""regard compare, regard claims, regard bench."""

import json
from pathlib import Path
from typing import Annotated

import typer

from regard.cli.console import Json, app, err, if_stopped, out, say_json, watching
from regard.core.spec import split_list, split_specs


@app.command()
def compare(
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face folder or name, a GGUF file, smollm2; none: the shipped lm."),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Names, with settings as NAME:key=value.")] = None,
    tasks: Annotated[str | None, typer.Option(help="needle, recall, perplexity")] = None,
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths in tokens.")] = None,
    budgets: Annotated[str | None, typer.Option(help='Tokens, fractions or bytes: "256,0.1,64MB".')] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Where rows and report go; resumed if it is there.")
    ] = Path("runs/compare"),
    text: Annotated[
        Path | None, typer.Option(help="A text file of your own for filler and perplexity.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples in a cell.")] = 8,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    limit: Annotated[float, typer.Option(help="Seconds a cell may take.")] = 600.0,
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

    tokens = split_list(lengths)
    if slow := slow_model(model, device, dtype):
        err.print(f"regard: {slow}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    kept = f"Finished cells are kept in {folder}; the same command goes on from there."
    with if_stopped(kept), watching(as_json) as progress:
        result = run(
            model, split_specs(methods), split_specs(tasks), None if tokens is None else [int(n) for n in tokens],
            split_list(budgets), out=folder,
            samples=samples, seed=seed, text=text,
            workers=workers, limit=limit, retry=retry, trust_remote_code=trust_remote_code, device=device, dtype=dtype,
            progress=progress,
        )  # fmt: skip
    if as_json:
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
        say_failed(failed, len(result.rows))
        raise typer.Exit(1)


def say_failed(failed: list[dict], cells: int) -> None:
    """How many cells failed, and why the first did, where programs do not read."""
    first = failed[0]
    text = f"regard: {len(failed)} of {cells} cells failed; the first, {first['label']} on {first['task']} at length "
    text += f"{first['length']}: {first['status']}: {first['error']}"
    err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Rows to measure; none: all.")] = None,
    ledger_only: Annotated[
        bool, typer.Option("--ledger", help="The last measured results; measure nothing.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write what is measured beside the claim.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Does the paper's claim hold here, now? Exit status 0 only if all hold."""
    from regard.claims import ledger
    from regard.report import table
    from regard.report.folder import writable

    chosen = names or ledger.names()
    if ledger_only:
        known = ledger.measured()
        rows = [known[n] for n in chosen if n in known]
    else:
        for name in chosen:
            ledger.claim(name)
            if record:
                writable(ledger.path_of(name).parent)
        rows = []
        kept = "What was measured is recorded." if record else "Nothing is kept: no --record."
        with if_stopped(kept):
            for name in chosen:
                if not as_json:
                    err.print(f"measuring {name} …", highlight=False)
                rows.append(ledger.measure(name))
                if record:
                    ledger.record(rows[-1:])
    if as_json:
        say_json(rows)
    else:
        shown = [{**r, "measured": json.dumps(r["measured"], default=str)} for r in rows]
        out.print(table(shown, ["name", "verdict", "seconds", "bound", "measured"]))
    if not ledger_only and any(row["verdict"] != "holds" for row in rows):
        raise typer.Exit(1)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="decode, attach, mechanisms, sparse or efficiency")],
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
