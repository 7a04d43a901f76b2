"""The page of a report: its colours in light and dark, cards, how to apply what it names, what fits where."""

import ast
import html
import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from tests.golden import Page, golden
from tests.test_report import BUDGETS, HOSTILE, LENGTHS, TASKS, browse, fake_cell, fake_result, one, printed

import regard
from regard.bench.asked import parsed
from regard.bench.cell import Cell
from regard.bench.measuring import Bench
from regard.bench.told import told
from regard.report import Result, to_html, to_markdown
from regard.report.applied import advice, lines
from regard.report.cards import fact_list
from regard.report.folder import Folder
from regard.report.shades import DARK, VARIABLES, contrast

REPORT = Path(regard.__file__).parent / "report"
GROUNDS, TEXTS = ("page", "tint", "won", "warned"), ("ink", "soft", "faint", "accent", "bad", "good")


# Colours


@pytest.mark.parametrize("side", [0, 1])
def test_text_stands_out_on_every_ground(side):
    low = {
        (text, ground): contrast(VARIABLES[text][side], VARIABLES[ground][side])
        for text, ground in product(TEXTS, GROUNDS)
    }
    assert not {pair: ratio for pair, ratio in low.items() if ratio < 4.5 and pair[0] != "faint"}
    assert contrast(VARIABLES["faint"][side], VARIABLES["page"][side]) >= 4.5  # it stands on no other ground


def test_all_that_is_drawn_has_a_colour_in_the_dark():
    page = Page(fake_result())
    text = json.dumps(page.data["figures"])
    assert set(re.findall(r'"(#[0-9a-f]{6})"', text)) <= set(DARK)
    for red, green, blue in re.findall(r"rgba\((\d+),(\d+),(\d+),", text):
        assert "#" + "".join(f"{int(c):02x}" for c in (red, green, blue)) in DARK
    drawn = re.sub(r'<svg class="tile".*?</svg>', "", to_html(golden()))  # tiles are the same on both
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>|<p class=\"key\">.*?</p>", "", drawn, flags=re.S)
    assert set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{6})"', body)) <= set(DARK)
    assert not re.findall(r"#[0-9a-f]{3,6}\b|rgba?\(", (REPORT / "page.css").read_text(encoding="utf-8"))
    ink = [contrast(DARK[c], DARK["#ffffff"]) for c in DARK if contrast(c, "#ffffff") >= 4.5]
    assert min(ink) >= 2.5


