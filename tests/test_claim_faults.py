"""Quick claims come out as they are recorded, and each is known to fail on a planted fault.

The faults stand in mutants/claims.toml. What a clock decides is not asked here, so that clocks run for two rounds only.
"""

import sys
import tomllib
from pathlib import Path

import pytest

from regard.claims import lab, ledger
from regard.core import Measured
from regard.core.claim import TIME

QUICK = 12  # seconds
# each 2 to 12 s on one core, beside a network of digits and a model of diffusion, trained once; all others take 28 s
LONG = {"active_dormant_heads", "attention_debias_pruning", "attnattrib", "chm_corr_plus_plus",
        "cot_overthinking_tasks", "cx_tom", "diffquickfix", "dsf", "ee_mllm", "fmri_motion_decoding",
        "illama", "ir_diffusion", "landmark_attention", "longlive", "mesa_optimizer_ar", "moa_spans",
        "pavlovian_attention", "prime_composer", "razor_attention", "recycled_attention", "right_mediator",
        "salient_relevance", "scan_and_snap", "tidaldecode", "tokenselect", "var", "vhd_vhr", "vista",
        "zoology_mqar"}  # fmt: skip
# the same measurement in a shorter form: constants of the claim's file, fewer seeds, widths, texts, scenes or steps
SHORT = {
    "active_dormant_heads": {"SEEDS": (0,), "STEPS": 250, "BATCH": 32, "MOMENTS": (), "PIECES": 1},
    "chm_corr_plus_plus": {"SEEDS": (0,), "USERS": (0,)},
    "cot_overthinking_tasks": {"GRAMMARS": 1, "MORE": ()},
    "cx_tom": {"EXACT_IMAGES": 4},
    "ee_mllm": {"SEEDS": (0,), "STEPS": 250},
    "fmri_motion_decoding": {"SEEDS": (0,), "SHUFFLES": 2},
    "illama": {"SEEDS": (0,), "RATES": (2e-3,), "STEPS": 100, "BESIDE": ()},
    "ir_diffusion": {"SCENES": 6, "STEPS": 8},
    "landmark_attention": {"SEEDS": (0,), "STEPS": 150, "TESTED": 128, "BLOCKS": 12},
    "longlive": {"SEEDS": (0,), "STEPS": 40, "VIDEOS": 8},
    "mesa_optimizer_ar": {
        "STEPS": 200,
        "BATCH": 32,
        "TESTED": 128,
        "LENGTH": 60,
        "RATES": {"gaussian": 0.002, "sparse": 0.1},
    },
    "moa_spans": {
        "LENGTHS": (96, 192),
        "LONGER": 288,
        "ENTRIES": 40,
        "SHORT": 96,
        "PROFILED": 4,
        "JUDGED": 12,
        "BLOCK": 4,
        "SINKS": 4,
    },
    "pavlovian_attention": {"WIDTHS": (16, 32, 64)},
    "prime_composer": {"SCENES": 8, "STEPS": 8},
    "rectified_spaattn": {"FIELDS": 2},
    "right_mediator": {"PERMUTATIONS": 2000, "COUNT": 16},
    "salient_relevance": {"SEEDS": (2,), "STEPS": 100, "DRAWS": 3},
    "scan_and_snap": {"SEEDS": (0,), "BESIDE": {}},
    "vhd_vhr": {"TEXTS": 32},
    "vista": {"TEXTS": 32, "DRAWS": 2},
    "zoology_mqar": {"RATES": (1e-2,), "STEPS": 100, "TESTED": 32, "LENGTH": 64, "PAIRS": 8},
}
LAW = "tests/test_claim_faults.py::test_the_claim_holds["
FAULTS = tomllib.loads((Path(__file__).parent / "mutants" / "claims.toml").read_text(encoding="utf8"))[
    "fault"
]
LAWS = [law for fault in FAULTS for law in fault.get("law", ())]
NAMES = sorted({law.removeprefix(LAW).removesuffix("]") for law in LAWS if law.startswith(LAW)})


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
    "name", [pytest.param(name, marks=[pytest.mark.claims] * (name in LONG)) for name in NAMES]
)
def test_the_claim_holds(name, shorter, short_clocks):
    """Or is contradicted in the parts that it names, as is recorded of the first of its models."""
    claim, recorded = shorter(name), ledger.recorded()[name][0]
    model = recorded.get("model")
    found = claim.measure(*([] if model is None else [model]))
    steady = {part: holds for part, holds in found.parts.items() if not part.startswith(TIME)}
    assert steady, "some part of the bound that no clock decides"
    assert claim.verdict(Measured.by(steady, found.numbers), model) == recorded["verdict"], found
