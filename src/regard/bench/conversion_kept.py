"""What a conversion keeps while it is under way, so that one that was stopped goes on with the same command.

OUT/unfinished/run.json         the settings      results.jsonl    what was measured, a row a stage
OUT/unfinished/last.safetensors the stage under way, replaced whole
OUT/unfinished/transfer/, finetune/               what a stage learned, when it has ended
OUT/                            the model and its parts, when all is done; `unfinished` is then taken away
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from regard.attaching.converted import Converted, earlier, read_converted, read_report, write
from regard.core import Method, require
from regard.models.names import MARKER, PARTS
from regard.report.folder import BEGUN, PART, Folder, differences, fill, vacant
from regard.train.checkpoints import facts_of

STATE, LAST, SAVING = "unfinished", "last.safetensors", "saving"
STAGES = ("transfer", "finetune")
REPORT = ("model", "mechanism", "length", "lengths", "rows", "state_bytes", "kv_bytes", "seconds", "settings")
RULE = "the output folder is new, empty or of the same conversion; choose another --out"


def made_before(folder: Path, settings: dict) -> dict | None:
    """The report of this very conversion where it ended here; None where it may begin or go on; all else is refused."""
    held = earlier(folder)
    if not held:
        if not begun(folder):
            vacant(folder)
        return None
    report = read_report(folder)
    apart = differences(report.get("settings", {}), settings)
    require(not apart, RULE, out=str(folder), **held, **apart)
    # a kill may have come before it was taken away
    take_away(folder / STATE)
    return {key: report[key] for key in REPORT}


def begun(folder: Path) -> bool:
    """Whether a conversion was begun here that has not ended."""
    state = folder / STATE
    if (state / "run.json").exists():
        return True
    # a start that was killed before its header
    return state.is_dir() and [p.name for p in folder.iterdir()] == [STATE] and not held_by_others(state)


def held_by_others(state: Path) -> bool:
    return any(p.name not in BEGUN for p in state.iterdir())


def take_away(state: Path) -> None:
    """Remove what a conversion kept, and nothing else."""
    for name in STAGES:
        remove(state / name, (MARKER, PARTS))
    remove(state, (LAST, f"{LAST}.part", "results.jsonl", "run.json.part", "run.json"))


def remove(folder: Path, names: tuple[str, ...]) -> None:
    """These files of a folder, and the folder where nothing else lies in it."""
    if not folder.is_dir():
        return
    for part in (folder / PART, folder):
        for name in names:
            (part / name).unlink(missing_ok=True)
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()


class Work:
    """The stages of one conversion; without a folder nothing is kept."""

    def __init__(self, out: Path | None, settings: Mapping[str, Any]) -> None:
        self.out, self.rows = out, {}
        self.folder = None if out is None else Folder(out / STATE)
        if self.folder is not None:
            title = f"{settings['mechanism']} in {settings['model']}"
            self.rows = self.folder.open({"title": title, "settings": dict(settings)})
        self.seconds = self.spent()

    def spent(self) -> float:
        """Seconds of earlier starts, as far as their work was kept."""
        if self.folder is None:
            return 0.0
        total = sum(row.get("seconds", 0.0) for row in self.rows.values())
        ended = [stage for stage in STAGES if (self.folder.path / stage / MARKER).exists()]
        total += sum(read_report(self.folder.path / stage)[f"{stage}_seconds"] for stage in ended)
        last = facts_of(self.folder.path / LAST)
        return total if last is None or last["stage"] in ended else total + last["seconds"]

    @property
    def checkpoint(self) -> Path | None:
        return None if self.folder is None else self.folder.path / LAST

    def row(self, stage: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What was measured after a stage, now or before."""
        if stage not in self.rows:
            began = perf_counter()
            self.rows[stage] = {"key": stage, "measured": measure()}
            self.rows[stage]["seconds"] = perf_counter() - began
            if self.folder is not None:
                self.folder.add(self.rows[stage])
        return self.rows[stage]["measured"]

    def learned(self, stage: str, method: Method, device: Any, learn: Callable[[], Converted]) -> Converted:
        """What a stage learned, now or before."""
        if self.folder is None:
            return learn()
        kept = self.folder.path / stage
        if (kept / MARKER).exists():
            return replace(read_converted(kept, device), method=method)
        converted = learn()
        fill(kept, lambda part: write(converted, part, None, None), last=MARKER, replace=True)
        return converted

    def finish(self, converted: Converted, model: Any, tokenizer: Any) -> None:
        """Model and parts into the folder, whole; then what was kept is taken away."""
        if self.folder is None or self.out is None:
            return
        # files that an earlier start had begun to move here are ours
        again = SAVING in self.rows
        if not again:
            self.folder.add({"key": SAVING})
        fill(self.out, lambda part: write(converted, part, model, tokenizer), last=MARKER, replace=again)
        take_away(self.folder.path)
