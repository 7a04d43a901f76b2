"""Imports go down, never up or sideways between pages: see the floors in ARCHITECTURE.md."""

import ast
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
FLOORS = {
    "core": 0, "ops": 1, "report": 1, "methods": 2, "catalog": 3, "api": 4, "nn": 4, "models": 4, "tasks": 5,
    "testing": 6, "bench": 6, "train": 6, "claims": 7, "cli": 8,
    "train.loop": 1,  # trains whatever has parameters, so models may use it
}  # fmt: skip
PAGES = ("core", "ops")  # all that a page may import, beside torch


def parts(module: str) -> list[str]:
    return module.split(".")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of the package in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} write imports in full"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if parts(name)[0] == "regard" and len(parts(name)) > 1]


def floor(module: str) -> int:
    """Of a file that has one of its own, or of its room."""
    own = ".".join(parts(module)[1:3])
    return FLOORS[own] if own in FLOORS else FLOORS[parts(module)[1]]


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


def test_every_room_has_a_floor():
    rooms = {p.stem for p in (SRC / "regard").iterdir() if p.is_dir() or p.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__"} <= set(FLOORS)


def test_a_planted_import_is_found():
    assert wrong("regard.core.mask", "regard.ops.softmax")
    assert wrong("regard.methods.caches.h2o", "regard.methods.caches.snapkv")
    assert wrong("regard.methods.caches.h2o", "regard.models.attach")
    assert wrong("regard.models.convert", "regard.train.run.train")
    assert wrong("regard.train.loop", "regard.models.attach")
    assert not wrong("regard.models.attach", "regard.catalog")
    assert not wrong("regard.models.convert", "regard.train.loop.fit")


def test_pages_never_import_transformers():
    for path in (SRC / "regard" / "methods").rglob("*.py"):
        assert "transformers" not in path.read_text(encoding="utf8").split('"""', 2)[-1], path


def test_import_is_light():
    """Nothing is patched and nothing heavy is loaded by `import regard`."""
    code = (
        "import sys, regard; heavy = {'torch', 'transformers', 'plotly', 'typer', 'rich', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; import torch, time; t = time.perf_counter(); regard.method('h2o');"
        "assert time.perf_counter() - t < 2, time.perf_counter() - t"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
