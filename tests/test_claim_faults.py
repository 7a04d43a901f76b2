"""Quick claims come out as they are recorded, and each is known to fail on a planted fault.

The faults stand in mutants/claims.toml. What a clock decides is not asked here, so that clocks run for two rounds only.
"""

import tomllib
from pathlib import Path

import pytest

from regard.claims import lab, ledger
from regard.core import Measured
from regard.core.claim import TIME

QUICK = 12  # seconds
# 4 to 12 s on one core each, a minute together; all others take 28 s
LONG = {"attention_debias_pruning", "attnattrib", "diffquickfix", "razor_attention", "recycled_attention",
        "tidaldecode", "tokenselect", "var"}  # fmt: skip
LAW = "tests/test_claim_faults.py::test_the_claim_holds["
FAULTS = tomllib.loads((Path(__file__).parent / "mutants" / "claims.toml").read_text(encoding="utf8"))[
    "fault"
]
LAWS = [law for fault in FAULTS for law in fault.get("law", ())]
NAMES = sorted({law.removeprefix(LAW).removesuffix("]") for law in LAWS if law.startswith(LAW)})


@pytest.fixture
def short_clocks(monkeypatch):
    whole = lab.alternate
    monkeypatch.setattr(lab, "alternate", lambda sides, rounds, warm=1, **how: whole(sides, 2, 0, **how))


def test_every_quick_claim_is_known_to_fail_on_a_fault():
    first = {name: rows[0] for name, rows in ledger.recorded().items()}
    quick = {name for name, row in first.items() if row["verdict"] == "holds" and row["seconds"] < QUICK}
    assert len(quick) > 20 and quick <= {*NAMES}, quick - {*NAMES}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.claims] * (name in LONG)) for name in NAMES]
)
def test_the_claim_holds(name, short_clocks):
    """Or is contradicted in the parts that it names, as is recorded of the first of its models."""
    claim, recorded = ledger.claim(name), ledger.recorded()[name][0]
    model = recorded.get("model")
    found = claim.measure(*([] if model is None else [model]))
    steady = {part: holds for part, holds in found.parts.items() if not part.startswith(TIME)}
    assert steady, "some part of the bound that no clock decides"
    assert claim.verdict(Measured.by(steady, found.numbers), model) == recorded["verdict"], found
