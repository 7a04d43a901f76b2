"""A cell is measured: `measure(cell, Bench(model, tokenizer))`, the row of its quality, fidelity and bytes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from regard import catalog
from regard.attaching.converted import Converted, configured
from regard.attaching.knob import calibrate
from regard.bench.cell import Cell
from regard.bench.executors.base import Loader, why
from regard.bench.passes import Pass, run
from regard.bench.pictures import picture_row
from regard.bench.prefill import crossing_row, unread
from regard.bench.quality import fidelity, quality
from regard.bench.spoken import Spoken
from regard.bench.timed import timing_row
from regard.bench.words import FULL
from regard.core import require
from regard.report.floor import FLOOR, floor_text, near_floor
from regard.tasks import Sample, Source


def target_key(cell: Cell) -> tuple:
    """What a method that was calibrated to a target hangs on."""
    return cell.label, cell.length, cell.seed, cell.text


def shared_key(cell: Cell) -> tuple:
    """What the samples of a cell, and full attention's passes over them, hang on."""
    return cell.task, cell.length, cell.seed, cell.samples, cell.text, cell.chat, cell.system


@dataclass
class Bench:
    """A loaded model with what cells share: samples and full attention's logits of the latest task and length."""

    model: Any
    tokenizer: Any
    memo: dict = field(default_factory=dict)
    spoken: dict[str, Spoken] = field(default_factory=dict)  # tokenizers by the system prompt they say
    # methods that were calibrated to a target on this model, with the seconds that it took
    targets: dict = field(default_factory=dict)
    floors: dict[tuple, str] = field(default_factory=dict)  # what `floor` said of each task and length

    def method_of(self, cell: Cell) -> Any:
        """What is attached for a cell: None for full attention; where its settings name a target, calibrated to it."""
        if cell.method == FULL:
            return None
        settings = dict(cell.settings)
        target = settings.pop("target", None)
        budget = {} if cell.budget is None else {"budget": cell.budget}
        method = configured(cell.method, {**budget, **settings}, self.model.device)
        if target is None:
            return method
        key = target_key(cell)
        if key not in self.targets:
            start = time.perf_counter()
            found = calibrate(
                self.model, self.tokenizer, method, target, length=cell.length, samples=2, seed=cell.seed,
                source=self.source(cell),
            )  # fmt: skip
            self.targets[key] = found, time.perf_counter() - start
        return self.targets[key][0]

    def calibration(self, cell: Cell) -> float:
        """Seconds that finding the settings of a cell's target took, whichever cell asked for them first."""
        self.method_of(cell)
        return self.targets[target_key(cell)][1]

    def shared(self, cell: Cell) -> tuple[list[Sample], list[Pass]]:
        """Samples of a cell and full attention's passes over them, made once for all methods."""
        key = shared_key(cell)
        if key not in self.memo:
            samples = self.samples(cell)
            self.memo = {key: (samples, [self.run(b, None) for b in batches(samples, cell)])}
        return self.memo[key]

    def samples(self, cell: Cell) -> list[Sample]:
        """The questions of a cell."""
        task, text = catalog.task(cell.task), self.source(cell)
        tokenizer = self.tokenizer
        if cell.system is not None:
            tokenizer = self.spoken.setdefault(cell.system, Spoken(tokenizer, cell.system))
        return task.samples(
            tokenizer, cell.length, cell.samples, cell.seed, source=text, chat=self.chats(cell)
        )

    def chats(self, cell: Cell) -> bool:
        """Whether questions are asked in the model's chat template: where it has one, if nobody says."""
        return bool(getattr(self.tokenizer, "chat_template", None)) if cell.chat is None else cell.chat

    def source(self, cell: Cell) -> Source | None:
        """The text of one's own that a cell draws from, if there is one."""
        return None if cell.text is None else text_of(cell)

    def floor(self, cell: Cell) -> str:
        """What full attention scores where that is near what guessing gives, in words; "" elsewhere."""
        key = shared_key(cell)
        if key not in self.floors:
            samples, full = self.shared(cell)
            facts = quality(catalog.task(cell.task).metric, samples, full, full, self.tokenizer)
            near = near_floor(facts["quality_low"], facts["chance"])
            self.floors[key] = floor_text(facts) if near else ""
        return self.floors[key]

    def run(self, batch: list[Sample], method: Any, weigh: bool = False) -> Pass:
        """`regard.bench.passes.run` on this model."""
        return run(self.model, batch, method, weigh, self.tokenizer)


