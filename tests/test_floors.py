"""Imports go down, never up or sideways between pages: see the floors in ARCHITECTURE.md."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from regard import catalog

SRC = Path(__file__).parents[1] / "src"
FLOORS = {
    "core": 0, "ops": 1, "report": 1, "kinds": 2, "methods": 3, "tasks": 3, "catalog": 4, "api": 5, "nn": 5,
    "attaching": 5, "models": 5, "train": 6, "explaining": 6, "bench": 7, "testing": 7, "claims": 8, "cli": 9,
}  # fmt: skip
MOVED = {"attach", "convert", "store", "trace"}  # old names in models/, which forward to where things are now
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
# all that a page may import, beside torch
PAGES = ("core", "ops", "kinds")


def parts(module: str) -> list[str]:
    return module.split(".")


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of the package in a file, those inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} write imports in full"
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in names if parts(name)[0] == "regard" and len(parts(name)) > 1]


def floor(module: str) -> int:
    """Of a file that has one of its own, or of its room."""
    module_floor = ".".join(parts(module)[1:3])
    return FLOORS[module_floor] if module_floor in FLOORS else FLOORS[parts(module)[1]]


def wrong(here: str, name: str) -> bool:
    """Whether a module `here` may not import `name`."""
    mine, theirs = parts(here)[1], parts(name)[1]
    if theirs not in FLOORS:  # a name of regard/__init__.py
        return True
    if mine == "methods":
        return theirs not in PAGES
    return floor(name) > floor(here)


def test_imports_go_down():
    bad = []
    for path in (SRC / "regard").rglob("*.py"):
        here = ".".join(path.relative_to(SRC).with_suffix("").parts)
        if here != "regard.__init__":
            bad += [f"{path}:{line} imports {name}" for line, name in imports(path) if wrong(here, name)]
    assert not bad, "\n".join(bad)


def graph() -> dict[str, set[str]]:
    """File -> files of the package that it imports, by dotted name; an import of a room means its __init__."""
    files = {".".join(p.relative_to(SRC).with_suffix("").parts): p for p in (SRC / "regard").rglob("*.py")}
    edges = {}
    for here, path in files.items():
        targets = {target(name, files) for _, name in imports(path)}
        edges[here] = targets - {None, here}
    return edges


def target(name: str, files: Mapping[str, object]) -> str | None:
    """The file that an imported name lies in: the module itself, the room, or the module that defines it."""
    for module in (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"):
        if module in files:
            return module
    return None


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Files that reach each other: the strongly connected components of more than one file."""
    below = {file: reach(file, edges) for file in edges}
    rings = {frozenset({f, *(g for g in below[f] if f in below[g])}) for f in edges}
    return sorted(sorted(ring) for ring in rings if len(ring) > 1)


