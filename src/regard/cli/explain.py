"""regard explain."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.console import Json, app, if_stopped, out, say_json, stages

DEMO = (
    "The code of warning is 16122.\nThe curve of the model is plotted against the number of true values. "
    "The code of notice is 88310.\nQuestion: the code of warning is "
)


@app.command()
def explain(
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face folder or name, a GGUF file, smollm2; none: the shipped lm."),
    ] = None,
    prompt: Annotated[
        Path | None,
        typer.Option(
            help="A text file, or .jsonl with prompt, target, foil, corrupt a line; none: a demonstration."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The answer that is explained, one token; none: the model's own.")
    ] = None,
    foil: Annotated[
        str | None, typer.Option(help="Another answer: the metric is the difference of logits.")
    ] = None,
    corrupt: Annotated[
        Path | None, typer.Option(help="A prompt of as many tokens that has another answer; none: made.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="An image, for a vision-language model.")] = None,
    corrupt_image: Annotated[Path | None, typer.Option(help="Another image, of the same size.")] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Where stages and the page go; resumed if it is there.")
    ] = Path("runs/explain"),
    variations: Annotated[
        int | None, typer.Option(help="Variations of each prompt, behind the intervals; none: 8, long 4.")
    ] = None,
    verify: Annotated[
        int | None, typer.Option(help="Heads measured exactly, of the largest estimates; none: 20, long 6.")
    ] = None,
    top: Annotated[int, typer.Option(help="Heads that count as those that mattered.")] = 5,
    removals: Annotated[
        int | None, typer.Option(help="Removals behind the sparse surrogate; none: 64, long 24.")
    ] = None,
    parts: Annotated[
        int | None, typer.Option(help="Parts that a long prompt is cut into; none: 64, long 32.")
    ] = None,
    edges: Annotated[
        int | None, typer.Option(help="Edges of the graph, 0: none; not given: 24, long 0.")
    ] = None,
    why: Annotated[bool, typer.Option("--why", help="Say why each top head attends where it does.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a turn of the user's in a chat.")
    ] = False,
    seed: int = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; none: the GPU where there is one.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    as_json: Json = False,
) -> None:
    """What in this model caused this output: heads, MLPs, source tokens and paths, against controls.

    Of prompts beyond 1,024 tokens ("long") less is measured unless it is asked for.
    """
    from regard.explaining.explanation import explain as run
    from regard.explaining.settings import Settings

    settings = Settings(
        verify=verify, top=top, removals=removals, parts=parts, edges=edges, why=why, seed=seed
    )
    kept = f"Finished stages are kept in {folder}; the same command goes on from there."
    with if_stopped(kept), stages(as_json) as progress:
        given = asked_of(
            model, prompt, target, foil, corrupt, image, corrupt_image, trust_remote_code, device
        )
        found = run(
            **given, variations=variations, chat=chat, settings=settings, folder=folder, progress=progress
        )
    page = found.save(folder / "explanation.html")
    (folder / "explanation.json").write_text(json.dumps(found.found, ensure_ascii=False), encoding="utf8")
    if as_json:
        say_json(found.found)
    else:
        out.print(found.text(out.width), highlight=False, markup=False, soft_wrap=True)
        out.print(f"[bold]{page}[/bold]", highlight=False, soft_wrap=True)


def asked_of(
    model: str | None, prompt: Path | None, target: str | None, foil: str | None, corrupt: Path | None,
    image: Path | None, corrupt_image: Path | None, trust_remote_code: bool, device: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Model, tokenizer and questions; every file is read before the model is."""
    from regard.core import require
    from regard.explaining.images import opened, processed
    from regard.explaining.questions import Question, read_questions
    from regard.models.shipped import load_any, load_vision

    other = None if corrupt is None else corrupt.read_text(encoding="utf8").rstrip("\n")
    if prompt is None:
        require(
            model is None and corrupt is None,
            "a prompt, for a model or a corrupted prompt of one's own",
            model=model,
        )
        questions = [Question(DEMO, target or "1", foil or "7")]
    else:
        questions = read_questions(prompt, target, foil, other)
    name = Path(model).name if model else "the shipped lm"
    if image is None:
        require(
            corrupt_image is None, "another image stands beside an image", corrupt_image=str(corrupt_image)
        )
        loaded, tokenizer = load_any(model, trust_remote_code, device)
        return {"model": loaded, "tokenizer": tokenizer, "prompt": questions, "name": name}
    require(
        model is not None and len(questions) == 1,
        "an image goes with a model and one prompt",
        prompts=len(questions),
    )
    pictures = [opened(p) for p in (image, corrupt_image) if p is not None]
    loaded, processor = load_vision(str(model), trust_remote_code, device)
    ids, images = processed(processor, str(questions[0].prompt), *pictures)
    question = Question(ids, questions[0].target, questions[0].foil)
    return {
        "model": loaded,
        "tokenizer": processor.tokenizer,
        "prompt": [question],
        "name": name,
        "images": images,
    }