def text_of(cell: Cell) -> Source:
    """The text of one's own, as it was when the run began."""
    source, wanted = Source.from_path(cell.text or ""), cell.revisions.get("text")
    require(
        wanted in (None, source.revision),
        "the text is the one the run began with; run it again",
        text=cell.text,
    )
    return source


def batches(samples: list[Sample], cell: Cell) -> list[list[Sample]]:
    """Samples that are read together: as many as `batch_tokens` holds, of one shape, in their order."""
    made = []
    for _, alike in groupby(samples, key=lambda s: getattr(s, "shape", None)):
        group = list(alike)
        size = max(1, cell.batch_tokens // longest(group, cell))
        made += [group[i : i + size] for i in range(0, len(group), size)]
    return made


def longest(samples: Sequence[Sample], cell: Cell) -> int:
    """The tokens of a cell's prompts; of questions of one's own those of the longest."""
    return cell.length or max(len(sample.prompt) for sample in samples)


def measure(cell: Cell, bench: Bench) -> dict:
    """The row of one cell: quality, fidelity to full attention, bytes."""
    if cell.what == "crossing":
        return crossing_row(cell, bench)
    if cell.what == "timing":
        return timing_row(cell, bench)
    if cell.what == "pictures":
        return picture_row(cell, bench)
    start = time.perf_counter()
    with peak_memory(bench.model.device) as peak:
        samples, full = bench.shared(cell)
        if cell.method != FULL and not cell.at_floor and (floor := bench.floor(cell)):
            return cell.row(status=FLOOR, error=floor, length=longest(samples, cell))
        method = bench.method_of(cell)
        runs = full if method is None else [bench.run(b, method, weigh=True) for b in batches(samples, cell)]
    metric = catalog.task(cell.task).metric
    facts = {
        **quality(metric, samples, runs, full, bench.tokenizer),
        **fidelity(samples, runs, full),
        **unread(runs),
    }
    facts |= dict(
        bytes_held=sum(r.held for r in runs), bytes_kept=sum(r.kept for r in runs),
        bytes_full=sum(r.held for r in full), bytes_read=sum(r.read for r in runs),
        bytes_read_full=sum(r.read for r in full), peak_bytes=peak[0],
    )  # fmt: skip
    if isinstance(method, Converted) and "reached" in method.report:
        facts["target"] = method.report["reached"]
    facts["template"] = "the model's chat template" if bench.chats(cell) else "plain text"
    return cell.row(**facts, length=longest(samples, cell), seconds=time.perf_counter() - start)


@contextmanager
def peak_memory(device: torch.device):
    """A list that holds, afterwards, the peak bytes of the block: of the GPU, or of the process where Linux tells."""
    peak = [0]
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif clear.exists():
        clear.write_text("5")
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device)
    elif status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        peak[0] = int(line.split()[1]) * 1024


def safely(cell: Cell, bench: Bench) -> dict:
    """Measure a cell; whatever goes wrong becomes its row."""
    try:
        return measure(cell, bench)
    except Exception as error:
        return cell.row(**why(error))


@dataclass
class InProcess:
    """One cell after the other in this process: for a model that only lives here."""

    def run(self, cells: Sequence[Cell], load: Loader) -> Iterator[dict]:
        bench = Bench(*load())
        for cell in cells:
            yield safely(cell, bench)
