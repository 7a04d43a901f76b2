"""regard evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.console import Json, app, if_stopped, out, say_json, watching
from regard.core.spec import split_list, split_specs


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name, a GGUF file, lm or smollm2.")],
    tasks: Annotated[str, typer.Option(help="lm-eval's tasks, groups, wildcards or YAML files.")],
    methods: Annotated[
        str | None, typer.Option(help="Names, with settings as NAME:key=value; full is always asked.")
    ] = None,
    budgets: Annotated[str | None, typer.Option(help='Tokens, fractions or bytes: "256,0.1,64MB".')] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where rows go; resumed if it is there.")] = Path(
        "runs/evaluate"
    ),
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, as YAML.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of a task that are asked; none: all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each document.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch; scores do not depend on it.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the examples; lm-eval's own by default.")] = 1234,
    chat: Annotated[bool, typer.Option("--apply-chat-template", help="Ask in turns of a chat.")] = False,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Write each document's request, answer and score.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry/--no-retry", help="Ask again what failed at an earlier start.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; none: the GPU where there is one.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    as_json: Json = False,
) -> None:
    """lm-eval's tasks under cache policies, masks and sparse prefills. Exit status 1 if a task failed."""
    from regard.bench.evaluate import evaluate as run
    from regard.report.scores import show

    kept = f"Finished tasks are kept in {folder}; the same command goes on from there."
    with if_stopped(kept), watching(as_json) as progress:
        result = run(
            model, split_specs(methods), split_list(tasks) or [], split_list(budgets), out=folder, limit=limit,
            num_fewshot=num_fewshot, batch_size=batch_size, include_path=include_path, seed=seed, chat=chat,
            log_samples=log_samples, retry=retry, device=device, trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip
    if as_json:
        say_json({"run": result.run, "rows": result.scores(), "cells": result.cells})
    else:
        show(result, out)
        out.print(f"[bold]{folder / 'results.jsonl'}[/bold]", highlight=False, soft_wrap=True)
    if result.failed():
        raise typer.Exit(1)
