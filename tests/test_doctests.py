"""Examples in docstrings are run: every module of the package, found by its place."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
SKIP = {"regard.cli"}
MODULES = sorted(
    ".".join(p.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
    for p in (SRC / "regard").rglob("*.py")
    if ">>>" in p.read_text(encoding="utf8")
)


@pytest.mark.parametrize("name", [m for m in MODULES if m not in SKIP])
def test_examples(name):
    import torch

    result = doctest.testmod(
        import_module(name), extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.attempted > 0
    assert result.failed == 0
