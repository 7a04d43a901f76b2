"""The folder of a run: its header, its rows as they end, and what a later start of the same command finds there.

Whether a folder may be written to is asked before the work, and what regard did not write is never removed from it.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.core import require
from regard.report.floor import FLOOR

PART = ".regard.part"  # where a folder's files are written until they are whole
READ = ("text", "model", "dtype", "versions")  # what all cells of a run have in common of its content
BEGUN = (PART, "run.json.part")  # what a start leaves that was killed before the folder was a run's


@dataclass
class Folder:
    """run.json says what is run; results.jsonl holds one row a line, each written whole and at once."""

    path: Path

    @property
    def results(self) -> Path:
        return self.path / "results.jsonl"

    def open(self, header: dict, grows: Sequence[str] = (), replaces: Sequence[str] = ()) -> dict[str, dict]:
        """Make the folder or go on in it: rows by key. Another run's folder is refused with what differs.

        grows     names of settings that are lists: a later start may ask for others, and the run is then of both
        replaces  names of settings that a later start may change: the run is then what that one asks for alone
        """
        header_file = self.path / "run.json"
        if not header_file.exists():
            vacant(self.path, "the output folder is new, empty or of an earlier start of this run")
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(header_file, json.dumps(header, indent=1))
            return {}
        old, header = read_header(header_file), json.loads(json.dumps(header))
        apart = differences(old["settings"], header["settings"], (*grows, *replaces))
        rule = "the output folder is of the same run; choose another --out"
        require(not apart, rule, out=str(self.path), **apart)
        writable(self.path)
        # the same command over a text or a model whose content is another asks for other cells
        if old.get("cells") != header.get("cells"):
            anew = differences(old["settings"], header["settings"], grows) or other_content(old, header)
            write_whole(
                header_file, json.dumps({**old, **joined(old, header, () if anew else grows)}, indent=1)
            )
        return self.rows()

    def rows(self) -> dict[str, dict]:
        """Rows by key; a line cut short by a kill is taken away, and its cell runs again."""
        text = self.results.read_bytes() if self.results.exists() else b""
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with self.results.open("r+b") as file:
                file.truncate(whole)
        return self.read()

    def read(self) -> dict[str, dict]:
        """Rows by key, a line that is cut short left out; nothing is written."""
        if not self.results.exists():
            return {}
        # a text in a row may hold other signs that end a line
        lines = self.results.read_bytes().split(b"\n")[:-1]
        return {row["key"]: row for row in map(json.loads, lines)}

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


def read_header(path: Path) -> dict:
    """A run's header; refused where the file is somebody else's."""
    try:
        header = json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        header = None
    ours = isinstance(header, dict) and isinstance(header.get("settings"), dict)
    require(ours, "run.json of the output folder is of a run; choose another --out", run=str(path))
    return header


def differences(old: Mapping, new: Mapping, grows: Sequence[str] = ()) -> dict[str, tuple]:
    """Name -> (old, new) of the settings that are not the same, but for those that may grow."""
    names = sorted({*old, *new} - set(grows))
    return {k: (old.get(k), new.get(k)) for k in names if old.get(k) != new.get(k)}


def other_content(old: Mapping, new: Mapping) -> bool:
    """Whether a run reads something else than before under the same name, or under other versions."""
    before, now = old.get("content") or {}, new.get("content") or {}
    return any(before.get(k) != now.get(k) for k in {*READ} | (before.keys() & now.keys()))


def joined(old: Mapping, new: Mapping, grows: Sequence[str]) -> dict[str, Any]:
    """The header of a run that has grown: what either start asked for. Without settings that grow, the new one's."""
    if not any(old["settings"].get(name) != new["settings"].get(name) for name in grows):
        return dict(new)
    both = {name: merged(old["settings"].get(name, []), new["settings"][name]) for name in grows}
    of_methods = ("families", "cards", "attached")
    facts = {name: {**(old.get(name) or {}), **(new.get(name) or {})} for name in of_methods}
    cells = [*dict.fromkeys([*old.get("cells", ()), *new["cells"]])]
    return {**new, "settings": {**new["settings"], **both}, **facts, "cells": cells}


def merged(old: Sequence, new: Sequence) -> list:
    return sorted({*old, *new})


def vacant(
    folder: Path, rule: str = "the output folder is new or empty; choose another", **holds: Any
) -> None:
    """Refuse, before any work, a folder that holds something, or that cannot be made or written to."""
    require(not folder.exists() or folder.is_dir(), "the output is a folder", out=str(folder))
    there = sorted(p.name for p in folder.iterdir() if p.name not in BEGUN) if folder.exists() else []
    require(not there, rule, out=str(folder), **{"holds": there[:5], **holds})
    writable(folder)


def writable(folder: Path) -> None:
    """Refuse a folder, there or to be made, in which no file can be written."""
    above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    may = above.is_dir() and os.access(above, os.W_OK)
    require(may, "the output folder can be written to", out=str(folder), at=str(above))


def fill(folder: Path, write: Callable[[Path], None], last: str, replace: bool = False) -> None:
    """What `write` makes of a folder it is given, moved into `folder` when it is whole, the file `last` at the end.

    Files that are there stay. Where one has a name of ours, it is put in its place with `replace`; without, what was
    made stays in a folder of its own, which the error names.
    """
    new = not folder.exists()
    part = folder / PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    made = sorted((p.name for p in part.iterdir()), key=lambda name: (name == last, name))
    taken = [name for name in made if (folder / name).exists() and not replace]
    require(not taken, "nobody else writes to the output folder; what was made is whole in `made`",
            out=str(folder), made=str(part), taken=taken[:5])  # fmt: skip
    for name in made:
        os.replace(part / name, folder / name)
    part.rmdir()


def keys_of(rows: dict[str, Any], retry: bool) -> set[str]:
    """Cells that need not run again: all but those that failed, and without `retry` those too."""
    return {k for k, row in rows.items() if not retry or row["status"] in ("ok", FLOOR)}
