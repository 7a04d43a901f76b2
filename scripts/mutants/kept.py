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
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trees import ROOT, Mutant, asked, copied, failures

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


def failing_laws(mutants: Sequence[Mutant], limit: float, workers: int) -> dict[str, str]:
    """Laws that fail on the tree as it is, which say nothing of a fault, and the line of what fails."""
    laws = sorted({law for mutant in mutants for law in mutant.tests})
    files = sorted({law.partition("::")[0] for law in laws})  # tests of a file share what they run
    parts = [
        [law for law in laws if law.partition("::")[0] in files[n::workers]]
        for n in range(min(workers, len(files)))
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        trees = [copied(Path(folder) / str(n)) for n in range(len(parts))]
        found = list(pool.map(asked, trees, parts, [max(limit, 3600)] * len(parts)))
    for status, text in found:
        if status not in (0, 1):
            raise SystemExit(f"the laws could not be asked of the tree as it is ({status}):\n{text[-4000:]}")
    lines = [line for _, text in found for line in failures(text)]
    failing = {law: line for law in laws for line in lines if of(law, line)}
    if unknown := [line for line in lines if not any(of(law, line) for law in laws)]:
        raise SystemExit(f"what failed on the tree as it is belongs to no law: {unknown}")
    return failing


def of(law: str, line: str) -> bool:
    """Whether a line of what failed is of this law: a test, or all of a function, class or file."""
    _, _, test = line.partition(" ")  # its name, which may have blanks, and what went wrong
    return test == law or test.startswith((law + "[", law + "::", law + " - "))
