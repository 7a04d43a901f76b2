"""regard check, regard support."""

from typing import Annotated

import typer

from regard.cli.console import Json, app, out, say_json
from regard.cli.names import complete_page


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            help="FILE.py:function of q, k, v [B, H, N, D]; or a page, by name or as FILE.py that has METHOD",
            autocompletion=complete_page,
        ),
    ],
    pattern: Annotated[str, typer.Option(help="self, causal_self, cross, causal_cross")] = "causal_self",
    against: Annotated[
        str | None, typer.Option(help="A mechanism that it should equal: NAME, or NAME:key=value,...")
    ] = None,
    compiles: Annotated[bool, typer.Option("--compile", help="Ask torch.compile too.")] = False,
    as_json: Json = False,
) -> None:
    """Which laws does your own attention function, or your own page, keep? Exit status 1 if it breaks one."""
    from regard.testing.check import check_file

    if ".py:" not in target:
        return check_own_page(target, as_json)

    report = check_file(target, pattern, against, compiles=compiles)
    if as_json:
        say_json(report.to_dict())
    else:
        out.print(report.table())
        summary = f"violated: {', '.join(report.violated)}" if report.violated else "no law is violated"
        out.print(summary, style="bold red" if report.violated else "green", highlight=False)
    if report.violated:
        raise typer.Exit(1)


def check_own_page(target: str, as_json: bool) -> None:
    """A page of any kind: every law of its kind."""
    from regard import catalog
    from regard.report import table
    from regard.testing.pages import check_page

    name = catalog.register(target) if target.endswith(".py") else target
    kind = catalog.get(name).kind
    try:
        report, broken = check_page(name), ""
    except AssertionError as error:
        report, broken = {}, str(error)
    rows = [{"law": law, "verdict": str(verdict)} for law, verdict in (report or {}).items()]
    if as_json:
        say_json({"page": name, "kind": kind, "laws": rows, "violated": broken})
    else:
        if rows:
            out.print(table(rows, ["law", "verdict"], title=f"{name}, {kind}"))
        out.print(
            broken or "no law is violated",
            style="bold red" if broken else "green",
            highlight=False,
            markup=False,
        )
    if broken:
        raise typer.Exit(1)


@app.command()
def support(
    reasons: Annotated[bool, typer.Option("--reasons", help="Say why a pattern is refused.")] = False,
    as_json: Json = False,
) -> None:
    """Which mechanism can do which pattern: found by truncating inputs, not typed. Exit status 1 if one leaks."""
    from regard.core.shapes import PATTERNS
    from regard.report import table
    from regard.testing.mechanism import support_matrix

    rows = support_matrix()
    if as_json:
        say_json(rows)
    else:
        brief = [{"mechanism": r["mechanism"], **{p: r[p].split(":")[0] for p in PATTERNS}} for r in rows]
        out.print(table(brief, ["mechanism", *PATTERNS]))
        if reasons:
            refusals = [(r["mechanism"], p, r[p]) for r in rows for p in PATTERNS if ":" in r[p]]
            for name, pattern, reason in refusals:
                out.print(f"{name}, {pattern}: {reason}", highlight=False)
    if any(r[p].startswith("leaks:") for r in rows for p in PATTERNS):
        raise typer.Exit(1)
