"""Existing is being tested: every page of the catalogue passes the checks that its kind names."""

import pickle
import re
import subprocess
import sys
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from regard import catalog
from regard.core import Method, Page
from regard.kinds import kinds, skeleton
from regard.testing import block, cache, mask, mechanism, pictures, position, task
from regard.testing.cache.script import STEPS
from regard.testing.case import Case, NotApplicable
from regard.testing.laws import CHECKS, GRID_CHECKS
from regard.testing.laws.equality import equal_paths, equal_under_masks
from regard.testing.laws.heads import check_groups
from regard.testing.pages import check_kind, check_page, check_pickles, check_whatever_its_kind
from regard.testing.zoo import build

# one of each sort: what scores, what merges, what quantises, what reads a part, what attends by itself
ONE_OF_EACH = ("snapkv", "d2o", "kivi", "tokenselect", "sparq")


def cache_in_short(name):
    """The laws of a cache page that cost least, on the first family that it acts on, under one budget.

    Searches and samples, a third of the time, and what an attention of its own reads, are asked of one of each sort.
    """
    method = catalog.method(name, **cache.small(catalog.get(name)))
    family = next(f for f in cache.FAMILIES if cache.movable(method, build(f)[0]))
    assert cache.check_oracle(method, family) > 1e-3, f"{name} changes nothing on {family}"
    cache.check_rows(method, family, steps=STEPS[:6])
    cache.check_neutral(method, family)
    cache.check_bytes(method, family)
    if method.page.across:  # layers whose windows slide have a budget of their own
        cache.check_neutral(method, "gemma3")
    if method.page.reread is not None:
        cache.check_oracle(method, "falconh1")
    if name in ONE_OF_EACH:
        cache.check_generation(method, family)
    if any(field.name == "budget" for field in fields(method.config)):
        cache.check_budget(method, family, 8, method.page.reads_generated)
        if name in ONE_OF_EACH:
            cache.check_attention_budget(method, family, 8)


def mechanism_in_short(name):
    """Every law of a mechanism but those asked once, on its first pattern; that its paths agree on the others.

    Under further settings that heads share what they share.
    """
    page = catalog.get(name)
    cases = [Case(page, first_settings(page), pattern) for pattern in page.patterns]
    hold_in_short(cases[0], with_grids(page, CHECKS))
    for case in cases[1:]:
        hold_in_short(case, [check_paths_agree])
    for settings in page.test_settings[1:]:
        hold_in_short(replace(cases[0], cfg=page.configure(**settings)), [check_groups])


def check_paths_agree(case):
    """Fast and reference on a short text under every mask, and on a longer one without."""
    if case.page.fast is None:
        raise NotApplicable("no fast path")
    equal_under_masks(case, case.inputs(7, 10), "n=7")
    equal_paths(case, case.inputs(65, 68), "n=65")


def block_in_short(name):
    """Every law of a block but torch.compile's, as the last layer where it differs by depth."""
    page = catalog.get(name)
    cfg = first_settings(page, **block.depths(page)[-1])
    hold_in_short(block.BlockCase(page, cfg, page.pattern), with_grids(page, block.CHECKS))


def first_settings(page, **more):
    return page.configure(**dict(*page.test_settings[:1]), **more)


def with_grids(page, checks):
    return (*checks, *(GRID_CHECKS if page.grid else ()))


def hold_in_short(case, checks):
    asked = [check for check in checks if check not in mechanism.ONCE]
    report = {f"{mechanism.law_of(check)}, {case.pattern}": mechanism.verdict(check, case) for check in asked}
    assert "held" in report.values(), report
    mechanism.hold_all(case.page, report)


def pictures_in_short(name):
    """All laws on one family that the page reaches; pages that follow each other begin with another one."""
    with pictures.few_families(1, first=[*BRIEF].index(name)):
        return check_kind(name, catalog.get(name))


def mask_in_short(name):
    """Every law of a mask on one text, under two odd settings and the first that the page tries."""
    hold_mask_in_short(catalog.get(name))


def hold_mask_in_short(page):
    asked = (*islice(mask.odd_settings(page), 2), *page.test_settings[:1])
    assert mask.hold_laws(page, [page.config(**settings) for settings in asked], lengths=(40,))
    mask.check_neutral(page)


def position_in_short(name):
    """Every law of positions under the default and one odd settings, and their mask in short."""
    page = catalog.get(name)
    for settings in ({}, *islice(mask.odd_settings(page), 1)):
        position.hold_laws(page, page.configure(**settings))
    position.check_plain_text(page)
    if page.build is not None:
        hold_mask_in_short(page)


def task_in_short(name):
    """Every law of a task under its default settings."""
    page = catalog.get(name)
    assert "held" in task.check_task(Method(name, page, page.config())).values()


# kinds whose pages take seconds each, and what is asked of them where these seconds are too many
IN_SHORT = {
    "block": block_in_short,
    "cache": cache_in_short,
    "mask": mask_in_short,
    "mechanism": mechanism_in_short,
    "position": position_in_short,
    "steering": pictures_in_short,
    "task": task_in_short,
    "tokens": pictures_in_short,
}
BRIEF = {name: kind for kind in IN_SHORT for name in catalog.list_methods(kind=kind)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in BRIEF)) for name in catalog.pages()]
)
def test_page(name):
    report = check_page(name)
    assert report, f"{name}: nothing was checked"


@pytest.mark.short
@pytest.mark.parametrize("name", BRIEF)
def test_page_in_short(name):
    check_whatever_its_kind(name, catalog.get(name))
    IN_SHORT[BRIEF[name]](name)


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
