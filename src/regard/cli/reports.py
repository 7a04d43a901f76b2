"""regard report, regard board: what finished runs say, drawn again or together."""

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.console import Json, app, out, say_json
from regard.core.errors import require


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder of regard compare, finished or not.")],
    as_json: Json = False,
) -> None:
    """Draw the report of what a comparison's folder holds, also of one that was stopped; nothing is measured."""
    run_of(folder)
    from regard.bench.compare import report as draw
    from regard.report import show
    from regard.report.folder import Folder

    result = draw(Folder(folder))
    if as_json:
        say_json(
            {
                "sentence": result.sentence(),
                "summary": result.summary(),
                "report": str(folder / "report.html"),
            }
        )
        return
    show(result, out)
    out.print(f"\n[bold]{folder / 'report.html'}[/bold]", highlight=False, soft_wrap=True)


@app.command()
def board(
    runs: Annotated[list[Path], typer.Argument(help="Folders of regard compare.")],
    to: Annotated[
        Path, typer.Option("--out", help="The page to write; a table beside it, as Markdown.")
    ] = Path("board.html"),
    as_json: Json = False,
) -> None:
    """Several comparisons on one page: a row for each method and budget, a column for each model."""
    from regard.report.board import board_markdown, board_page, board_rows, board_sentence, merged
    from regard.report.folder import write_whole
    from regard.report.result import Result

    require(to.suffix == ".html", "--out names an .html file", out=str(to))
    runs = [run_of(folder) for folder in runs]
    found = merged([Result.load(folder) for folder in runs])
    write_whole(to, board_page(found))
    write_whole(to.with_suffix(".md"), board_markdown(found))
    if as_json:
        say_json(
            {
                "models": list(found),
                "sentence": board_sentence(found),
                "rows": board_rows(found),
                "page": str(to),
            }
        )
        return
    out.print(board_sentence(found), highlight=False)
    out.print(f"\n[bold]{to}[/bold]", highlight=False, soft_wrap=True)


def run_of(folder: Path) -> Path:
    """The folder, if a comparison's rows are in it."""
    require(
        (folder / "results.jsonl").is_file(),
        "the folder holds a comparison's results.jsonl",
        folder=str(folder),
    )
    return folder
