"""The page of an explanation: its sentence on hand-made findings, hostile text, missing parts, size, and a browser."""

import copy
import html
import json
import random
import re
import time

import pytest
from rich.cells import cell_len
from tests.explained import EVIL, curve, fake, hostile, interval
from tests.test_report import HOSTILE, browse, plotly_source

from regard.report import explanation_page, explanation_snippet, explanation_text
from regard.report.explained_check import leaves
from regard.report.explained_words import notes, plain, sentences, visible


def told(found) -> str:
    return plain(" ".join(sentences(found)))


# The sentence


def test_heads_that_stand_out_are_named_beside_their_control():
    said = told(fake())
    assert said.startswith(
        "The answer ' Paris' over ' Rome' rests on layer 3 head 2 (0.41 of the effect, 95 % 0.35 to"
    )
    assert (
        "and layer 6 head 7 (0.22" in said and "layer 10 head 1" not in said
    )  # its 0.06 is the control's upper end
    assert (
        "the control (5 random heads of the same layers, 20 draws) carries 0.02, 95 % −0.02 to 0.06." in said
    )
    assert "Against it works layer 11 head 0 (−0.17" in said
    assert "Of the text, ' Paris' weighs most (by gradient)" in said
    assert said.endswith("falls by 2.90, 95 % 2.70 to 3.10, without 4 at random by 0.10, 95 % −0.10 to 0.30.")


def test_a_control_as_strong_and_an_interval_with_0_are_said():
    found = fake() | {"controls": [{"name": "random heads", **interval(0.5, 0.1), "control": True}]}
    found["heads"] = [h for h in found["heads"] if h["mean"] > 0]
    assert "no head stands out from its control. The strongest, layer 3 head 2, carries 0.41 of" in told(
        found
    )
    assert "rests on" not in told(found)
    weak = fake() | {"heads": [{"layer": 1, "head": 0, **interval(0.03, 0.05)}], "controls": []}
    assert "no head stands out from 0. The strongest, layer 1 head 0, carries 0.03" in told(weak)
    assert "(an interval that includes 0); no control was measured." in told(weak)
    alone = fake() | {"heads": [{"layer": 1, "head": 0, "mean": 0.4, "low": None, "high": None}]}
    alone["controls"] = alone["controls"][1:]
    assert "0.40 of the effect, no interval, so nothing is said about chance" in told(alone)
    negative = fake() | {"controls": []}
    negative["heads"] = [h for h in negative["heads"] if h["mean"] < 0.1]
    assert "no head stands out for it" in told(negative) and "Against it works layer 11 head 0" in told(
        negative
    )


def test_many_small_heads_count_together():
    found = fake()
    found["heads"] = [{"layer": 1, "head": j, **interval(0.05, 0.06)} for j in range(4)]
    assert "rests on no single head that stands out; top 5 heads together carry 0.78 of the effect" in told(
        found
    )


def test_a_group_within_its_control_does_not_count():
    found = fake()
    found["heads"] = [{"layer": 1, "head": j, **interval(0.05, 0.06)} for j in range(4)]
    found["controls"] = [
        {"name": "top 5 heads together", **interval(0.05, 0.1)},
        {"name": "random heads", **interval(0.02, 0.04), "control": True},
    ]
    said = told(found)
    assert "no head stands out from its control" in said and "together" not in said.split(";")[0]


def test_tokens_no_better_than_random_ones_are_said():
    found = fake()
    found["sources"][0]["drop"] = curve([1, 2, 4, 8], [0.1, 0.1, 0.2, 0.2], 0.2)
    assert told(found).endswith(
        "without 4 at random by 0.10, 95 % −0.10 to 0.30: the two do not stand apart."
    )


def test_what_weakens_the_numbers_is_noted():
    assert not notes(fake())
    said = " ".join(map(plain, notes(fake() | {"clean": -1.0, "corrupt": 0.5, "pairs": 2})))
    assert (
        "the model prefers ' Rome'" in said
        and "does not lower the logit difference" in said
        and "2 pairs" in said
    )
    found = fake()
    found["effects"]["spearman"] = 0.3
    assert "agree little" in notes(found)[0]


# What is missing, and what is wrong


