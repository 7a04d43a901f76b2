"""The folder of a run: its header, its rows as they end, and what a later start of the same command finds there."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.core import require


@dataclass
class Folder:
    """run.json says what is run; results.jsonl holds one row a line, each written whole and at once."""

    path: Path

    @property
    def results(self) -> Path:
        return self.path / "results.jsonl"

    def open(self, header: dict) -> dict[str, dict]:
        """Make the folder or go on in it: rows by key. Another run's folder is refused with what differs."""
        require(not self.path.exists() or self.path.is_dir(), "the output is a folder", out=str(self.path))
        header_file = self.path / "run.json"
        if not header_file.exists():
            foreign = self.path.exists() and any(self.path.iterdir())
            require(
                not foreign,
                "the output folder is new, empty or of an earlier start of this run",
                out=str(self.path),
            )
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(header_file, json.dumps(header, indent=1))
            return {}
        old = json.loads(header_file.read_text(encoding="utf8"))["settings"]
        new = json.loads(json.dumps(header["settings"]))
        apart = {k: (old.get(k), new.get(k)) for k in {*old, *new} if old.get(k) != new.get(k)}
        require(
            not apart,
            "the output folder is of the same run; choose another --out",
            out=str(self.path),
            **apart,
        )
        return self.rows()

    def rows(self) -> dict[str, dict]:
        """Rows by key; a line cut short by a kill is taken away, and its cell runs again."""
        if not self.results.exists():
            return {}
        text = self.results.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.results.open("r+b") as file:
                file.truncate(len(whole))
        return {row["key"]: row for row in map(json.loads, whole.decode("utf8").splitlines())}

    def add(self, row: dict) -> None:
        """Append a row and push it to the disk. A full disk is an error that says so; earlier rows stay whole."""
        line = (json.dumps(row, ensure_ascii=False, default=float) + "\n").encode("utf8")
        size = self.results.stat().st_size if self.results.exists() else 0
        try:
            with self.results.open("ab", buffering=0) as file:
                file.write(line)
                os.fsync(file.fileno())
        except OSError as error:
            if self.results.exists() and self.results.stat().st_size > size:
                os.truncate(self.results, size)
            raise disk_error(error, self.path) from error

    def write(self, name: str, text: str) -> Path:
        try:
            write_whole(self.path / name, text)
        except OSError as error:
            raise disk_error(error, self.path) from error
        return self.path / name


def disk_error(error: OSError, path: Path) -> OSError:
    if error.errno == errno.ENOSPC:
        return OSError(
            errno.ENOSPC,
            f"the disk of {path} is full; finished cells are kept, free some room and run it again",
        )
    return error


def write_whole(path: Path, text: str) -> None:
    """Write beside and move into place, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, encoding="utf8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def keys_of(rows: dict[str, Any], retry: bool) -> set[str]:
    """Cells that need not run again: all that ended, or with `retry` only those that ended well."""
    return {k for k, row in rows.items() if not retry or row["status"] == "ok"}
