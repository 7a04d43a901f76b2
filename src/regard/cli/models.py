"""regard doctor, regard train, regard convert."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.console import Json, app, converting, counting, if_stopped, out, say_json, training
from regard.core.errors import require
from regard.core.spec import parse_spec, split_list, split_specs
from regard.train.suits import suits


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
    as_json: Json = False,
) -> None:
    """Which attention sites of a model are reached, which are missed, and whether attaching changes anything."""
    if families:
        return examine_families(split_list(only) or None, markdown, as_json)
    if pictures:
        return examine_vision(split_list(only) or None, markdown, as_json)
    if model is None:
        raise typer.BadParameter("a model, --families or --pictures", param_hint="MODEL")
    from regard.models.doctor import doctor as examine
    from regard.models.shipped import load_any
    from regard.testing.zoo import ZOO, build

    inputs: dict = {}
    if model in ZOO:
        loaded, inputs = build(model)
    else:
        loaded = load_any(model, trust_remote_code=trust_remote_code)[0]
    report = examine(loaded, **inputs)
    say_json(report.to_dict()) if as_json else out.print(str(report), highlight=False, soft_wrap=True)
    if not report.healthy:
        raise typer.Exit(1)


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


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name, a GGUF file, lm or smollm2.")],
    method: Annotated[
        str, typer.Argument(help="A page that chooses blocks; settings as NAME:key=value, learned=FOLDER.")
    ],
    target: Annotated[str, typer.Option(help="mass:0.95 or sparsity:0.9, of every layer.")],
    folder: Annotated[
        Path, typer.Option("--out", help="A new folder for the result, which regard.attach takes.")
    ],
    length: Annotated[int, typer.Option(help="Tokens of the prompts.")] = 2048,
    samples: Annotated[int, typer.Option(help="Prompts.")] = 4,
    seed: int = 0,
    text: Annotated[Path | None, typer.Option(help="A text file of your own for the prompts.")] = None,
    as_json: Json = False,
) -> None:
    """A setting for each layer under which sparse prefill meets a target on this model."""
    from regard.attaching.converted import configured, earlier
    from regard.attaching.knob import Target
    from regard.attaching.knob import calibrate as run
    from regard.models.shipped import load_any
    from regard.report import table
    from regard.report.folder import vacant
    from regard.tasks import Source

    chosen, wanted = configured(*parse_spec(method)), Target.parse(target)
    vacant(folder, **earlier(folder))
    source = None if text is None else Source.from_path(text)
    found = run(*load_any(model), chosen, wanted, length=length, samples=samples, seed=seed, source=source)
    found.save(folder)
    if as_json:
        say_json(dict(found.report))
        return
    rows = [{"layer": row["layer"], found.method.page.knob[0]: row["value"],
             **{key: f"{min(row[key]):.0%} to {max(row[key]):.0%}" for key in ("kept", "mass")}}
            for row in found.report["reached"]]  # fmt: skip
    out.print(
        table(
            rows, list(rows[0]), f"{found.method.label} at {target}: keys read and attention mass, over heads"
        )
    )
    out.print(
        f"[bold]{folder}[/bold]: regard.attach(model, read_converted({str(folder)!r}))", highlight=False
    )


@app.command()
def train(
    task: Annotated[
        str,
        typer.Option(
            help="mqar (associative recall), text (bytes of documentation), digits (8 x 8 images) or find (a "
            "digit among decoys)"
        ),
    ] = "mqar",
    mechanism: Annotated[
        str,
        typer.Option(
            help="A name with settings as NAME:key=value; or one for every layer, of images every stage: a,b"
        ),
    ] = "softmax",
    rates: Annotated[
        str | None, typer.Option(help=f"Learning rates; the best on held-out data is kept. {suits('rates')}")
    ] = None,
    steps: Annotated[int | None, typer.Option(help=suits("steps"))] = None,
    batch: Annotated[int | None, typer.Option(help=suits("batch"))] = None,
    layers: Annotated[int | None, typer.Option(help=suits("layers"))] = None,
    width: Annotated[int | None, typer.Option(help=suits("width"))] = None,
    heads: Annotated[int | None, typer.Option(help=suits("heads"))] = None,
    mlp: Annotated[
        int | None, typer.Option(help=f"Inner width of the channel mixer; 0: none. {suits('mlp')}")
    ] = None,
    conv: Annotated[
        int | None, typer.Option(help="Tokens of the short convolution on q, k, v; 0: none. Of texts: 3.")
    ] = None,
    rope_theta: Annotated[
        float | None,
        typer.Option(
            "--rope-theta", "--rope", help="Base of rotary positions, 0: none; as needed. Of texts."
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a text: 128.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Key-value pairs of mqar: 16.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Words of mqar: 64.")] = None,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="Steps between two points of the curve, and checkpoints.")] = 50,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where it goes, resumed if it is there: runs/train/TASK-NAME")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; none: one for narrow models.")] = None,
    as_json: Json = False,
) -> None:
    """Train a small model with any mechanism, and draw its curves. The same command goes on where it was stopped."""
    from regard.train import Plan
    from regard.train import train as run

    mechanisms = [parse_spec(part) for part in split_specs(mechanism) or []]
    of_texts = dict(conv=conv, rope_theta=rope_theta, length=length, pairs=pairs, vocab=vocab)
    given: dict[str, Any] = dict(
        steps=steps, batch=batch, layers=layers, width=width, heads=heads, mlp=mlp, **of_texts
    )
    if rates is not None:
        given["rates"] = tuple(float(r) for r in split_list(rates) or [])
    plan = Plan.of(
        task, mechanisms=tuple(n for n, _ in mechanisms), settings={n: options for n, options in mechanisms if options},
        seed=seed, every=every, **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    for name, value in of_texts.items():
        rule = f"{name} is a setting of texts"
        require(not plan.of_images or value is None, rule, task=task, **{name: value})
    steps = plan.steps
    folder = folder or Path("runs/train") / f"{task}-{'-'.join(dict.fromkeys(plan.mechanisms))}"
    kept = f"The run is kept in {folder} up to its last checkpoint, one in {every} steps; the same command goes on."
    with if_stopped(kept), training(as_json, len(plan.rates) * steps) as step:
        result = run(plan, folder, progress=step, threads=threads)
    if as_json:
        say_json({**result, "folder": str(folder)})
        return
    out.print(result["sentence"], highlight=False)
    out.print(f"[bold]{folder / 'report.html'}[/bold]", highlight=False, soft_wrap=True)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name, a GGUF file, lm or smollm2.")],
    mechanism: Annotated[
        str,
        typer.Option(
            help="hedgehog, lawcat, seer_attention, flux_attention, ...; settings as NAME:key=value"
        ),
    ] = "hedgehog",
    steps: Annotated[int | None, typer.Option(help="Steps of attention transfer.")] = None,
    finetune: Annotated[
        str,
        typer.Option(
            help="full, lora, none, or auto: none where attention stays and is read in part, else full"
        ),
    ] = "auto",
    finetune_steps: Annotated[int | None, typer.Option(help="Steps of the fine-tune after it.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text to learn from; none: Python's help pages.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of a training sequence; none: 256, longer for gates and routers."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Lengths at which before and after are measured.")
    ] = "256,512,1024",
    samples: Annotated[int, typer.Option(help="Questions of a task at a length.")] = 16,
    seed: int = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="Where it goes: runs/convert/NAME")] = None,
    as_json: Json = False,
) -> None:
    """Learn what a mechanism needs on a trained softmax model; what the model can do before, between and after."""
    from regard.bench.conversion import convert_folder
    from regard.report import table

    name, settings = parse_spec(mechanism)
    folder = folder or Path("runs/convert") / name
    counts = {"steps": steps, "finetune_steps": finetune_steps}
    with (
        if_stopped("Nothing of this conversion is kept; the same command begins it again."),
        converting(as_json) as bar,
    ):
        report = convert_folder(
            model.removeprefix("shipped:"), name, folder, text=text, length=length,
            finetune=None if finetune == "none" else finetune, lengths=tuple(int(n) for n in split_list(lengths) or []),
            samples=samples, seed=seed, show=bar.say, progress=bar.step,
            **{k: n for k, n in counts.items() if n is not None}, **settings,
        )  # fmt: skip
    if as_json:
        say_json({**report, "folder": str(folder)})
        return
    stages = list(report["rows"])
    tasks = [key for key in report["rows"][stages[-1]] if not key.startswith("bytes")]
    rows = [
        {"task": task_text(t), **{s: score_text(t, report["rows"][s].get(t)) for s in stages}} for t in tasks
    ]
    out.print(table(rows, ["task", *stages], title=f"{report['mechanism']} in {model}"))
    if report["state_bytes"] is not None:
        kept = ", ".join(f"{n} tokens {b / 1024:,.0f} KiB" for n, b in report["kv_bytes"].items())
        out.print(f"a text holds {report['state_bytes'] / 1024:,.0f} KiB at any length; keys and values: {kept}",
                  highlight=False)  # fmt: skip
    out.print(f"[bold]{folder}[/bold]", highlight=False, soft_wrap=True)


def task_text(task: str) -> str:
    """ "needle_256" as "needle at 256", "mass_needle_256" as "mass, needle at 256"."""
    *kind, name, length = task.split("_")
    return f"{''.join(f'{k}, ' for k in kind)}{name} at {length}"


def score_text(task: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} nats" if task.startswith("perplexity") else f"{value:.0%}"
