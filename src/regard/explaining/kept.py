"""A scan that goes on where it was stopped: what was measured is in a folder as soon as it is."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from regard.explaining.grid import Grid
from regard.explaining.pairs import Pairs
from regard.models.revision import of_loaded
from regard.report.folder import Folder


@dataclass
class Kept:
    """Rows of a scan by key; kept in a folder as they end where there is one."""

    folder: Folder | None
    rows: dict[str, Any]

    @staticmethod
    def open(path: str | Path | None, header: Callable[[], dict[str, Any]]) -> "Kept":
        if path is None:
            return Kept(None, {})
        folder = Folder(Path(path))
        return Kept(folder, {key: row["values"] for key, row in folder.open(header()).items()})

    def add(self, key: str, values: Any) -> None:
        if self.folder is not None:
            self.folder.add({"key": key, "values": values})
        self.rows[key] = values


def content_of(pairs: Pairs) -> str:
    """What the prompts, images and answers are, in 16 characters."""
    content = hashlib.sha256()
    sides = [x for side in (pairs.clean, pairs.corrupt) for x in (side.ids, side.mask, *side.image.values())]
    for x in (*sides, pairs.target, pairs.foil, pairs.align):
        content.update(b"-" if x is None else x.detach().float().cpu().numpy().tobytes())
    return content.hexdigest()[:16]


def header(model: PreTrainedModel, pairs: Pairs, grid: Grid, direction: str) -> dict[str, Any]:
    """What a scan is of: a folder of another one is refused."""
    return {
        "settings": {
            "model": of_loaded(model, None), "pairs": content_of(pairs),
            "metric": getattr(pairs.metric, "__name__", repr(pairs.metric)),
            "quantity": grid.quantity, "layers": list(grid.layers), "rows": grid.rows, "tokens": grid.tokens,
            "direction": direction,
        }
    }  # fmt: skip
