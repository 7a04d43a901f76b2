"""`convert_folder`: a model is converted, measured before and after, and written to a folder that can be loaded again.

What is learned from is half running text (the help pages of Python, or the user's own) and half pages of facts with
questions about them in the form of the tasks, other facts than those that are measured on; a task that a conversion
never saw may fare worse than these.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import catalog
from regard.attaching.replacement import state_bytes
from regard.bench.cell import Cell
from regard.bench.conversion_kept import Work, made_before
from regard.bench.measuring import Bench, batches
from regard.bench.prefill import leaves_unread, unread
from regard.core import Method, require
from regard.core.device import device_of
from regard.models.revision import revision
from regard.models.shipped import load_any, source_of
from regard.tasks import Source
from regard.tasks.base import first_token
from regard.tasks.perplexity import CONTINUATION
from regard.train.convert import convert, help_pages
from regard.train.convertible import check
from regard.train.routes import SPARSE, Routes

TASKS = ("perplexity", "needle", "recall")
# tokens of a training sequence and steps, by what a page learns
LEARN = {"weights": (256, 80), "output": (256, 80), "blocks": (1024, 60), "routes": (512, 250)}
# weight of a token of a page of facts, and of an answer; running text has 1
FACTS, ANSWER = 0.1, 4.0
SEQUENCES, POSITIONS = 2048, 8
LEARNED = 10_000  # seeds of what is learned from begin here; measured are those below


def convert_folder(
    model: str = "lm",
    mechanism: str = "hedgehog",
    out: str | Path | None = None,
    *,
    text: str | Path | None = None,
    length: int | None = None,
    steps: int | None = None,
    finetune: str | None = "auto",
    finetune_steps: int = 700,
    finetune_rate: float = 1e-3,
    soft: bool = True,
    batch: int = 4,
    lengths: tuple[int, ...] = (256, 512),
    samples: int = 16,
    seed: int = 0,
    every: int = 50,
    device: str | None = None,
    show: Callable[[str], None] = print,
    progress: Callable[[str, int, int, float], None] | None = None,
    **config: Any,
) -> dict:
    """Convert a shipped model or a model folder; the report, which is also written to `out` with model and parts.

    `out` is new, empty or of this very conversion, which is asked before any work. One that ended is reported again;
    one that was stopped goes on behind its last stage, or its last checkpoint, one in `every` steps.

    length, steps  None: as LEARN says for what the page learns
    finetune       "auto": none where softmax attention stays and is read in part, else "full"
    device         None: the CPU for models of ours, else the GPU where there is one

    Learned from are texts of `length` tokens and the 64 that may follow a prompt of this length: where rotary positions
    go beyond what was trained, a converted model is weaker, and `lengths` above `length` measure that.
    """
    began, method = perf_counter(), catalog.from_spec(mechanism).with_settings(**config)
    check(method, finetune, None)
    transfer, place = method.page.transfer, device_of(device)
    if finetune == "auto":
        finetune = None if transfer in ("blocks", "routes") else "full"
    length, steps = length or LEARN[transfer][0], LEARN[transfer][1] if steps is None else steps
    source = Source("help pages", "\n\n".join(help_pages())) if text is None else Source.from_path(text)
    settings = {
        **learned_from(model, method, source), "length": length, "steps": steps, "finetune": finetune,
        "finetune_steps": finetune_steps, "finetune_rate": finetune_rate, "soft": soft, "batch": batch,
        "lengths": list(lengths), "samples": samples, "seed": seed,
    }  # fmt: skip
    check_numbers(settings)
    if out is not None and (made := made_before(Path(out), settings)) is not None:
        show(f"made before, in {out}")
        return made
    length += CONTINUATION
    loaded, tokenizer = load_any(model, device=place)
    ids, weights, routes = sequences(tokenizer, length, SEQUENCES, seed, source)
    bench = Bench(loaded, tokenizer)
    for at in lengths:  # what is too short for a task is found before anything is learned
        for name in TASKS:
            catalog.task(name).samples(tokenizer, at, 1, 1)
    work, rows = Work(None if out is None else Path(out), settings), dict[str, dict[str, float]]()

    if work.rows:
        show(f"goes on in {out}, where {', '.join(work.rows)} was measured")

    def measure_stage(stage: str, title: str, method: Any) -> None:
        rows[stage] = work.row(stage, lambda: measured(bench, method, lengths, samples))
        show(line(title, rows[stage], lengths))

    measure_stage("softmax", "softmax", None)
    options = dict(ids=ids, weights=weights, length=length, batch=batch, seed=seed, progress=progress,
                   checkpoints=work.checkpoints, every=every)  # fmt: skip
    own = dict(
        routes=routes if transfer == "routes" else None, finetune=None, soft=soft and transfer == "routes"
    )
    converted = convert(loaded, tokenizer, method, steps=steps, **own, **options)
    measure_stage("transfer", "after transfer", converted)
    seconds = {"transfer": converted.report["transfer_seconds"]}
    if finetune is not None and finetune_steps:
        converted = convert(
            loaded, tokenizer, converted, steps=steps, finetune=finetune, finetune_steps=finetune_steps,
            finetune_rate=finetune_rate, soft=soft, **options,
        )  # fmt: skip
        seconds["finetune"] = converted.report["finetune_seconds"]
        measure_stage("finetune", "after fine-tune", converted)
    size = next(loaded.parameters()).element_size()
    report = {
        "model": str(model), "mechanism": converted.method.label, "length": length - CONTINUATION,
        "lengths": list(lengths), "rows": rows,
        "state_bytes": None if leaves_unread(converted) else state_bytes(loaded, converted, 1),
        "kv_bytes": {str(n): kv_bytes(loaded, n, size) for n in (*lengths, 32 * max(lengths))},
        "seconds": {**seconds, "all": work.seconds + perf_counter() - began}, "settings": settings,
    }  # fmt: skip
    show(bytes_line(report) if report["state_bytes"] is not None else unread_line(report))
    if out is not None:
        work.finish(replace(converted, report={**converted.report, **report}), loaded, tokenizer)
        show(f"written to {out}")
    return report


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Refuse counts that are none, before any work."""
    for name in ("length", "batch", "samples"):
        require(settings[name] >= 1, f"{name} >= 1", **{name: settings[name]})
    for name in ("steps", "finetune_steps"):
        require(settings[name] >= 0, f"{name} >= 0", **{name: settings[name]})
    lengths = settings["lengths"]
    require(lengths and min(lengths) >= 1, "one length at least, in tokens", lengths=lengths)