PARTS = {
    "sources": ("The text", "Which scores to trust"),
    "effects": ("Where in the model",),
    "heads": ("Top heads",),
    "controls": ("Controls",),
    "graph": ("The circuit",),
    "faithfulness": ("How much of the model the circuit is",),
    "tested": ("What was tested",),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("gone", ["absent", "null", "empty"])
def test_a_part_that_is_missing_leaves_no_heading(part, gone):
    found = fake(tokens=40)
    found[part] = None if gone == "null" else type(found[part])()
    found = {key: value for key, value in found.items() if key != part or gone != "absent"}
    page = explanation_page(found)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [h for name, own in PARTS.items() if name != part for h in own]
    assert explanation_text(found, 80) and explanation_snippet(found)
    ids = set(re.findall(r'<div class="plot" id="(.*?)"', page))
    assert set(json.loads(re.search(r'id="report-data">(.*?)</script>', page)[1])["figures"]) == ids


def test_the_least_that_can_be_explained():
    found = {"tokens": ["a"], "target": "b"}
    assert "neither heads nor tokens were measured" in explanation_page(found)
    assert "<table" not in explanation_snippet(found) and explanation_text(found, 80)


def test_optional_fields_inside_of_parts():
    found = fake(tokens=40) | {"foil": None, "metric": "log probability"}
    found["effects"] |= {
        "mlp": None,
        "normalised": False,
        "spearman": None,
        "exact": None,
        "low": None,
        "high": None,
    }
    found["sources"] = [s | {"lds": None, "drop": None} for s in found["sources"]]
    found["heads"] = [h | {"why": None, "attention": None, "low": None, "high": None} for h in found["heads"]]
    found["faithfulness"] |= {"low": None, "high": None, "cpr": None}
    page = explanation_page(found)
    assert "Which scores to trust" not in page and "<details" not in page.partition("Controls</h2>")[0]
    assert "The answer <bdi>&#x27; Paris&#x27;</bdi>: " in page or "over" not in sentences(found)[0]


def spoiled(field: str, value: float):
    """Everything, with one number replaced."""
    found = fake(tokens=40)
    at = found
    *path, last = [int(p) if p.isdigit() else p for p in re.findall(r"\w+", field)]
    for step in path:
        at = at[step]
    at[last] = value
    return found


def test_a_number_that_is_not_finite_is_an_error_that_names_its_field():
    numbers = [f for f, v in leaves(fake(tokens=40), "") if isinstance(v, float)]
    assert len(numbers) > 500
    for field in [*random.Random(1).sample(numbers, 40), "clean", "faithfulness.cpr"]:
        for value in (float("nan"), float("inf")):
            for write in (explanation_page, explanation_snippet, lambda found: explanation_text(found, 80)):
                with pytest.raises(ValueError, match=r"every number is finite") as error:
                    write(spoiled(field, value))
                assert f"field={field!r}" in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("sources", 0, "scores"), [0.1], "sources[0].scores"),
        (("sources", 0, "scores", 3), "0.5", "sources[0].scores[3]"),
        (("sources", 1, "drop", "low"), [0.1], "sources[1].drop.low"),
        (("sources", 1, "drop", "k"), [1, 4, 2, 8], "places rise"),
        (("heads", 0, "attention", "weights"), [1.0], "heads[0].attention.weights"),
        (("effects", "mean", 2), [1.0], "effects.mean[2]"),
        (("effects", "mlp", "low"), [1.0], "effects.mlp.low"),
        (("graph", "edges", 0, "to"), "nobody", "graph.edges[0].to"),
        (("token_roles",), ["image"], "token_roles"),
        (("target",), 7, "target"),
        (("tokens",), None, "tokens"),
    ],
)
def test_a_part_of_another_shape_is_an_error_that_names_it(path, value, said):
    found = copy.deepcopy(fake(tokens=40))
    at = found
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(said)):
        explanation_page(found)


# Hostile text


def test_hostile_text_is_escaped_and_seen():
    page, snippet, said = (
        explanation_page(hostile()),
        explanation_snippet(hostile()),
        explanation_text(hostile(), 80),
    )
    body = page.replace(plotly_source(), "")
    assert body.lower().count("</script") == 5 and "default-src 'none'" in body
    for text in (body, snippet):
        assert HOSTILE not in text and not re.search(r"<(img|link|iframe|b)[^>]*\s(src|href|onerror)=", text)
        assert (
            not any(c in text for c in "\u202e\u200b\x1b\ud800") and "[U+202E]" in text and "[U+001B]" in text
        )
        text.encode("utf-8")
    assert not re.search(r'<\w[^>]* id="', snippet)  # they would meet those of another cell of the notebook
    assert "<script" not in snippet and " on" not in "".join(re.findall(r"<\w+([^>\"]*)", snippet))
    assert not any(c in said for c in "\u202e\u200b\x1b\ud800\ue000\u2068\u2069")


