"""Quick claims come out as they are recorded, and each is known to fail on a planted fault.

The faults stand in mutants/claims.toml and claims_longer.toml, shorter forms of measurements in shorter_claims.py.
What a clock decides is not asked here, so that clocks run for two rounds only.
"""

import sys
import tomllib
from pathlib import Path

import pytest
from tests.shorter_claims import SHORT

from regard.claims import lab, ledger
from regard.core import Measured
from regard.core.claim import TIME

QUICK = 12  # seconds
# each 2 to 12 s on one core, beside a network of digits and a model of diffusion, trained once; all others take 28 s
LONG = {"active_dormant_heads", "attention_debias_pruning", "attnattrib", "chm_corr_plus_plus",
        "cot_overthinking_tasks", "cx_tom", "diffquickfix", "dsf", "ee_mllm", "fmri_motion_decoding",
        "illama", "ir_diffusion", "landmark_attention", "longlive", "medusa", "mesa_optimizer_ar", "moa_spans",
        "pavlovian_attention", "prime_composer", "razor_attention", "recycled_attention", "right_mediator",
        "salient_relevance", "scan_and_snap", "tidaldecode", "tokenselect", "var", "vhd_vhr", "vista",
        "zoology_mqar"}  # fmt: skip
# parts that are noted as failing, and that a shorter form is too short to see fail
HOLD_IN_SHORT = {"jrt": {"softmax little"}}
LAW = "tests/test_claim_faults.py::test_the_claim_holds["
FILES = [Path(__file__).parent / "mutants" / f"{name}.toml" for name in ("claims", "claims_longer")]
FAULTS = [tomllib.loads(path.read_text(encoding="utf8"))["fault"] for path in FILES]


def named(faults):
    """Claims that are to fail under these faults."""
    laws = [law for fault in faults for law in fault.get("law", ())]
    return {law.removeprefix(LAW).removesuffix("]") for law in laws if law.startswith(LAW)}


NAMES = sorted(named(FAULTS[0] + FAULTS[1]))


@pytest.fixture
def shorter(monkeypatch):
    """A claim whose measurement has a shorter form, in it."""

    def of(name):
        claim = ledger.claim(name)
        for constant, value in SHORT.get(name, {}).items():
            monkeypatch.setattr(sys.modules[claim.measure.__module__], constant, value)
        return claim

    return of


@pytest.fixture
def short_clocks(monkeypatch):
    whole = lab.alternate
    monkeypatch.setattr(lab, "alternate", lambda sides, rounds, warm=1, **how: whole(sides, 2, 0, **how))


def test_every_quick_claim_is_known_to_fail_on_a_fault():
    first = {name: rows[0] for name, rows in ledger.recorded().items()}
    quick = {name for name, row in first.items() if row["verdict"] == "holds" and row["seconds"] < QUICK}
    assert len(quick) > 20 and quick <= {*NAMES}, quick - {*NAMES}
    assert LONG | {*SHORT} <= {*NAMES}, "a longer claim is run for its fault"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.claims] * (name in LONG | named(FAULTS[1]))) for name in NAMES],
)
def test_the_claim_holds(name, shorter, short_clocks):
    """Or is contradicted in just the parts that it names, as is recorded of the first of its models."""
    claim, recorded = shorter(name), ledger.recorded()[name][0]
    model = recorded.get("model")
    found = claim.measure(*([] if model is None else [model]))
    steady = Measured.by(
        {p: holds for p, holds in found.parts.items() if not p.startswith(TIME)}, found.numbers
    )
    assert steady.parts, "some part of the bound that no clock decides"
    # a broken measurement may also make a part hold that is recorded as failing
    noted = {p for p in claim.parts_that_fail(model) if not p.startswith(TIME)}
    assert steady.failing == noted - HOLD_IN_SHORT.get(name, set()), found
    assert claim.verdict(steady, model) == recorded["verdict"], found
