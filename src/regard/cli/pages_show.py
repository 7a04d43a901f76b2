"""regard show: what a page is, its settings, what is done with it, where it lies, what was measured of it."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.console import Json, app, out, say_json
from regard.cli.names import complete_pages
from regard.core.errors import require, unknown


@app.command()
def show(
    page_name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A page; of a mask or a task with settings too: window:window=5. Pages laid over one another: "
            "snapkv+adakv.",
            autocompletion=complete_pages,
        ),
    ],
    picture: Annotated[
        Path | None, typer.Option(help="Draw what is read into this file, .svg or .png.", metavar="FILE")
    ] = None,
    source: Annotated[
        bool, typer.Option("--source", help="Print the page's file, and nothing else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a page is, its settings, what is done with it, its last measured claim; a mask is drawn, a task asked."""
    from regard import catalog
    from regard.core.spec import parse_spec

    name, given = parse_spec(page_name)
    if source:
        alone = not given and picture is None and not as_json
        require(alone, "--source stands alone, beside a page without settings", page=page_name)
        return typer.echo(file_of(name).read_text(encoding="utf8"), nl=False)
    page = catalog.get(name)
    drawn = None if page.kind == "task" else picture_for(name, page, given, picture)
    facts = facts_of(name, page)
    if page.kind == "task":
        require(picture is None, "a picture is drawn of what is read; a task reads nothing", page=name)
        facts |= task_facts(page, given)
    if as_json:
        seen = {} if drawn is None else {"places" if "maps" in drawn.facts() else "mask": drawn.facts()}
        return say_json({**facts, **seen})
    say_page(facts)
    for line in () if drawn is None else ("", *drawn.lines(out.width)):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if picture is not None:
        say(f"{'picture':>9}  {picture}")


def file_of(name: str) -> Path:
    """The file of one page, found before anything is imported."""
    from regard import catalog

    require("+" not in name, "a file is of one page: --source of each of them", pages=name.split("+"))
    if name not in catalog.pages():
        raise unknown("method", name, catalog.pages())
    return catalog.path_of(name)


def picture_for(name: str, page: Any, given: dict[str, Any], picture: Path | None) -> Any:
    """What is drawn of a page, also into the file `picture`; None where nothing is, and then neither is given."""
    from regard.cli.drawing import drawable, picture_of, write

    drawn = drawable(page)
    rule = "of a page that has a mask, chooses blocks of keys and learns nothing, or mixes the places of an image"
    require(drawn or picture is None, f"a picture is drawn {rule}", page=name)
    require(drawn or not given, f"settings are for what is drawn, {rule}, and for tasks", page=name)
    found = picture_of(name, page, given) if drawn else None
    if found is not None and picture is not None:
        write(found, picture)
    return found


def facts_of(name: str, page: Any) -> dict[str, Any]:
    """All that is said of a page, as data."""
    from regard import catalog
    from regard.claims import ledger
    from regard.cli.page_source import docstring, options

    parts = [
        {"name": one, "title": part.card.title, "path": str(catalog.path_of(one))} for one, part in page.parts
    ]
    path = parts[0]["path"] if parts else str(catalog.path_of(name))
    texts = [docstring(Path(part["path"])) for part in parts] or [docstring(Path(path))]
    return {
        "name": name,
        "kind": page.kind,
        "patterns": list(page.patterns),
        "path": path,
        **({"parts": parts} if parts else {}),
        "text": "\n\n".join(texts),
        "options": options(page),
        "verb": verb(name, page),
        "card": {**asdict(page.card), "neutral": dict(page.card.neutral)},
        "settings": {f.name: getattr(page.config(), f.name) for f in fields(page.config)},
        "claim": claim_of(ledger.recorded().get(name, [])),
    }


def verb(name: str, page: Any) -> str:
    """How it is applied, with what it needs."""
    from regard.kinds import kind

    said = kind(page.kind).verb.replace("NAME", repr(name))
    asks = getattr(page, "reread", None) is not None
    return said.replace("budget=0.25)", "budget=0.25, tokenizer=tokenizer)") if asks else said


def task_facts(page: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a task asks, how it is scored, and an example under these settings."""
    from regard.cli.page_example import example_of

    asks = [what for what in ("samples", "pictures", "generate") if getattr(page, what) is not None]
    said = {"metric": page.metric, "asks": asks, "group": page.group, "standard": page.standard}
    return {"task": said, "example": example_of(page, page.configure(**given))}


def claim_of(rows: list[dict]) -> dict | None:
    """The deciding row of a claim, and those on its other models."""
    from regard.claims import ledger

    if not rows:
        return None
    decides = ledger.deciding(rows)
    others = [row for row in rows if row is not decides]
    return {**decides, "others": others} if "model" in decides else decides


def say_page(facts: dict[str, Any]) -> None:
    """Title, text, settings, card, use, path, claim, example."""
    from regard.cli.page_words import card_lines, claim_lines, labelled

    say_text(facts)
    say_settings(facts["options"])
    for line in card_lines(facts["card"], out.width):
        say(line)
    if facts["patterns"]:
        say(f"{'patterns':>9}  {', '.join(facts['patterns'])}")
    for i, verb in enumerate(facts["verb"].split("; ")):
        for line in labelled("" if i else "use", verb, out.width):
            say(line)
    for i, path in enumerate([part["path"] for part in facts.get("parts", [facts])]):
        say(f"{'' if i else 'path':>9}  {path}")
    claim = facts["claim"]
    for line in claim_lines([claim, *claim.get("others", ())], out.width) if claim else ():
        say(line)
    if "example" in facts:
        say_task(facts)


def say_text(facts: dict[str, Any]) -> None:
    from rich.text import Text

    from regard.cli.page_words import docstring_lines

    title = Text(facts["card"]["title"], "bold")
    out.print(title.append(f"  ({facts['name']}, {facts['kind']})", "not bold"))
    out.print()
    for line, is_example in docstring_lines(facts["text"], out.width):
        say(line, "dim" if is_example else "")


def say_task(facts: dict[str, Any]) -> None:
    """How a task is scored, and an example of it."""
    from regard.cli.page_example import example_lines
    from regard.cli.page_words import labelled
    from regard.kinds.task import METRICS, OF_PICTURES

    metric = facts["task"]["metric"]
    scored = labelled("metric", f"{metric}: {(METRICS | OF_PICTURES)[metric]}", out.width)
    for line in (*scored, *example_lines(facts["example"], out.width)):
        say(line)


def say_settings(options: list[dict[str, Any]]) -> None:
    from regard.cli.page_words import value_text
    from regard.report import table

    if not options:
        return
    rows = [{**option, "default": value_text(option["default"])} for option in options]
    explained = {"says": ""} if any(row["says"] for row in rows) else {}
    out.print(table(rows, {"name": "setting", "default": "default", **explained}))


def say(line: str, style: str = "") -> None:
    """A line as it is, its label dim; nothing in it is markup, and nothing is folded."""
    from rich.text import Text

    text = Text(line, style)
    if line[:9].strip() and line[9:11] == "  " and line[:9].strip().isalpha():
        text.stylize("dim", 0, 9)
    out.print(text, soft_wrap=True, highlight=False)
