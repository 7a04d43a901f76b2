"""regard list, regard show, regard new: the pages of the catalogue, and one of your own."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.console import Json, app, out, say_json


@app.command("list")
def list_pages(
    filter: Annotated[
        str, typer.Argument(metavar="[PATTERN]", help='Names with wildcards, such as "*linear*".')
    ] = "*",
    kind: Annotated[
        str | None, typer.Option(help="Of one kind: regard list --kinds says which there are.")
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
    from regard import catalog
    from regard.claims import ledger
    from regard.report import table

    if show_kinds:
        return say_kinds(as_json)
    known = ledger.recorded()
    names = catalog.list_methods(filter, kind=kind, pattern=pattern, family=family, needs=needs)
    rows = [row(name, known) for name in names]
    if as_json:
        say_json(rows)
    elif markdown:
        typer.echo(methods_table(rows))
    else:
        out.print(table(rows, {"name": "name", "kind": "kind", "title": "title", "claim": "claim"}))
    if not rows:
        raise typer.Exit(1)


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


@app.command()
def show(
    page_name: Annotated[
        str, typer.Argument(metavar="NAME", help="A page; of a mask with settings too: window:window=5")
    ],
    picture: Annotated[
        Path | None, typer.Option(help="Draw what is read into this file, .svg or .png.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """The card of a page, what is done with it, where it lies, its last measured claim; a mask is drawn too."""
    from regard import catalog
    from regard.claims import ledger
    from regard.cli.drawing import drawable, picture_of, write
    from regard.core import require
    from regard.core.spec import parse_spec
    from regard.kinds import kind

    name, given = parse_spec(page_name)
    page = catalog.get(name)
    masked = drawable(page)
    rule = "of a page that has a mask, chooses blocks of keys and learns nothing, or mixes the places of an image"
    require(masked or picture is None, f"a picture is drawn {rule}", page=name)
    require(masked or not given, f"settings are for what is drawn, {rule}", page=name)
    drawn = picture_of(name, page, given) if masked else None
    if drawn is not None and picture is not None:
        write(drawn, picture)
    known = ledger.recorded().get(name, [])
    settings = {f.name: getattr(page.config(), f.name) for f in fields(page.config)}
    card = {**asdict(page.card), "neutral": dict(page.card.neutral)}
    verb = kind(page.kind).verb.replace("NAME", repr(name))
    facts = {
        "name": name,
        "kind": page.kind,
        "patterns": list(page.patterns),
        "path": str(catalog.path_of(name)),
    }
    if as_json:
        mask = {} if drawn is None else {"places" if "maps" in drawn.facts() else "mask": drawn.facts()}
        say_json(
            {**facts, "verb": verb, "card": card, "settings": settings, "claim": claim_of(known), **mask}
        )
        return
    out.print(f"[bold]{page.card.title}[/bold]  ({name}, {page.kind})")
    for label, value in {**card, "settings": settings, "use": verb, "path": facts["path"]}.items():
        if value and label != "title":
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            say(label, shown)
    say_claim(known)
    if drawn is not None:
        out.print()
        for line in drawn.lines():
            out.print(line, markup=False, highlight=False, soft_wrap=len(line) < out.width)
    if picture is not None:
        say("picture", picture)


def claim_of(rows: list[dict]) -> dict | None:
    """The deciding row of a claim, and those on its other models."""
    from regard.claims import ledger

    if not rows:
        return None
    decides = ledger.deciding(rows)
    others = [row for row in rows if row is not decides]
    return {**decides, "others": others} if "model" in decides else decides


def say_claim(rows: list[dict]) -> None:
    """Statement and bound of a claim and what was measured, a line for each model, the deciding one first."""
    claim = claim_of(rows)
    if claim is None:
        return
    say("claim", claim["statement"])
    say("bound", claim["bound"])
    for row in (claim, *claim.get("others", ())):
        on = f" on {row['model']}" if "model" in row else ""
        found = f"[bold]{row['verdict']}{on}[/bold] {json.dumps(row['measured'])}"
        out.print(f"[dim] measured[/dim]  {found}", highlight=False)


def say(label: str, value: Any) -> None:
    out.print(f"[dim]{label:>9}[/dim]  ", end="")
    out.print(str(value), highlight=False, markup=False)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="The kind of page: regard list --kinds")],
    name: Annotated[str, typer.Argument(help="Its name, a lower-case Python name: the file's name too.")],
    folder: Annotated[Path, typer.Option("--in", help="Where the file goes.")] = Path(),
    as_json: Json = False,
) -> None:
    """A page of your own: a file that works and passes its checks, to be rewritten."""
    from regard import catalog
    from regard.core import require
    from regard.kinds import skeleton

    text, path = skeleton(kind, name), folder / f"{name}.py"
    require(name not in catalog.pages(), "a page of one's own has a name of its own", name=name)
    require(not path.exists(), "a file that exists is left as it is", path=str(path))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")
    if as_json:
        say_json({"name": name, "kind": kind, "path": str(path)})
        return
    out.print(f"[bold]{path}[/bold]", highlight=False, soft_wrap=True)
    for line in (
        f"regard check {path}",
        f"REGARD_PAGES={path} regard list {name}",
        f"REGARD_PAGES={path} regard show {name}",
    ):
        out.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
