"""A reference can disagree: on no page does it share a function that computes with the fast path."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regard import catalog
from regard.core import PATTERNS
from regard.testing.laws import check_fast_equals_reference
from regard.testing.mechanism import Case

NAMES = [name for kind in ("mechanism", "block") for name in catalog.list_methods(kind=kind)]
# what both may use: float64 and back, hidden tokens, errors, settings side by side; none of it is a page's mathematics
HARMLESS = {
    "Axis",
    "Params",
    "layer_of",
    "exact",
    "heads_of",
    "initial",
    "quotient",
    "recurrence",
    "rounded",
    "carried",
    "require",
    "Unsupported",
}
# functions of a page that only refuse what its mathematics has no meaning for, or say how large a state or a part is
CHECKS = {
    "check_widths",
    "sizes",
    "check_count",
    "check_grid",
    "beginning",
    "lowest",
    "nothing",
    "state_heads",
}
PATHS = {"reference", "fast", "form"}


class Page:
    """Which functions a page's reference and its fast path reach, in its file and in regard.ops."""

    def __init__(self, text: str) -> None:
        tree = ast.parse(text)
        self.functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        ops = [node for node in imports if (node.module or "").startswith("regard.ops")]
        self.ops = {alias.asname or alias.name for node in ops for alias in node.names}

    def reached(self, start: str) -> set[str]:
        found: set[str] = set()
        left = [start]
        while left:
            name = left.pop()
            if name in found:
                continue
            found.add(name)
            left += [used for used in self.used(name) if used in self.functions]
            found |= {used for used in self.used(name) if used in self.ops}
        return found - {start}

    def used(self, name: str) -> Iterator[str]:
        for node in ast.walk(self.functions[name]):
            if isinstance(node, ast.Name) and node.id not in PATHS:
                yield node.id
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PATHS:
                yield node.func.id

    def shared(self) -> set[str]:
        fast = "form" if "form" in self.functions else "fast"
        if fast not in self.functions:
            return set()
        return (self.reached("reference") & self.reached(fast)) - HARMLESS - CHECKS


@pytest.mark.parametrize("name", NAMES)
def test_reference_and_fast_share_nothing_that_computes(name):
    page = Page(catalog.path_of(name).read_text(encoding="utf8"))
    assert page.shared() == set()


@pytest.mark.parametrize("name", NAMES)
def test_each_page_has_a_number_worked_by_hand(name):
    """It asks the reference, or a step that the reference alone takes."""
    source = catalog.path_of(name).read_text(encoding="utf8")
    text, page = ast.get_docstring(ast.parse(source)), Page(source)
    assert ">>>" in text
    fast = page.reached("fast") if "fast" in page.functions else set()
    own = page.reached("reference") - fast
    steps = {"reference", *(name for name in own if name not in page.ops or name.startswith("slow_"))}
    assert name == "lean_attention" or any(f"{step}(" in text for step in steps), (
        "the doctest asks the reference"
    )


def test_what_is_shared_is_found():
    text = (
        "from regard.ops import elu_plus_one, exact\n"
        "def phi(x):\n    return elu_plus_one(x)\n"
        "def reference(q):\n    return exact(phi(q))\n"
        "def form(q):\n    return exact(phi(q))\n"
    )
    assert Page(text).shared() == {"phi", "elu_plus_one"}
    assert set(PATTERNS) == {"self", "causal_self", "cross", "causal_cross"}
    assert Path(catalog.path_of("gla")).name == "gla.py"


FAST = [name for name in catalog.list_methods(kind="mechanism") if catalog.get(name).fast is not None]


def value_too_large(path):
    """The path with one key's value 1 % too large."""

    def planted(q, k, v, cfg, call):
        scale = torch.ones_like(v[:, :, :, :1])
        scale[:, :, v.shape[2] // 2] = 1.01
        return path(q, k, v * scale, cfg, call)

    return planted


def key_of_the_one_before(path):
    """The path with one key that is its neighbour's."""

    def planted(q, k, v, cfg, call):
        order = torch.arange(k.shape[2])
        order[-1] = max(0, len(order) - 2)
        return path(q, k[:, :, order], v, cfg, call)

    return planted


def output_in_another_unit(path):
    """The path with outputs too large by the square root of the keys' width, as of a scale that was forgotten."""

    def planted(q, k, v, cfg, call):
        out, *rest = path(q, k, v, cfg, call)
        return out * q.shape[-1] ** 0.5, *rest

    return planted


@pytest.mark.parametrize("fault", [value_too_large, key_of_the_one_before, output_in_another_unit])
@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("name", FAST)
def test_a_fault_planted_in_either_is_caught(name, path, fault):
    page = catalog.get(name)
    planted = replace(page, **{path: fault(getattr(page, path))})
    with pytest.raises(AssertionError, match="fast = reference"):
        check_fast_equals_reference(Case(planted, page.config(), page.patterns[-1]))
