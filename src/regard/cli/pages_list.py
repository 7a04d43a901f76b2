"""regard list: the pages of the catalogue."""

import fnmatch
from typing import Annotated, Any

import typer

from regard.cli.console import Json, app, out, say_json
from regard.cli.names import complete_kind, complete_page
from regard.core.errors import require, unknown
from regard.core.pages import PATTERNS

NARROW = 76  # columns below which titles and claims share one


@app.command("list")
def list_pages(
    filter: Annotated[
        str,
        typer.Argument(
            metavar="[PATTERN]",
            help='Names with wildcards, such as "*linear*".',
            autocompletion=complete_page,
        ),
    ] = "*",
    kind: Annotated[
        str | None,
        typer.Option(
            help="Of one kind: regard list --kinds says which there are.", autocompletion=complete_kind
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="self, causal_self, cross, causal_cross")] = None,
    family: Annotated[str | None, typer.Option(help="The folder of a kind, such as linear or dense.")] = None,
    needs: Annotated[
        str | None, typer.Option(help="What the card says it needs, such as x or decoder-lm.")
    ] = None,
    show_kinds: Annotated[
        bool, typer.Option("--kinds", help="The kinds, and what is done with them.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README.")] = False,
    as_json: Json = False,
) -> None:
    """The pages of the catalogue, those of your own too."""
    if show_kinds:
        given = {"kind": kind, "pattern": pattern, "family": family, "needs": needs}
        refused = {name: value for name, value in given.items() if value is not None}
        require(filter == "*" and not refused, "--kinds lists all kinds", **refused)
        return say_kinds(as_json)
    names = chosen(filter, kind, pattern, family, needs)
    from regard.claims import ledger
    from regard.report import table

    known = ledger.recorded()
    rows = [row(name, known) for name in names]
    if as_json:
        say_json(rows)
    elif markdown:
        typer.echo(methods_table(rows))
    else:
        shown = table(*fitting(rows, out.width))
        shown.columns[0].no_wrap = shown.columns[1].no_wrap = True  # names are copied
        out.print(shown)


def fitting(rows: list[dict[str, Any]], width: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, columns) for so much room: where it is narrow, the claim stands behind the title."""
    if width >= NARROW:
        return rows, ["name", "kind", "title", "claim"]
    joined = [{**row, "title, claim": "; ".join(filter(None, (row["title"], row["claim"])))} for row in rows]
    return joined, ["name", "kind", "title, claim"]


def chosen(
    filter: str, kind: str | None, pattern: str | None, family: str | None, needs: str | None
) -> list[str]:
    """Names of the pages that fit; a word that no page answers to is an error with the near ones."""
    from regard import catalog
    from regard.kinds import kind_names

    words = [("kind of page", kind, kind_names()), ("pattern", pattern, PATTERNS)]
    words.append(("family", family, {catalog.family_of(name) for name in catalog.pages()} - {""}))
    for what, word, known in words:
        if word is not None and word not in known:
            raise unknown(what, word, known)
    if not fnmatch.filter(catalog.pages(), filter):
        raise unknown("page", filter, catalog.pages())
    names = catalog.list_methods(filter, kind=kind, pattern=pattern, family=family, needs=needs)
    if not names and needs is not None:
        needed = {need for _, page in catalog.every() for need in page.card.needs}
        if needs not in needed:
            raise unknown("need", needs, needed)
    given = {"name": filter, "kind": kind, "pattern": pattern, "family": family, "needs": needs}
    asked = {key: word for key, word in given.items() if word not in (None, "*")}
    require(names, "there is a page that answers to all of these", **asked)
    return names


def row(name: str, known: dict[str, list[dict]]) -> dict[str, Any]:
    from regard import catalog
    from regard.claims import ledger

    page = catalog.get(name)
    return {
        "name": name,
        "kind": page.kind,
        "family": catalog.family_of(name),
        "title": page.card.title,
        "paper": page.card.paper,
        "patterns": list(page.patterns),
        "path": str(catalog.path_of(name)),
        "claim": ledger.in_words(known.get(name, [])),
    }


def say_kinds(as_json: bool) -> None:
    from regard import catalog
    from regard.kinds import kinds
    from regard.report import table

    rows = [
        {"kind": k.name, "pages": len(catalog.list_methods(kind=k.name)), "says": k.says, "verb": k.verb}
        for k in kinds().values()
    ]
    if as_json:
        say_json(rows)
        return
    out.print(table(rows, ["kind", "pages", "says"]))
    for known in kinds().values():
        for i, verb in enumerate(known.verb.split("; ")):
            line = f" {'' if i else known.name:<11}{verb}"
            out.print(line, markup=False, highlight=False, soft_wrap=True)


def methods_table(rows: list[dict]) -> str:
    """The pages as a Markdown table, printed from their cards and the claims' ledger."""
    from regard import catalog

    lines = ["| method | kind | idea | claim |", "|---|---|---|---|"]
    for facts in rows:
        idea = catalog.get(facts["name"]).card.idea.replace("|", "\\|")
        lines.append(f"| `{facts['name']}` | {facts['kind']} | {idea} | {facts['claim'] or '–'} |")
    return "\n".join(lines)
