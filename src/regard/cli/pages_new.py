"""regard new: a page of your own."""

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.console import Json, app, out, say_json
from regard.cli.names import complete_kind


@app.command()
def new(
    kind: Annotated[
        str, typer.Argument(help="The kind of page: regard list --kinds", autocompletion=complete_kind)
    ],
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