SHADES = """
addEventListener("drawn", () => {
const out = {}, ground = (at) => getComputedStyle(document.querySelector(at)).backgroundColor;
const see = () => [ground("body"), ground("#cost-held .main-svg"),
  getComputedStyle(document.querySelector(".who .mark *")).fill, document.querySelectorAll("#cost-held .point").length];
document.querySelector("[data-method='1']").click();
const press = (value) => document.querySelector(`input[name=shade][value=${value}]`).click();
out.light = see(); press("dark"); out.dark = see();
dispatchEvent(new Event("beforeprint")); out.paper = see(); dispatchEvent(new Event("afterprint")); out.after = see();
press("light"); out.back = see();
document.body.dataset.outcome = JSON.stringify(out);
});
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(golden()), encoding="utf-8")
    return path


def outcome(dom: str) -> dict:
    assert 'data-script-errors="0"' in dom
    return json.loads(html.unescape(re.search(r'data-outcome="(.*?)"', dom).group(1)))


def test_the_switch_turns_page_drawings_and_plots(written, tmp_path):
    out = outcome(browse(written, tmp_path, SHADES))
    white, night = "rgb(255, 255, 255)", "rgb(21, 24, 27)"
    points = out["light"][3]
    assert out["light"] == [white, white, "rgb(17, 17, 17)", points] == out["back"]
    assert out["dark"] == [night, night, "rgb(244, 244, 240)", points] == out["after"]
    assert out["paper"][1] == white and out["paper"][3] == points  # the rest of paper is CSS for screens only
    assert points == 1 + 2 + 1 + 1  # full, beta, gamma and the ring: what was hidden stays so


# Cards


SPECS = ("snapkv:window=16", "snapkv", "snapkv+adakv:floor=0.1", "adakv", "streaming_llm", "window:window=64")


def cells(specs=SPECS, budget=0.25) -> list[Cell]:
    made = [Cell("full", "needle", 256)]
    for spec in specs:
        name, settings = parsed(spec)
        has = regard.catalog.takes_budget(name)
        made.append(Cell(name, "needle", 256, budget if has else None, settings))
    return made


def result_of(made: list[Cell], **more) -> Result:
    rows = [
        one(
            c.method,
            None if c.budget is None else c.budget.value,
            label=c.label,
            **(more if c.method != "full" else {}),
        )
        for c in made
    ]
    return Result({"model": "small", **json.loads(json.dumps(told(made)))}, rows)


def test_each_name_leads_to_the_card_of_its_method():
    page = Page(result_of(cells()))
    cards = {card.attributes["id"]: card for card in page.sections["The methods"].all("details", "method")}
    assert len(cards) == 5  # snapkv has one under both settings
    for row in page.table("All methods")[1:]:
        (link,) = row["Method"].all("a")
        card = cards[link.attributes["href"].removeprefix("#")]
        assert card.all("summary")[0].text.split()[0] == row["Method"].text.split("(")[0]
        for head in ("Paper", "Idea", "Cost", "Caveat"):
            assert head in [dt.text for dt in card.all("dt")]
    both = next(card for card in cards.values() if card.all("summary")[0].text.startswith("snapkv+adakv"))
    assert [h.text for h in both.all("h4")] == ["SnapKV", "Ada-KV"]
    assert 'with regard.attach(model, "snapkv+adakv", **{"adakv.floor": 0.1}, budget=0.25):' in both.text
    titles = {b.text: b.attributes.get("title") for b in page.root.all("nav")[0].all("button")}
    assert titles["snapkv(window=16)"] == "SnapKV"


def test_runs_without_cards_are_drawn_and_hostile_cards_are_escaped():
    assert "The methods" not in Page(fake_result()).sections
    result = result_of(cells(["snapkv"]))
    result.run["cards"]["snapkv"] |= dict.fromkeys(("title", "idea", "caveat", "paper"), HOSTILE)
    assert HOSTILE not in to_html(result) and "&lt;script&gt;" in to_html(result)


def test_a_paper_is_said_with_its_year_once():
    for said in ("Some paper", "Some paper (2021)", "Some paper of 1987"):
        result = result_of(cells(["snapkv"]))
        result.run["cards"]["snapkv"] |= {"paper": said, "year": 2021}
        wanted = said if said != "Some paper" else "Some paper (2021)"
        assert f"<dd>{wanted}</dd>" in to_html(result)


def test_only_the_paper_of_a_card_is_a_link():
    said = "as arXiv:2404.14469 says"
    page = fact_list({"paper": said, "idea": said, "cost": said, "caveat": said})
    link = '<a href="https://arxiv.org/abs/2404.14469" rel="noreferrer">arXiv:2404.14469</a>'
    assert f"<dt>Paper</dt><dd>as {link} says</dd>" in page and page.count("<a ") == 1
    assert page.count(f"<dd>{said}</dd>") == 3


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_middle_budget_is_shown_where_none_is_the_best(count, monkeypatch):
    monkeypatch.setattr(Result, "winner", lambda self: None)
    budgets = [0.1 * (i + 1) for i in range(count)]
    page = to_html(Result({}, [one(), *(one("snapkv", b) for b in budgets)]))
    checked = re.findall(r'name="budget" value="(\d+)" checked', page)
    assert checked == [str(count // 2)]


def test_a_grown_run_has_the_cards_of_both_starts(tmp_path):
    grows = ("methods",)
    for spec in ("snapkv:window=16", "h2o"):
        made = cells([spec])
        settings = {"methods": sorted({c.label for c in made})}
        Folder(tmp_path / "run").open(
            {"settings": settings, "cells": [c.key for c in made], **told(made)}, grows
        )
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(run["cards"]) == {"snapkv", "h2o"} and set(run["attached"]) == {"snapkv(window=16)", "h2o"}


# How to apply it


@pytest.fixture(scope="module")
def shipped():
    return regard.load_shipped("lm")


APPLIED = [("snapkv:window=16", 0.25), ("snapkv+adakv:floor=0.1", "64KB"), ("streaming_llm:sinks=2", 48),
           ("quest", 0.5), ("window:window=32", None), ("block_topk:top_k=2,block_q=16,block_k=16", None),
           ("block_topk:target=mass:0.9", None)]  # fmt: skip


@pytest.mark.parametrize(("spec", "budget"), APPLIED)
def test_the_printed_lines_attach_what_was_measured(spec, budget, shipped, monkeypatch):
    model, tokenizer = shipped
    made = cells([spec], budget)
    result = result_of(made)
    (said,) = advice(result)
    text = said.lines
    seen = []
    real = regard.attach
    monkeypatch.setattr(
        regard, "attach", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1], raising=False
    )
    ids = torch.randint(5, 200, (1, 96), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    known = {"model": model, "inputs": inputs, "tokenizer": tokenizer}
    exec("\n".join(text).replace("max_new_tokens=100", "max_new_tokens=4, do_sample=False"), known)
    assert known["out"].shape == (1, 100)
    ours = real(model, Bench(model, tokenizer).method_of(made[1]))
    assert acting(seen[0]) == acting(ours)


def acting(attachment) -> list:
    """What acts, by the name and settings of its method, by layer where layers have their own."""
    found = []
    for actor in attachment.actors:
        method = getattr(actor, "method", None) or getattr(actor, "converted", None)
        found.append(
            (
                type(actor).__name__,
                str(getattr(method, "method", method)).replace("'", ""),
                getattr(method, "by_layer", None),
            )
        )
    return found


def test_the_winner_and_what_the_questions_name_are_told_once_each():
    said = advice(golden())
    assert [(a.why, a.name) for a in said] == [
        ("Cheapest at 95 %, best at half the bytes, fastest decode at 95 %", "alpha @ 512 tok")
    ]
    assert 'with regard.attach(model, "alpha", budget=512):' in said[0].lines
    page = Page(golden())
    assert list(page.sections)[-1] == "How to apply it"
    assert "```python\nimport regard" in to_markdown(golden())
    assert not lines(
        golden(), {"label": "alpha(a=b, c)", "budget": 1}
    )  # an old run does not say its settings
    assert not lines(golden(), {"label": HOSTILE, "budget": 1})


def test_a_method_that_asks_in_words_is_given_the_tokenizer():
    told_of = told([Cell("kvzip", "needle", 96, 0.25), Cell("snapkv", "needle", 96, 0.25)])["attached"]
    assert [told_of[name].get("words") for name in ("kvzip", "snapkv")] == [True, None]
    said = lines(Result({"attached": told_of}, []), {"label": "kvzip", "budget": 0.25})
    assert 'with regard.attach(model, "kvzip", budget=0.25, tokenizer=tokenizer):' in said


@pytest.mark.parametrize("width", [40, 60, 100])
def test_the_lines_of_the_terminal_are_python(width):
    result = result_of(cells(["snapkv:window=16+adakv:floor=0.1"]))
    text = printed(result, width)
    assert max(map(len, text.splitlines())) <= width
    code = text[text.index("with regard.attach") :]
    (call,) = (item.context_expr for item in ast.parse(code).body[0].items)
    assert ast.unparse(call.args[1]) == "'snapkv+adakv'" and len(call.keywords) == 3


# The table


def test_scoring_is_a_share_of_full_attentions_prefill():
    """Full attention's prefill takes 30 ms / 1.5 = 20 ms."""
    more = {"scoring_ms": 6.0, "prefill_ms": 30.0, "prefill_ratio": 1.5, "calibration_s": 1.25}
    result = result_of(cells(["snapkv"]), **more)
    row = Page(result).table("All methods")[1]
    assert (row["Scoring"].text, row["Calibrated"].text) == ("30 %", "1.25 s")
    assert float(row["Scoring"].attributes["data-value"]) == pytest.approx(0.3)
    assert "| 30 % | 1.25 s | 0 |" in to_markdown(result)
    none = result_of(cells(["snapkv"]))
    assert "Scoring" not in Page(none).table("All methods")[0] and "scoring" not in to_markdown(none)


