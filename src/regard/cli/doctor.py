"""regard doctor."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.asked import Device
from regard.cli.console import Json, app, counting, err, out, say_json
from regard.core.device import device_of
from regard.core.spec import split_list
from regard.models.names import check_model, converted_to


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A Hugging Face folder or name, a GGUF file, lm, smollm2, or a family of tiny models."
        ),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    families: Annotated[
        bool,
        typer.Option("--families", help="Build every decoder of transformers tiny, and try regard on it."),
    ] = False,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Try tokens and steering methods on vision-language families.")
    ] = False,
    only: Annotated[str, typer.Option(help="Of these families, or methods, alone: llama,phi.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="The families as docs/families.md.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Which attention sites of a model are reached, which are missed, and whether attaching changes anything."""
    if families:
        return examine_families(split_list(only) or None, markdown, as_json)
    if pictures:
        return examine_vision(split_list(only) or None, markdown, as_json)
    if model is None:
        raise typer.BadParameter("a model, --families or --pictures", param_hint="MODEL")
    place = device_of(device)
    loaded, inputs = loaded_for(model, trust_remote_code, place)
    from regard.models.doctor import doctor as examine

    report = examine(loaded, **inputs)
    held = converted_to(model)
    if held is not None and not as_json:
        err.print(
            f"regard: {model} is a conversion to {held}, examined here as the softmax model that lies in it; "
            f"regard.load_converted({model!r}) gives the converted one",
            style="yellow", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    say_json(report.to_dict()) if as_json else out.print(str(report), highlight=False, soft_wrap=True)
    if not report.healthy:
        raise typer.Exit(1)


def loaded_for(model: str, trust_remote_code: bool, device: str | None) -> tuple[Any, dict]:
    """(model, inputs of one forward): a tiny one of a family by its name, or whatever loads; a wrong name at once."""
    if model not in family_names():
        check_model(model, beside=family_names())
        from regard.models.shipped import load_any

        return load_any(model, trust_remote_code=trust_remote_code, device=device)[0], {}
    from regard.testing.zoo import build

    loaded, inputs = build(model)
    if device is not None:
        loaded, inputs = loaded.to(device), {name: t.to(device) for name, t in inputs.items()}
    return loaded, inputs


def family_names() -> list[str]:
    """Names of the tiny models, read from where they are defined: none is built."""
    import regard.testing

    folder = Path(regard.testing.__path__[0])
    texts = (file.read_text(encoding="utf8") for file in sorted(folder.glob("*.py")))
    return [name for text in texts for name in re.findall(r"^@family\ndef (\w+)", text, re.MULTILINE)]


def examine_families(only: list[str] | None, markdown: bool, as_json: bool) -> None:
    """The rows of the survey as a table, a page or JSON; exit 1 if any is wrong or crashed."""
    from datetime import date

    import transformers

    from regard.testing.families import names, survey
    from regard.testing.families import table as tables

    which, rows = only or names(), []
    with counting(as_json or markdown, len(which)) as step:
        for row in survey(which):
            rows.append(row)
            step(row.name, len(rows))
    if as_json:
        say_json([row.to_dict() for row in rows])
    elif markdown:
        typer.echo(tables.markdown(rows, transformers.__version__, date.today().isoformat()), nl=False)
    else:
        out.print(tables.terminal(rows))
    if any(row.verdict in ("wrong", "crashed") for row in rows):
        raise typer.Exit(1)


def examine_vision(only: list[str] | None, markdown: bool, as_json: bool) -> None:
    """Which tokens and steering methods reach which vision-language family."""
    from datetime import date

    import transformers

    from regard.report import table
    from regard.testing import vision_families as vision

    which, found = only or vision.methods(), []
    with counting(as_json or markdown, len(which)) as step:
        for reach in vision.survey(which):
            found.append(reach)
            step(reach.method, len(found))
    if as_json:
        say_json([vars(reach) for reach in found])
    elif markdown:
        typer.echo(vision.markdown(found, transformers.__version__, date.today().isoformat()), nl=False)
    else:
        yes = {True: "yes", False: "no"}
        rows = [
            {"method": r.method, **{f: yes[said == vision.REACHED] for f, said in r.by_family.items()}}
            for r in found
        ]
        out.print(table(rows, list(rows[0]), "methods on vision-language families"))
