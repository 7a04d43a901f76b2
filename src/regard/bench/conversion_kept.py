"""What a conversion keeps while it is under way, so that one that was stopped goes on with the same command.

OUT/unfinished/run.json    the settings       results.jsonl    what was measured, a row a stage
    transfer.safetensors, finetune.safetensors    the last checkpoint of a stage, replaced whole
OUT/    the model and its parts, when all is done; `unfinished` is then taken away
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from regard.attaching.converted import Converted, earlier, read_report, write
from regard.core import require
from regard.models.names import MARKER
from regard.report.folder import BEGUN, PART, Folder, differences, fill, vacant
from regard.train.checkpoints import facts_of

STATE, SAVING = "unfinished", "saving"
CHECKPOINTS = ("transfer.safetensors", "finetune.safetensors")
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
    if (folder / PART).is_dir() and not any((folder / PART).iterdir()):
        (folder / PART).rmdir()
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
    """Remove what a conversion kept, and nothing else; its header last."""
    for name in (*CHECKPOINTS, "results.jsonl", "run.json"):
        for file in (state / f"{name}.part", state / name):
            file.unlink(missing_ok=True)
    if state.is_dir() and not any(state.iterdir()):
        state.rmdir()


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
        kept = [facts_of(self.folder.path / name) for name in CHECKPOINTS]
        return sum(row.get("seconds", 0.0) for row in (*self.rows.values(), *filter(None, kept)))

    @property
    def checkpoints(self) -> Path | None:
        return None if self.folder is None else self.folder.path

    def row(self, stage: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What was measured after a stage, now or before."""
        if stage not in self.rows:
            began = perf_counter()
            self.rows[stage] = {"key": stage, "measured": measure()}
            self.rows[stage]["seconds"] = perf_counter() - began
            if self.folder is not None:
                self.folder.add(self.rows[stage])
        return self.rows[stage]["measured"]

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
