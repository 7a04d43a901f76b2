"""regard claims, regard bench."""

from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from regard.cli.console import Json, app, err, if_stopped, out, say_json
from regard.core.spec import split_list


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
    """Of each claim and model the verdict, the bound and what was measured, in words; or why it was not."""
    if as_json:
        say_json(rows)
        return
    for row in rows:
        for indent, text in enumerate(claim_text(row)):
            shown = Text(text, style="" if indent else "bold")
            out.print(Padding(shown, (0, 0, 0, 4 * bool(indent))), highlight=False)


def claim_text(row: dict) -> list[str]:
    """Lines on a claim: its name and verdict, its bound, what was measured or why nothing was, parts that fail."""
    from regard.cli.page_words import TIED, measured

    on, took = row.get("model") or "", row.get("seconds")
    head = f"{row['name']}{f' on {on}' if on else ''}: {row['verdict']}"
    head += f", {took:.0f} s" if isinstance(took, int | float) else ""
    found = measured(row["measured"]).replace(TIED, " ") if row["measured"] else row["note"]
    lines = [head, f"bound     {row['bound']}", f"measured  {found}"]
    failing = [part for part, holds in row.get("parts", {}).items() if not holds]
    if failing:
        lines.append(f"fails     {'; '.join(failing)}")
    if row.get("holds_here"):
        lines.append(f"holds     {'; '.join(row['holds_here'])}, noted as failing")
    return lines


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
