"""Existing is being tested: every page of the catalogue passes the checks that its kind names."""

import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regard import catalog
from regard.core import Page
from regard.kinds import kinds, skeleton
from regard.testing.pages import check_page, check_pickles


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", catalog.pages())
def test_page(name):
    report = check_page(name)
    assert report, f"{name}: nothing was checked"


@pytest.mark.parametrize("kind", kinds())
def test_kind_says_what_it_is(kind):
    page_kind = kinds()[kind]
    assert issubclass(page_kind.page, Page)
    assert page_kind.page.kind == kind
    assert "NAME" in page_kind.verb
    assert catalog.list_methods(kind=kind), "a kind without a page is not written"


def test_what_the_verbs_name_is_there_after_import_regard():
    """`regard.nn.Attention` and its like, in a process that has imported nothing else."""
    readme = Path(__file__).parents[1] / "README.md"
    text = readme.read_text(encoding="utf8") + "\n".join(k.verb for k in kinds().values())
    names = sorted(set(re.findall(r"(?<![\w./-])regard(?:\.[A-Za-z_]+)+(?=\()", text)))
    assert {"regard.attach", "regard.attend", "regard.nn.Attention"} <= set(names)
    code = "import regard\n" + "\n".join(f"assert callable({name}), {name!r}" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", kinds())
def test_skeleton_is_a_page_that_passes(kind, tmp_path, monkeypatch):
    """`regard new KIND NAME`: what a newcomer starts from is right before it is changed."""
    monkeypatch.setattr(catalog, "_registered", {})
    path = tmp_path / f"my_own_{kind}.py"
    path.write_text(skeleton(kind, path.stem))
    name = catalog.register(path)
    assert name in catalog.list_methods("my_own*", kind=kind)
    assert check_page(name)


def test_a_page_that_cannot_be_pickled_is_found():
    """A lambda in a page that is not the METHOD of its module."""
    with pytest.raises(AssertionError, match="window: cannot be pickled"):
        check_pickles("window", replace(catalog.get("window")))


def test_a_method_reaches_another_process(tmp_path):
    path = tmp_path / "method.pickle"
    path.write_bytes(pickle.dumps(catalog.method("window", window=3, ahead=1)))
    code = f"import pickle; m = pickle.load(open({str(path)!r}, 'rb')); print(m.label, m.page.looks_ahead(m.config))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "window(window=3, ahead=1) True\n"
