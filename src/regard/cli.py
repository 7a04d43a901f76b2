"""The command line: list, show, compare, claims, bench, doctor. `--json` everywhere; errors say what to do."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="A catalogue and workbench of attention for transformer models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out, err = Console(), Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
STOPPED = 130
KNOWN = (ValueError, KeyError, OSError)


def main() -> None:
    """Run the command; an error of the user's is one line, exit status 2; Ctrl-C ends with 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = app(standalone_mode=False) or 0  # a typer.Exit comes back as its status
    except (KeyboardInterrupt, typer.Abort):
        status = STOPPED
    except Exception as error:
        status = complain(error)
    if status == STOPPED:
        err.print("\nstopped. Finished cells are kept; the same command goes on from there.")
    sys.exit(status)


def complain(error: Exception) -> int:
    """Say an error of the user's in one line; anything else is a fault of ours and keeps its traceback."""
    if hasattr(error, "show") and hasattr(
        error, "exit_code"
    ):  # click's own: a wrong option, an unknown command
        error.show()
        return error.exit_code
    if not isinstance(error, KNOWN) and not type(error).__module__.startswith("regard."):
        raise error
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    err.print(f"regard: {said}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2


def say_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False, default=str))


def split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def number(text: str) -> int | float | str:
    """A budget as typed: "512" tokens, "0.1" or "10%" a fraction, "64MB" bytes."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@app.command("list")
def list_pages(
    kind: Annotated[str | None, typer.Option(help="mechanism, mask, position, cache, tracing, task")] = None,
    pattern: Annotated[str | None, typer.Option(help="self, causal_self, cross, causal_cross")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README.")] = False,
    as_json: Json = False,
) -> None:
    """The pages of the catalogue."""
    from regard import catalog
    from regard.claims import ledger
    from regard.report import table

    known = ledger.measured()
    rows = []
    for name in catalog.find(kind, pattern):
        page = catalog.get(name)
        rows.append(
            {
                "name": name,
                "kind": page.kind,
                "title": page.card.title,
                "paper": page.card.paper,
                "patterns": list(page.patterns),
                "path": str(catalog.path_of(name)),
                "claim": known.get(name, {}).get("verdict", ""),
            }
        )
    if as_json:
        say_json(rows)
    elif markdown:
        typer.echo(methods_table(rows))
    else:
        out.print(table(rows, {"name": "name", "kind": "kind", "title": "title", "claim": "claim"}))


def methods_table(rows: list[dict]) -> str:
    """The pages as a Markdown table, printed from their cards and the claims' ledger."""
    from regard import catalog

    lines = ["| method | kind | idea | claim |", "|---|---|---|---|"]
    for row in rows:
        idea = catalog.get(row["name"]).card.idea.replace("|", "\\|")
        lines.append(f"| `{row['name']}` | {row['kind']} | {idea} | {row['claim'] or '–'} |")
    return "\n".join(lines)


@app.command()
def show(name: str, as_json: Json = False) -> None:
    """The card of a page, where it lies, and its last measured claim."""
    from dataclasses import asdict, fields

    from regard import catalog
    from regard.claims import ledger

    page = catalog.get(name)
    known = ledger.measured().get(name)
    settings = {f.name: getattr(page.config(), f.name) for f in fields(page.config)}
    card = {**asdict(page.card), "neutral": dict(page.card.neutral)}
    facts = {
        "name": name,
        "kind": page.kind,
        "patterns": list(page.patterns),
        "path": str(catalog.path_of(name)),
    }
    if as_json:
        say_json({**facts, "card": card, "settings": settings, "claim": known})
        return
    out.print(f"[bold]{page.card.title}[/bold]  ({name}, {page.kind})")
    for label, value in {**card, "settings": settings, "path": facts["path"]}.items():
        if value and label != "title":
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            out.print(f"[dim]{label:>9}[/dim]  {shown}", highlight=False)
    if known:
        out.print(f"[dim]    claim[/dim]  {known['statement']}", highlight=False)
        out.print(f"[dim]    bound[/dim]  {known['bound']}", highlight=False)
        out.print(
            f"[dim] measured[/dim]  [bold]{known['verdict']}[/bold] {json.dumps(known['measured'])}",
            highlight=False,
        )