def reach(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen, open_ = set(), [start]
    while open_:
        for file in edges.get(open_.pop(), set()) - seen:
            seen.add(file)
            open_.append(file)
    return seen


def test_no_files_import_each_other():
    rings = circles(graph())
    assert not rings, "\n".join(" <-> ".join(ring) for ring in rings)


def test_a_planted_circle_is_found():
    edges = graph()
    step, ledger = "regard.attaching.step", "regard.attaching.ledger"
    assert ledger in edges[step]
    edges[ledger] = edges[ledger] | {"regard.attaching.function"}
    ring = next(ring for ring in circles(edges) if ledger in ring)
    assert {step, "regard.attaching.function"} <= set(ring)


def test_imports_inside_functions_count(tmp_path):
    path = tmp_path / "late.py"
    path.write_text("def late():\n    from regard.attaching.function import native\n    return native\n")
    assert imports(path) == [(2, "regard.attaching.function.native")]


def test_old_names_forward_with_a_warning():
    for old in MOVED:
        module = import_module(f"regard.models.{old}")
        name = {
            "attach": "attach",
            "convert": "load_converted",
            "store": "save_cache",
            "trace": "retrieval_heads",
        }[old]
        with pytest.warns(DeprecationWarning, match=f"{name} is now regard"):
            assert callable(getattr(module, name))
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_every_room_has_a_floor():
    rooms = {p.stem for p in (SRC / "regard").iterdir() if p.is_dir() or p.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__"} <= set(FLOORS)


def test_a_planted_import_is_found():
    assert wrong("regard.core.mask", "regard.ops.softmax")
    assert wrong("regard.methods.caches.h2o", "regard.methods.caches.snapkv")
    assert wrong("regard.methods.caches.h2o", "regard.attaching.attachment")
    assert wrong("regard.attaching.attachment", "regard.explaining.tracing")
    assert wrong("regard.attaching.attachment", "regard.train.loop")
    assert not wrong("regard.attaching.attachment", "regard.catalog")


def test_pages_never_import_transformers():
    for path in (SRC / "regard" / "methods").rglob("*.py"):
        assert "transformers" not in path.read_text(encoding="utf8").split('"""', 2)[-1], path


def test_import_is_light():
    """Nothing is patched and nothing heavy is loaded by `import regard`."""
    code = (
        "import sys, regard; heavy = {'torch', 'transformers', 'plotly', 'typer', 'rich', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; import torch, time; t = time.process_time(); regard.method('h2o');"
        "assert time.process_time() - t < 2, time.process_time() - t"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def lines_of_code(source: str) -> int:
    """Lines that are no blank lines, comments or docstrings."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def test_lines_of_code():
    assert (
        lines_of_code(
            '"""Says."""\n\n# why\ndef f():\n    """Says."""\n    return (\n        1\n    )  # one\n'
        )
        == 4
    )


def test_files_and_pages_are_short():
    """A file is read in one go: 350 lines; the code of a page on two screens: 150 lines."""
    files = {path: path.read_text(encoding="utf8") for path in (SRC / "regard").rglob("*.py")}
    long = [f"{path}: {n} lines" for path, text in files.items() if (n := text.count("\n")) > 350]
    pages = {catalog.path_of(name) for name in catalog.pages()}
    long += [f"{path}: {n} lines of code" for path in pages if (n := lines_of_code(files[path])) > 150]
    assert not long, "\n".join(long)


def waits_of(source: str) -> list[int]:
    """Lines of a test's source that hold what is measured to the wall's clock or to how busy the machine is."""
    lines = (
        (n, line) for n, line in enumerate(source.splitlines(), 1) if line.lstrip(' "').startswith("assert ")
    )
    return [n for n, line in lines if "perf_counter()" in line or "getloadavg" in line]


def test_no_test_depends_on_how_busy_the_machine_is():
    """How long something takes is asked of the processor's time, which others on the machine do not move."""
    planted = 'assert time.perf_counter() - t < 2\n"assert os.getloadavg()[0] < 3"\nassert a'
    assert waits_of(planted) == [1, 2]
    tests = Path(__file__).parent.rglob("*.py")
    assert not [f"{path}: {waits_of(path.read_text())}" for path in tests if waits_of(path.read_text())]


def defaults(node):
    """(name, default) of what a function may be called without."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    yield from zip(plain[len(plain) - len(args.defaults) :], args.defaults, strict=True)
    yield from zip(args.kwonlyargs, args.kw_defaults, strict=True)


def test_nobody_trusts_the_code_of_a_model_unasked():
    found = []
    files = [(path, path.read_text(encoding="utf8")) for path in SRC.rglob("*.py")]
    for path, source in files:
        for node in ast.walk(ast.parse(source)) if "trust_remote_code" in source else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found += [
                    (path.name, node.name, ast.literal_eval(value))
                    for arg, value in defaults(node)
                    if arg.arg == "trust_remote_code" and value is not None
                ]
    assert len(found) > 8 and all(value is False for *_, value in found), found