FITS = """
addEventListener("drawn", () => {
const box = document.querySelector(".results").parentElement, out = { over: box.scrollWidth - box.clientWidth };
out.page = document.documentElement.scrollWidth - innerWidth;
document.body.dataset.outcome = JSON.stringify(out);
});
"""


def test_every_column_fits_at_1280(tmp_path):
    import random

    rng, rows = random.Random(0), []
    for label, (task, length) in product(
        ["full", "a_rather_long_method_name(window=64, sinks=8)"], product(TASKS, LENGTHS)
    ):
        for budget in [None] if label == "full" else BUDGETS:
            known = fake_cell(rng, "full", budget, task, length)
            known |= {
                "label": label,
                "method": label.partition("(")[0],
                "key": f"{label}{budget}{task}{length}",
            }
            rows.append(known | {"scoring_ms": 3.0, "calibration_s": 12.5})
    rows.append({**rows[-1], "key": "lost", "status": "memory", "length": 4096})
    path = tmp_path / "report.html"
    path.write_text(to_html(Result({}, rows)), encoding="utf-8")
    out = outcome(browse(path, tmp_path, FITS))
    assert out["over"] <= 0 and out["page"] <= 0


def test_the_terminal_at_60_columns_cuts_nothing():
    """Every table has whole heads, whole names and whole numbers; a long name has its settings in the next line."""
    result = fake_result()
    for row in result.rows:
        if row["label"] == "snapkv":
            row |= {"label": "snapkv(window=16, pool=5)"}
    text = printed(result, 60)
    lines = [line.strip() for line in text.splitlines()]
    rulers = [i for i, line in enumerate(lines) if line and set(line) == {"─"}]
    heads = [lines[i - 1].split() for i in rulers]
    assert all(head[:2] == ["method", "budget"] for head in heads)
    costs = ["quality", "●", "held", "read", "decode", "prefill", "failed"]
    assert [h for head in heads for h in head[2:]] == [*costs, *TASKS_IN_ORDER]
    assert sum(line.startswith("expected_attention ") for line in lines) == 3 * len(rulers)
    assert sum(line.startswith("snapkv ") for line in lines) == 3 * len(rulers) and "…" not in text
    for at, head in zip(rulers, heads, strict=True):
        row = next(line for line in lines[at:] if line.startswith("expected_attention"))
        numbers = len(re.findall(r"[\d.]+(?: %|×)", row))
        assert numbers == 1 + sum(h not in ("●", "failed") for h in head[2:])


TASKS_IN_ORDER = sorted(TASKS)


def test_a_usual_run_takes_less_than_two_megabytes():
    """8 methods × 3 budgets × 3 tasks × 3 lengths, each with a card."""
    result = fake_result()
    names = ["h2o", "snapkv", "streaming_llm", "quest", "tova", "keydiff", "knorm", "expected_attention"]
    rows = [row for row in result.rows if row["label"] in ("full", *names)]
    assert len({row["label"] for row in rows}) == 9
    page = to_html(Result(result.run | told(cells(names)), rows)).encode()
    assert len(page) < 2_000_000