@app.command()
def compare(
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face folder or name; none: the shipped model.")
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
        bool, typer.Option("--retry", help="Run failed cells of an earlier start again.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; none: the GPU where there is one.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    as_json: Json = False,
) -> None:
    """Which method is best on this model, these tasks, this budget?"""
    from regard.bench.compare import compare as run
    from regard.report import show as show_result

    given = split(methods)
    wide = None if lengths is None else [int(n) for n in split(lengths)]
    asked = None if budgets is None else [number(b) for b in split(budgets)]
    with watching(as_json) as progress:
        result = run(
            model, regroup(given), split(tasks), wide, asked, out=folder, samples=samples, seed=seed, text=text,
            workers=workers, limit=limit, retry=retry, trust_remote_code=trust_remote_code, device=device,
            progress=progress,
        )  # fmt: skip
    if as_json:
        say_json(
            {
                "run": result.run,
                "sentence": result.sentence(),
                "summary": result.summary(),
                "rows": result.rows,
            }
        )
    else:
        show_result(result, out)
        out.print(f"\n[bold]{folder / 'report.html'}[/bold]", highlight=False, soft_wrap=True)


def regroup(names: list[str] | None) -> list[str] | None:
    """Settings hold commas too: "a:x=1,y=2,b" is a with x and y, and b."""
    if names is None:
        return None
    grouped: list[str] = []
    for part in names:
        if grouped and "=" in part and ":" not in part:
            grouped[-1] += "," + part
        else:
            grouped.append(part)
    return grouped


class watching:
    """A progress bar on the error stream, with what fails as it happens; silent for programs."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __enter__(self):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description:<34.34}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=self.quiet
        )
        self.bar.start()
        self.task = self.bar.add_task("loading the model", total=None)
        return self.step

    def step(self, row: dict | None, done: int, total: int) -> None:
        said = (
            "loading the model"
            if row is None
            else f"{row['label']} {row['budget'] or ''} {row['task']} {row['length']}"
        )
        self.bar.update(self.task, completed=done, total=total, description=said)
        if row is not None and row["status"] != "ok" and not self.quiet:
            self.bar.console.print(f"{row['status']}: {said}: {row['error']}", style="yellow", markup=False)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Rows to measure; none: all.")] = None,
    ledger_only: Annotated[
        bool, typer.Option("--ledger", help="The last measured results; measure nothing.")
    ] = False,
    record: Annotated[bool, typer.Option("--record", help="Write what is measured into the ledger.")] = False,
    as_json: Json = False,
) -> None:
    """Does the paper's claim hold here, now? Exit status 0 only if all hold."""
    from regard.claims import ledger
    from regard.report import table

    chosen = names or ledger.names()
    if ledger_only:
        known = ledger.measured()
        rows = [known[n] for n in chosen if n in known]
    else:
        for name in chosen:
            ledger.claim(name)
        rows = []
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
    name: Annotated[str, typer.Argument(help="decode or attach")],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes, for a look.")] = False,
    as_json: Json = False,
) -> None:
    """Operator speed, paired with full SDPA attention in one process, against the machine's own bound."""
    from regard.bench import operators
    from regard.report import table

    rows = operators.bench(
        name, quick=quick, told=None if as_json else lambda t: err.print(t, highlight=False)
    )
    if as_json:
        say_json(rows)
    else:
        shown = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        out.print(table(shown, ["case", "ratio", "of_bound", "spread", "note"], title=f"bench {name}"))


@app.command()
def doctor(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder, a family of tiny models, or shipped:lm.")
    ],
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    as_json: Json = False,
) -> None:
    """Which attention sites of a model are reached, which are missed, and whether attaching changes anything."""
    from regard.models.doctor import doctor as examine
    from regard.models.shipped import load, load_shipped
    from regard.testing.zoo import ZOO, build

    inputs: dict = {}
    if model in ZOO:
        loaded, inputs = build(model)
    elif model.startswith("shipped:"):
        loaded = load_shipped(model.removeprefix("shipped:"))[0]
    else:
        loaded = load(model, trust_remote_code=trust_remote_code)[0]
    found = examine(loaded, **inputs)
    say_json(found.to_dict()) if as_json else out.print(str(found), highlight=False, soft_wrap=True)
    if not found.healthy:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
