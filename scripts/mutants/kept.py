"""The kept list: faults that are planted by hand, each with the law that sees it or the reason why none can.

[[fault]]
name = "what is wrong, a short sentence"
file = "src/regard/..."
before = '''text that stands once in the file'''
after = '''what stands there instead'''
law = ["tests/test_....py::test_..."]      # pytest's arguments; or, where nothing can change:
equivalent = "the reason"
"""

import ast
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trees import ROOT, SEEN, UNSEEN, Mutant, copied, tested

FOLDER = ROOT / "tests" / "mutants"


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    before: str
    after: str
    law: tuple[str, ...] = ()
    equivalent: str = ""

    def __post_init__(self) -> None:
        if bool(self.law) == bool(self.equivalent):
            raise ValueError(f"a fault has a law that sees it, or a reason why none can: {self.name}")
        if self.before == self.after:
            raise ValueError(f"a fault changes something: {self.name}")

    def text(self) -> str:
        """The file with the fault in it."""
        source = (ROOT / self.file).read_text()
        count = source.count(self.before)
        if count != 1:
            raise ValueError(
                f"what a fault replaces stands once in its file, not {count} times: {self.name} ({self.file})"
            )
        text = source.replace(self.before, self.after)
        if self.file.endswith(".py"):
            ast.parse(text)
        return text

    def mutant(self) -> Mutant:
        return Mutant(self.name, self.file, self.text(), self.law)


def load(files: Sequence[Path] = ()) -> list[Fault]:
    """The faults of these files, or of all."""
    found = []
    for path in files or sorted(FOLDER.glob("*.toml")):
        for row in tomllib.loads(path.read_text())["fault"]:
            found.append(Fault(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}))
    return found


def check_laws_pass(mutants: Sequence[Mutant], limit: float, workers: int) -> None:
    """A law that fails on the tree as it is says nothing of a fault."""
    laws = sorted({law for mutant in mutants for law in mutant.tests})
    parts = [part for n in range(workers) if (part := laws[n::workers])]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        trees = [copied(Path(folder) / str(n)) for n in range(len(parts))]
        found = list(pool.map(tested, trees, parts, [max(limit, 3600)] * len(parts)))
    for outcome, said in found:
        if outcome != UNSEEN:
            kind = "fail" if outcome == SEEN else f"are {outcome}"
            raise SystemExit(
                f"the laws {kind} on the tree as it is, so that they say nothing of faults: {said}"
            )
    print(f"{len(laws)} laws pass on the tree as it is", file=sys.stderr)
