"""Which tests run the places of a sample: the suite once, in a copy of the tree where each place says its number."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trees
from trees import Mutant, copied

# a sample is what `make test` sees; beside that, what takes minutes to start or is not installed everywhere
LEFT_OUT = "not real and not cluster and not harness and not oracles and not claims and not long"
TELLS = "REGARD_MUTANTS_TOLD"  # folder of the environment in which each process says what it ran
# Each place says its number once a test, in whatever process it runs; torch.compile runs it while it traces.
SAYS = f"""
import os

import torch

said = set()


@torch.compiler.assume_constant_result
def ran(number):
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    if (number, test) not in said:
        said.add((number, test))
        with open(os.path.join(os.environ["{TELLS}"], str(os.getpid())), "a") as file:
            print(number, test, file=file)
"""


@dataclass(frozen=True)
class Reach:
    """tests: names; seconds of each; ran: place -> numbers of the tests that run it; code: a digest of what was run."""

    tests: list[str]
    seconds: list[float]
    ran: dict[str, list[int]]
    code: str

    def fits(self, mutants: Sequence[Mutant]) -> bool:
        """Not once a law has been written: it may run a place that no test ran before."""
        return self.code == digest() and {place(m) for m in mutants} <= {*self.ran}

    def within(self, mutant: Mutant, limit: float) -> tuple[str, ...]:
        """Names of the tests that run a mutant's place, the quickest first, as many as take so long together."""
        taken, total = [], 0.0
        for t in sorted(self.ran[place(mutant)], key=lambda t: self.seconds[t]):
            total += self.seconds[t]
            if total > limit:
                break
            taken.append(self.tests[t])
        return tuple(taken)


def digest() -> str:
    """Of the package and of its tests, as they lie here."""
    files = sorted(path for part in ("src", "tests") for path in (trees.ROOT / part).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def place(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.name}"


def known(path: Path, mutants: Sequence[Mutant], workers: int) -> Reach:
    """From a file, or measured and written there."""
    found = Reach(**json.loads(path.read_text())) if path.exists() else None
    if found is None or not found.fits(mutants):
        print(f"{len(mutants)} places: the suite once, to see which tests run them", file=sys.stderr)
        found = measured(mutants, workers)
        path.write_text(json.dumps(vars(found)))
    return found


def measured(mutants: Sequence[Mutant], workers: int) -> Reach:
    code = digest()
    with tempfile.TemporaryDirectory() as folder:
        tree, told, times = copied(Path(folder) / "tree"), Path(folder) / "told", Path(folder) / "times.xml"
        told.mkdir()
        mark(tree, mutants)
        command = [
            sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-p", "no:cacheprovider", "-m", LEFT_OUT,
            f"--junitxml={times}",
        ]  # fmt: skip
        own = {"PYTHONPATH": f"{tree / 'src'}:{tree}", TELLS: str(told), "OMP_NUM_THREADS": "1"}
        # a test that reads its own source fails here, and still says what it ran
        subprocess.run(command, cwd=tree, env=os.environ | own, check=False)
        seconds = seconds_of(times)
        ran = runs(told, {*seconds})
    names = sorted({*seconds} & set().union(*ran.values()))
    number = {name: n for n, name in enumerate(names)}
    there = {place(m): sorted(number[t] for t in ran.get(n, ())) for n, m in enumerate(mutants)}
    return Reach(names, [seconds[name] for name in names], there, code)


def mark(tree: Path, mutants: Sequence[Mutant]) -> None:
    """Rewrite the files of a tree so that each mutant's place says the mutant's number."""
    (tree / "src" / "says_what_ran.py").write_text(SAYS)
    by_file: dict[str, list[tuple[int, int]]] = {}
    for n, mutant in enumerate(mutants):
        by_file.setdefault(mutant.file, []).append((int(mutant.name.partition(":")[0]), n))
    for file, places in by_file.items():
        (tree / file).write_text(marked((tree / file).read_text(), places))


def marked(source: str, places: Sequence[tuple[int, int]]) -> str:
    """Source in which the statement of each line first says its number: (line, number).

    What is done at import, before any test, stands for all functions of its file; a default for its function.
    """
    tree = ast.parse(source)
    wanted = [(spot, number) for line, number in places for spot in spots(tree, line)]
    for (block, statement), number in wanted:
        says = ast.parse(f"says_what_ran.ran({number})").body
        at = block.index(statement) if statement in block else len(block)
        block[at:at] = says
    first = next(i for i, node in enumerate(tree.body) if not is_first(node))
    tree.body[first:first] = ast.parse("import says_what_ran").body  # by name: torch.compile follows that
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def is_first(node: ast.stmt) -> bool:
    """What a file begins with: its docstring, and what it asks of Python to come."""
    return isinstance(node, ast.Expr) or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


Spot = tuple[list[ast.stmt], ast.stmt | None]  # a block, and the statement of it that a line belongs to


def spots(tree: ast.Module, line: int) -> list[Spot]:
    """The innermost statement of a function that the line belongs to; where there is none, all functions."""
    spot, inside = None, False
    for block, statement in statements(tree):
        if not statement.lineno <= line <= (statement.end_lineno or statement.lineno):
            continue
        if isinstance(statement, ast.FunctionDef):
            spot, inside = start(statement), True
        elif inside and not isinstance(statement, ast.ClassDef):
            spot = (block, statement)
    return [spot] if spot else [start(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def statements(tree: ast.Module) -> Iterator[tuple[list[ast.stmt], ast.stmt]]:
    """Each with the block that it stands in, the outer ones first."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            for statement in block if isinstance(block, list) else ():
                yield block, statement


def start(function: ast.FunctionDef) -> Spot:
    """Where a function begins, after what documents it."""
    skipped = int(ast.get_docstring(function) is not None)
    return function.body, (function.body[skipped:] or [None])[0]


def runs(told: Path, tests: set[str]) -> dict[int, set[str]]:
    """Number -> tests. Who uses what another test of its file set up is not known: all of the file."""
    found: dict[int, set[str]] = {}
    together: dict[str, set[str]] = {}
    for name in tests:
        together.setdefault(name.partition("::")[0], set()).add(name)
    for path in told.iterdir():
        for line in path.read_text().splitlines():
            number, _, said = line.partition(" ")
            name, _, phase = said.rpartition(" ")
            if name:
                found.setdefault(int(number), set()).update(
                    together.get(name.partition("::")[0], ()) if phase == "(setup)" else {name} & tests
                )
    return found


def seconds_of(times: Path) -> dict[str, float]:
    """What each test took, by its name as pytest's command line has it."""
    found = {}
    for case in ElementTree.parse(times).getroot().iter("testcase"):
        module = case.attrib["classname"].replace(".", "/") + ".py"
        found[f"{module}::{case.attrib['name']}"] = float(case.attrib["time"])
    return found