def test_marks():
    assert visible("a b\t\n\r\x00\u2066é漢") == "a b⇥↵[U+000D][U+0000][U+2066]é漢"
    page = explanation_page(
        {"tokens": [" a  b\n", "\t"], "target": "x", "sources": [{"method": "m", "scores": [1, 0]}]}
    )
    assert "<u> </u>a<u> </u><u> </u>b<s>↵</s>\n</span>" in page and "<s>⇥</s>\t</span>" in page


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_fits(width):
    wide = fake(extra=[*EVIL, "漢字漢字漢字", "x" * 200])
    for found in (fake(), wide, hostile(), fake() | {"pairs": 1, "clean": -1.0}):
        text = explanation_text(found, width)
        assert max(map(cell_len, text.splitlines())) <= width
    text = explanation_text(fake(), width)
    assert "Top heads" in text and "Top tokens by gradient" in text and "Controls" in text
    assert not re.search(r"( 95|\s')$", text, re.M)  # no line ends before a per cent or inside of a token


def test_tokens_of_an_image_are_squares_and_have_a_place():
    found = fake()
    found["token_roles"] = ["image" if 20 <= i < 40 else None for i in range(90)]
    assert "Of the text, image token 30 weighs most" in told(found)
    page = explanation_page(found)
    assert len(re.findall(r'<span class="[^"]*\bim"[^>]*></span>', page)) == 20 * (
        1 + 5
    )  # the text, five heads
    assert "image token 30" in explanation_text(found, 80)


# Size, and the browser


def test_8192_tokens_are_quick_and_small():
    found = fake(8192, 32, 32)
    explanation_page(fake(tokens=40))  # what is imported once
    start = time.process_time()
    page = explanation_page(found)
    assert time.process_time() - start < 3
    assert len(page.encode()) - len(plotly_source().encode()) < 6e6
    assert len(explanation_snippet(found).encode()) < 1e5
    places = re.findall(r'<a href="#(t\d+)"', page)
    assert len(places) >= 190 and set(places) == set(re.findall(r'<span[^>]* id="(t\d+)"', page))
    assert "The 30 largest scores" in page


@pytest.fixture(scope="module", params=["short", "hostile", "long"])
def page(request, tmp_path_factory):
    found = {"short": lambda: fake(), "hostile": hostile, "long": lambda: fake(2000)}[request.param]()
    path = tmp_path_factory.mktemp("explained") / "explanation.html"
    path.write_text(explanation_page(found), encoding="utf-8")
    return path


DRIVE = """
addEventListener("drawn", () => {
const out = {}, colour = () => getComputedStyle(document.querySelector(".text span.a8")).backgroundColor;
const seen = () => [...document.querySelectorAll(".only")].filter((e) => getComputedStyle(e).display !== "none").length;
out.first = colour(); out.seen = seen();
document.getElementById("source-3").click();
out.random = colour(); out.still = seen();
out.wide = document.documentElement.scrollWidth <= innerWidth;
out.drawn = [...document.querySelectorAll(".plot")].map((e) => e.querySelectorAll(".main-svg").length);
document.body.dataset.outcome = JSON.stringify(out);
});
"""


def test_page_in_a_browser(page, tmp_path):
    dom = browse(page, tmp_path)
    errors = re.search(r'data-script-errors="(\d+)" hidden="">(.*?)</div>', dom, re.S)
    assert errors.group(1) == "0", errors.group(2)
    assert "pwned" not in re.search(r"<title>(.*?)</title>", dom, re.S)[1].replace("&lt;", "<").split("<")[0]
    assert dom.count('class="plot js-plotly-plot"') == 3 and "<img" not in dom
    assert 'class="heatmaplayer' in dom and dom.count('<g class="trace scatter') >= 4 + 3


def test_the_methods_are_chosen_without_a_script(page, tmp_path):
    dom = browse(page, tmp_path, DRIVE)
    assert 'data-script-errors="0"' in dom
    out = json.loads(html.unescape(re.search(r'data-outcome="(.*?)"', dom)[1]))
    assert out["first"] == "rgb(232, 132, 60)" != out["random"]
    assert out["seen"] == out["still"] in (1, 2)  # the legend, and the table of a long text
    assert out["wide"] and all(out["drawn"])