def learned_from(model: str, method: Method, source: Source) -> dict[str, str | None]:
    """Model, mechanism and text of a conversion, by name and by content."""
    held = source_of(model)
    return {
        "model": str(model), "content": None if held is None else revision(held), "mechanism": method.label,
        "page": catalog.revision_of(method.name), "text": source.revision,
    }  # fmt: skip


def sequences(
    tokenizer: Any, length: int, rows: int, seed: int, source: Source
) -> tuple[Tensor, Tensor, Routes]:
    """(ids [rows, length], weights, routes): windows of running text, and pages of facts whose answers weigh most.

    Routers are asked for all layers sparse in running text, and for the share that the paper has in questions.
    """
    rng, head = random.Random(f"convert {seed}"), first_token(tokenizer)
    made = [
        (head + source.take(tokenizer, length - len(head), rng), [1.0] * length, length - CONTINUATION, 1.0)
        for _ in range(rows // 2)
    ]
    for name in ("recall", "needle"):
        answer = len(catalog.task(name).samples(tokenizer, length, 1, LEARNED + seed, source)[0].answer)
        # questions at many positions, or retrieval would hold at one distance only
        for i in range(POSITIONS):
            prompt = length // 2 + i * (length - length // 2 - answer) // (POSITIONS - 1)
            rest = length - prompt - answer
            for sample in catalog.task(name).samples(
                tokenizer, prompt, rows // 4 // POSITIONS, LEARNED + seed + i, source
            ):
                after = source.take(tokenizer, rest, rng) if rest else []
                weights = [FACTS] * prompt + [ANSWER] * answer + [FACTS] * rest
                made.append((sample.prompt + sample.answer + after, weights, prompt, SPARSE))
    require(all(len(i) == length for i, *_ in made), "sequences of one length", length=length)
    columns = [torch.tensor([row[i] for row in made]) for i in range(4)]
    return columns[0], columns[1], Routes(columns[2], columns[3])


def measured(bench: Bench, method: Any, lengths: tuple[int, ...], samples: int) -> dict[str, float]:
    """Nats per token of held-out text, exact answers of the tasks, and bytes held for a row, by length."""
    row: dict[str, float] = {}
    for length in lengths:
        for name in TASKS:
            chosen = catalog.task(name).samples(bench.tokenizer, length, samples, 1)
            runs = [bench.run(b, method, weigh=True) for b in batches(chosen, Cell("full", name, length))]
            logits = torch.cat([r.logits for r in runs]).cpu()
            answer = torch.tensor([s.answer for s in chosen])
            right = (logits.argmax(-1) == answer).all(-1).float().mean().item()
            nats = F.cross_entropy(logits.flatten(0, 1), answer.flatten()).item()
            row[f"{name}_{length}"] = nats if name == "perplexity" else right
            if found := unread(runs):
                row |= {f"{kind}_{name}_{length}": found[f"{kind}_share"] for kind in ("kept", "mass")}
        row[f"bytes_{length}"] = sum(r.kept for r in runs) / samples
    return row


def line(stage: str, row: dict[str, float], lengths: tuple[int, ...]) -> str:
    """One line of the table: nats per token, needle and recall at each length."""
    cells = [
        f"{n:,}: {row[f'perplexity_{n}']:.2f} nats, needle {row[f'needle_{n}']:.0%}, recall {row[f'recall_{n}']:.0%}"
        for n in lengths
    ]
    return f"{stage:16}" + "   ".join(cells)


def bytes_line(report: dict) -> str:
    held = ", ".join(f"{int(n):,}: {b / 1024:,.0f}" for n, b in report["kv_bytes"].items())
    times = ", ".join(f"{name} {s:.0f} s" for name, s in report["seconds"].items())
    return (
        f"KiB a row: state {report['state_bytes'] / 1024:,.0f} at any length; keys and values {held}. {times}"
    )


def unread_line(report: dict) -> str:
    """What of the prompts was read at the end, and the attention mass on it, by task at the longest length."""
    row, length = list(report["rows"].values())[-1], max(report["lengths"])
    parts = [f"{name} {row[f'kept_{name}_{length}']:.0%} of the keys, {row[f'mass_{name}_{length}']:.0%} of the mass"
             for name in TASKS]  # fmt: skip
    times = ", ".join(f"{name} {s:.0f} s" for name, s in report["seconds"].items())
    return f"read at {length:,}: {'; '.join(parts)}. {times}"


def kv_bytes(model: Any, tokens: int, size: int) -> int:
    """Bytes of keys and values that softmax attention holds for one row."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * tokens * heads * width * config.num_hidden_layers * size
