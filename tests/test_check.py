"""`regard check` on functions written for the test: sound ones pass clean, each fault is found, and found small.

The table of who can do which pattern, found by truncation, stands below."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from regard import catalog
from regard.core.shapes import PATTERNS
from regard.testing import check
from regard.testing.check import check_file
from regard.testing.mechanism import support_matrix, supported

FAULTY = Path(__file__).parent / "faulty"

CORRECT = [
    ("softmax", "causal_self", "softmax"),
    ("softmax", "causal_self", "softmax:scale=0.3"),
    ("sdpa", "causal_self", "softmax"),
    ("sdpa", "causal_self", None),
    ("windowed", "causal_self", None),
    ("linear", "causal_self", "linear_attention"),
    ("retention", "causal_self", None),
    ("padded", "self", "softmax"),
    ("padded", "cross", "softmax"),
    ("by_length", "self", "softmax"),
    ("by_length", "causal_self", "softmax"),
    ("by_length", "causal_cross", "softmax"),
    ("attention", "causal_self", None),
]

# fault, pattern, law, shortest length, what the counterexample says beside
FAULTS = [
    ("no_causal_mask", "causal_self", "causality", 2, {"token": 1}),
    ("looks_one_ahead", "causal_self", "causality", 2, {"token": 1}),
    ("window_off_by_one", "causal_self", "window", 2, {"window": 1, "found": [0, 1], "wanted": [1]}),
    ("window_without_itself", "causal_self", "window", 3, {"window": 2, "found": [2], "wanted": [1, 2]}),
    ("never_accumulates", "causal_self", "accumulates", 2, {"token": 0}),
    ("state_dropped", "causal_self", "segments", 2, {"at": [0, 0, 1, 0]}),
    ("state_dropped", "causal_self", "decode", 2, {"at": [0, 0, 1, 0]}),
    ("state_forgets_its_decay", "causal_self", "segments", 2, {}),
    ("gradient_cut", "causal_self", "gradients", 1, {"of": "q", "wanted": 0.0}),
    ("padding_attended", "causal_self", "padding left", 1, {}),
    ("padding_attended", "causal_self", "mask obeyed", 2, {}),
    ("lengths_one_too_many", "self", "padding right", 1, {"found": 1000.0}),
    ("normalised_over_the_batch", "causal_self", "batch", 2, {}),
    ("state_leaks_between_rows", "causal_self", "batch", 1, {}),
    ("overflow", "causal_self", "extremes", 1, {"found": "nan"}),
    ("blind_rows_are_nan", "causal_self", "blind rows", 1, {"found": "nan"}),
    ("low_precision_inside", "causal_self", "precision", 8, {"dtype": "bfloat16"}),
    ("float16_by_way_of_float8", "causal_self", "precision", 3, {"dtype": "float16"}),
    ("scaled_after_the_product", "causal_self", "extremes", 4, {"found": "nan"}),
    ("triangle_of_the_first_keys", "causal_self", "last queries", 2, {"at": [0, 0, 0, 0]}),
    ("kv_heads_in_the_wrong_order", "causal_self", "groups", None, {}),
    ("padding_shown_again", "causal_self", "padded state", None, {}),
    ("changes_its_input", "causal_self", "pure", 1, {"of": "q"}),
    ("needs_even_lengths", "causal_self", "lengths", 1, {}),
    ("chunk_forgets_the_last", "causal_self", "accumulates", 65, {"token": 63}),
    ("triangle_in_cross", "causal_cross", "reach", 1, {"token": 1, "moved": {}}),
]


def row_of(report: check.CheckReport, law: str) -> dict:
    return next(row for row in report.rows if row["law"] == law)


@pytest.mark.parametrize(("name", "pattern", "against"), CORRECT)
def test_sound_functions_pass_clean(name, pattern, against):
    report = check_file(f"{FAULTY / 'correct.py'}:{name}", pattern, against)
    assert report.violated == []
    assert sum(row["verdict"] == "held" for row in report.rows) >= 7


@pytest.mark.parametrize(("name", "pattern", "law", "n", "facts"), FAULTS)
def test_a_fault_is_found_with_its_smallest_counterexample(name, pattern, law, n, facts):
    report = check_file(f"{FAULTY / 'faults.py'}:{name}", pattern)
    assert law in report.violated
    counterexample = row_of(report, law)["counterexample"]
    assert counterexample.get("n") == n
    assert {key: counterexample[key] for key in facts} == facts


def test_the_counterexample_names_the_outputs_that_moved():
    report = check_file(f"{FAULTY / 'faults.py'}:no_causal_mask")
    row = row_of(report, "causality")
    assert list(row["counterexample"]["moved"]) == [0, 1]
    assert row["said"].startswith(
        "n=2: no_causal_mask looks ahead: token 1 moves the output of query 0 before it"
    )


def test_against_a_page_finds_what_no_law_can():
    target = f"{FAULTY / 'faults.py'}:scaled_by_the_values"
    assert check_file(target).violated == []
    report = check_file(target, against="softmax")
    assert report.violated == ["equals", "equal gradients"]
    assert row_of(report, "equals")["counterexample"]["n"] == 2  # one key is the answer to every question


def test_a_function_in_float32_is_held_to_its_own_rounding():
    report = check_file(f"{FAULTY / 'correct.py'}:retention")
    assert 1e-7 < report.facts["tolerance"] < 1e-3
    assert check_file(f"{FAULTY / 'correct.py'}:softmax").facts["tolerance"] == 1e-9


def test_each_of_these_faults_breaks_its_law_alone():
    for fault in ("float16_by_way_of_float8", "scaled_after_the_product", "triangle_of_the_first_keys",
                  "kv_heads_in_the_wrong_order", "padding_shown_again"):  # fmt: skip
        law = next(law for name, _, law, *_ in FAULTS if name == fault)
        assert check_file(f"{FAULTY / 'faults.py'}:{fault}").violated == [law]


def test_float16_is_asked():
    report = check_file(f"{FAULTY / 'correct.py'}:softmax")
    assert report.facts["dtypes"] == ["float64", "float32", "bfloat16", "float16"]


def test_a_function_of_float64_alone_is_not_asked_in_low_precision():
    report = check_file(f"{FAULTY / 'correct.py'}:float64_alone")
    assert report.facts["dtypes"] == ["float64"]
    assert row_of(report, "extremes")["said"] == "it runs in float64 only"


def test_fewer_queries_than_keys_are_no_question_for_a_recurrence():
    row = row_of(check_file(f"{FAULTY / 'correct.py'}:retention"), "last queries")
    assert row["verdict"] == "not applicable"
    assert row["said"] == "its state has a fixed size: queries come with their keys"
    refused = row_of(check_file(f"{FAULTY / 'correct.py'}:softmax"), "groups")
    assert refused["said"].startswith("it refuses to be asked: RuntimeError")


def test_what_does_not_apply_says_why():
    report = check_file(f"{FAULTY / 'correct.py'}:sdpa")
    assert row_of(report, "padding left")["said"] == "it takes no mask"
    assert row_of(report, "decode")["said"] == "it returns no state"
    assert row_of(report, "window")["said"] == "no causal window"


def test_the_report_is_data_and_a_table():
    report = check_file(f"{FAULTY / 'faults.py'}:overflow", compiles=True)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["violated"] == ["extremes"] == report.violated
    assert {"law", "verdict", "means", "said", "counterexample"} == set(data["rows"][0])
    assert row_of(report, "compiles")["verdict"] == "held"
    console = Console(width=100, file=io.StringIO())
    console.print(report.table())
    assert "violated" in console.file.getvalue()


@pytest.mark.parametrize(
    ("target", "pattern", "against", "error", "message"),
    [
        ("correct.py", "self", None, ValueError, "FILE.py:function"),
        ("corect.py:softmax", "self", None, KeyError, "near names: correct.py"),
        ("nowhere/at/all.py:f", "self", None, ValueError, "there is no file"),
        ("correct.py:sofmax", "self", None, KeyError, "near names: softmax"),
        ("correct.py:softmax", "sel", None, KeyError, "near names: self"),
        ("correct.py:softmax", "self", "sofmax", KeyError, "near names: softmax"),
        ("correct.py:softmax", "self", "softmax:scal=1", ValueError, "near names: scale"),
        ("correct.py:softmax", "self", "h2o", ValueError, "compared with a mechanism"),
        ("faults.py:needs_a_gate", "self", None, ValueError, "needs 'gate', and the check can give only q, k, v"),
        ("faults.py:causal_from", "self", None, ValueError, "needs 's'"),
        ("faults.py:raises", "self", None, ValueError, r"RuntimeError: .* \(faults.py:\d+: return q @ k\)"),
        ("faults.py:wrong_shape", "self", None, ValueError, r"returns \[2, 7, 2, 4\], out is \[B, H, N, E\]"),
        ("cannot_import.py:f", "self", None, ValueError, r"imported: ZeroDivisionError.*\(cannot_import.py:3"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_says_why(target, pattern, against, error, message):
    with pytest.raises(error, match=message):
        check_file(str(FAULTY / target), pattern, against)


def looks_ahead(q, k, v, cfg, call):
    """One key ahead in causal_self; queries that speak in causal_cross; cross of as many queries as keys only."""
    pattern = call.pattern
    if pattern == "cross" and q.shape[2] != k.shape[2]:
        raise ValueError("as many queries as keys")
    q = q + q.mean(2, keepdim=True) if pattern == "causal_cross" else q
    sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    sees = sees.tril(1) if pattern == "causal_self" else sees
    return (q @ k.mT).masked_fill(~sees, -torch.inf).softmax(-1) @ v, None


def test_support_is_found_by_truncating():
    page = replace(catalog.get("softmax"), reference=looks_ahead, fast=None, init=None)
    answers = supported(page)
    assert answers["self"] == "yes"
    assert answers["causal_self"].startswith("leaks: reference, 9 tokens cut after 1: query 0 changes by")
    assert answers["cross"] == "fails: ValueError: as many queries as keys"
    assert answers["causal_cross"].startswith("leaks: reference, 9 tokens cut after 1")
    allowed = replace(page, exempt={"influence": "one token ahead is the method"})
    assert supported(allowed)["causal_self"] == "leaks by design: one token ahead is the method"


def test_support_matrix_has_a_row_for_every_mechanism():
    rows = support_matrix()
    assert [row["mechanism"] for row in rows] == catalog.list_methods(kind="mechanism")
    assert {"mechanism": "softmax", **dict.fromkeys(PATTERNS, "yes")} in rows
    words = {row[pattern].split(":")[0] for row in rows for pattern in PATTERNS}
    assert words <= {"yes", "no", "leaks by design"}
