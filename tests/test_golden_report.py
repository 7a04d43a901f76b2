"""One result whose numbers all differ, read back from what is drawn: numbers by their heads, marks at their places."""

import random
import re
from itertools import chain, pairwise

import pytest
from tests.golden import (
    BUDGETS,
    DEPTHS,
    FULL,
    LENGTHS,
    NUMBERS,
    PERCENT,
    SCORES,
    Page,
    golden,
    markdown_rows,
    terminal_rows,
)

from regard.report import Result
from regard.report.needle import colour
from regard.report.words import budget_order

KEYS = ("needle", "text", "quality", "held", "read", "decode", "around", "prefill", "wide", "same", "kl")


@pytest.fixture(scope="module")
def result():
    return golden()


@pytest.fixture(scope="module")
def page(result):
    return Page(result)


@pytest.fixture(scope="module")
def ends(result):
    """(label, budget) -> both ends of the interval, whose distances from the quality differ."""
    found = {(r["label"], r["budget"]): (r["quality_low"], r["quality_high"]) for r in result.summary()}
    for at, (low, high) in found.items():
        quality = NUMBERS[at][2]
        assert at[0] == "full" or (low < quality < high and abs(high - quality - (quality - low)) > 1e-3)
    return found


def known(at) -> dict:
    return dict(zip(KEYS, NUMBERS[at], strict=True))


def asked(label: str, budget: str) -> tuple:
    """The key of the numbers, of a label and a budget as they are printed."""
    return next(at for at in NUMBERS if (at[0], BUDGETS[at[1]]) == (label, budget))


def printed(at) -> dict[str, str]:
    values = re.findall(r"[\d.]+ %", PERCENT[at])
    return dict(zip(("needle", "text", "quality", "held", "read"), values, strict=True))


def test_no_two_numbers_are_the_same():
    for at in NUMBERS:
        values = [v for v in NUMBERS[at] if at[0] != "full"]
        assert len({round(v, 3) for v in values}) == len(values), at


def test_the_summary_is_the_hand_worked_one(result):
    for row in result.summary():
        at, keys = (row["label"], row["budget"]), ("quality", "held", "read", "decode_ratio", "decode_spread")
        keys += ("prefill_ratio", "prefill_spread", "agreement", "kl")
        assert [row["tasks"]["needle"], row["tasks"]["text"], *(row[k] for k in keys)] == pytest.approx(
            NUMBERS[at]
        )
        lost = at[0] == "gamma"
        assert (row["cells"], row["failed"], row["missing"], row["complete"]) == (4 - lost, lost, 0, not lost)
    assert [(r["label"], r["budget"]) for r in result.summary()] == list(NUMBERS)


# Tables


def test_the_table_of_the_page_by_its_heads(page, ends):
    rows = page.table("All methods")
    heads = ["Method", "Budget", "Quality", "needle", "text", "Held", "Read", "Decode", "Prefill"]
    assert list(rows[0]) == [*heads, "Same token", "KL", "Failed"]
    order = [(r["Method"].text, r["Budget"].text) for r in rows]
    # full attention, then the best, those that lack cells at the end
    assert order == [("full", ""), ("alpha", "512 tok"), ("beta", "64 MB"), ("beta", "900 KB"), ("alpha", "10 %"),
                     ("gamma", "25 %")]  # fmt: skip
    for row in rows:
        at = asked(row["Method"].text, row["Budget"].text)
        number, text = known(at), {head.lower(): cell.text for head, cell in row.items()}
        low, high = ends[at]
        assert text.pop("quality") == f"{printed(at)['quality']} {100 * low:.0f}–{100 * high:.0f} %"
        others = {key: says for key, says in printed(at).items() if key != "quality"}
        assert {key: text[key] for key in others} == others
        assert text["decode"] == f"{number['decode']:.2f}× ± {number['around']:.2f}"
        assert text["prefill"] == f"{number['prefill']:.2f}× ± {number['wide']:.2f}"
        assert (text["same token"], text["kl"]) == (
            f"{number['same']:.0%}".replace("%", " %"),
            f"{number['kl']:.3g}",
        )
        assert text["failed"] == ("1" if at[0] == "gamma" else "")
    held_to = [
        tr.all("td")[0].text + tr.all("td")[1].text for tr in page.sections["All methods"].all("tr", "won")
    ]
    assert held_to == ["alpha512 tok"]


def test_the_page_sorts_by_what_it_shows(page):
    """Its script sorts cells by the number that each brings."""
    rows, order = page.table("All methods"), {}
    for row in rows:
        at = asked(row["Method"].text, row["Budget"].text)
        value = {
            head.lower(): float(cell.attributes.get("data-value") or "nan") for head, cell in row.items()
        }
        for head, key in (("same token", "same"), *((k, k) for k in KEYS if k in value)):
            assert value[head] == pytest.approx(known(at)[key]), (at, head)
        assert value["failed"] == (at[0] == "gamma")
        order[row["Budget"].text] = value["budget"]
    assert sorted(order, key=order.get) == ["", "10 %", "25 %", "512 tok", "900 KB", "64 MB"]


@pytest.mark.parametrize("rows", [markdown_rows, terminal_rows])
def test_the_tables_of_markdown_and_terminal_by_their_heads(result, rows):
    found = rows(result)
    assert len(found) == len(NUMBERS)
    for row in found:
        at = asked(row["method"], row.get("budget", ""))
        assert {key: row[key] for key in printed(at)} == printed(at)
        assert (
            row["decode"] == f"{known(at)['decode']:.2f}×"
            and row["prefill"] == f"{known(at)['prefill']:.2f}×"
        )
        assert (row.get("failed") or "0") == ("1" if at[0] == "gamma" else "0")
        if "●" in found[0]:
            assert ("●" in row) == (at in [("full", None), ("alpha", 0.1), ("alpha", 512)]), at


def test_the_failed_cell_by_its_heads(page):
    (row,) = page.table("Failed cells")
    assert {head: cell.text for head, cell in row.items()} == {
        "Method": "gamma @ 25 %", "Tasks": "needle", "Lengths": "512", "Status": "timeout", "Reason": "too slow",
    }  # fmt: skip
    assert "3 methods × 5 budgets × 2 tasks × 2 lengths: 24 cells, 1 failed. Started then." in page.root.text


def test_the_examples_by_their_heads(page):
    """What was generated says which sample it is; the other columns are that sample's."""
    scores = {(label, str(b), n, d): s for (label, b), (needle, _) in SCORES.items()
              for n in needle for d, s in zip(DEPTHS, needle[n], strict=True)}  # fmt: skip
    details = page.sections["Examples"].all("details")
    seen = 0
    for at in range(len(details)):
        for row in page.table("Examples", at):
            text = {head: cell.text for head, cell in row.items()}
            assert len(text["Generated"].split()) == 4, text["Generated"]
            label, budget, length, depth = text["Generated"].split()
            score = scores[label, budget, int(length), float(depth)]
            assert (
                text["Task"] == "needle"
                and text["Length"] == length
                and text["Expected"] == f"wanted {depth}"
            )
            assert text["Budget"] == BUDGETS[next(b for b in BUDGETS if str(b) == budget)]
            assert text["Depth"] == f"{100 * float(depth):.0f} %" and text["Score"] == f"{score:.2f}"
            assert details[at].all("summary")[0].text.startswith(label)
            seen += 1
    assert seen >= 4 * 3


# Figures


def traces(figure) -> dict[str, dict]:
    return {trace["name"]: trace for trace in figure["data"] if "name" in trace}


def bar_ends(trace) -> list[tuple[float, float]]:
    bars = trace["error_y"]
    assert bars["symmetric"] is False
    return [(y - a, y + b) for y, a, b in zip(trace["y"], bars["arrayminus"], bars["array"], strict=True)]


@pytest.mark.parametrize(("key", "column"), [("held", "held"), ("read", "read"), ("decode_ratio", "decode")])
def test_quality_against_cost_is_drawn_at_its_numbers(page, ends, key, column):
    figure = page.data["figures"][f"cost-{key}"]
    drawn = traces(figure)
    assert set(drawn) == {label for label, _ in NUMBERS}
    for label, trace in drawn.items():
        mine = [at for at in NUMBERS if at[0] == label]
        assert trace["x"] == pytest.approx([known(at)[column] for at in mine])
        assert trace["y"] == pytest.approx([100 * known(at)["quality"] for at in mine])
        for at, both in zip(mine, bar_ends(trace), strict=True):
            assert both == pytest.approx([100 * end for end in ends[at]]), at
        for at, text in zip(mine, trace["hovertext"], strict=True):
            says = printed(at)
            assert f"quality {says['quality']} of full" in text
            assert f"held {says['held']}, read {says['read']}" in text
            assert f"decode {known(at)['decode']:.2f}×, prefill {known(at)['prefill']:.2f}×" in text
        hollow = [symbol.endswith("-open") for symbol in trace["marker"]["symbol"]]
        assert hollow == [label == "gamma"] * len(mine)
        assert page.root.all("nav")[0].all("button")[trace["meta"]["method"]].text == label
    ring, best = figure["data"][-1], known(("alpha", 512))
    assert (ring["x"][0], ring["y"][0]) == pytest.approx((best[column], 100 * best["quality"]))
    assert "alpha @ 512 tok" in [note["text"] for note in figure["layout"]["annotations"]]


def test_the_front_of_a_cost_is_a_staircase_of_the_best(page):
    """By bytes held: alpha at 10 %, alpha at 512 tokens, full attention; by bytes read beta at 64 MB comes between."""
    for key, steps in (("held", [(0.11, 70), (0.23, 99), (1, 100)]),
                       ("read", [(0.12, 70), (0.16, 96), (0.24, 99), (1, 100)])):  # fmt: skip
        front = page.data["figures"][f"cost-{key}"]["data"][1]
        corners = list(zip(front["x"], front["y"], strict=True))
        expected = [steps[0]]
        for (_, before), (x, y) in pairwise(steps):
            expected += [(x, before), (x, y)]
        assert [v for c in corners[:-1] for v in c] == pytest.approx([v for c in expected for v in c])


@pytest.mark.parametrize(("at", "task"), [("length-0", "needle"), ("length-1", "text")])
def test_quality_over_length_is_drawn_at_its_numbers(page, at, task):
    figure = page.data["figures"][at]
    assert task in figure["layout"]["title"]["text"]
    radios = [label.text for label in page.sections["Quality over length"].all("fieldset")[0].all("label")]
    assert radios == ["10 %", "25 %", "512 tok", "900 KB", "64 MB"]
    checked = [
        i
        for i, r in enumerate(page.sections["Quality over length"].all("input"))
        if "checked" in r.attributes
    ]
    assert checked == [2] and page.data["budget"] == 2  # the winner's
    drawn = traces(figure)
    assert len(drawn) == len(NUMBERS)
    for (label, budget), (needle, text) in SCORES.items():
        trace = drawn[label if budget is None else f"{label} @ {BUDGETS[budget]}"]
        assert trace["meta"]["budget"] == (None if budget is None else radios.index(BUDGETS[budget]))
        assert trace["x"] == list(LENGTHS)
        values = [sum(needle[n]) / 3 if n in needle else None for n in LENGTHS] if task == "needle" else text
        for y, value, both, says in zip(
            trace["y"], values, ends_or_none(trace), trace["hovertext"], strict=True
        ):
            assert (y is None) == (value is None)
            if value is not None:
                assert (y, *both) == pytest.approx((100 * value, 100 * value - 7, 100 * value + 2))
                assert f"{value:.0%}".replace("%", " %") in says and f"({value - 0.07:.0%}" in says.replace(
                    " %", "%"
                )


def ends_or_none(trace):
    filled = {**trace, "y": [0 if y is None else y for y in trace["y"]]}
    return bar_ends(filled)


# The needle map


def test_tiles_stand_at_their_depth_and_length(page):
    """Columns are lengths, rows are depths from the start of the text down; a tile's colour is that of its score."""
    section = page.sections["Needle map"]
    assert "Columns: length 256, 512" in section.text
    assert "Rows: depth 0 % (start of the text, top) to 100 % (end, bottom)" in section.text
    cards = {card.all("h4")[0].text: card for card in section.all("div", "card")}
    assert list(cards) == ["full", "alpha", "beta", "gamma"]
    for label, card in cards.items():
        mine = [at for at in NUMBERS if at[0] == label]
        maps = card.all("figure")
        for at, drawn in zip(mine, maps, strict=True):
            needle = SCORES[at][0]
            mean = sum(map(sum, needle.values())) / (3 * len(needle))
            caption = drawn.all("figcaption")[0].text
            assert caption == f"{BUDGETS[at[1]]} · {mean:.0%}".replace("%", " %").replace(
                "  ", " "
            ).removeprefix(" · ")
            assert len(drawn.all("rect")) == len(DEPTHS) * len(LENGTHS)
            hold_tiles(drawn.all("rect"), needle)


def hold_tiles(tiles, needle) -> None:
    xs, ys = (sorted({float(t.attributes[axis]) for t in tiles}) for axis in ("x", "y"))
    assert (len(xs), len(ys)) == (len(LENGTHS), len(DEPTHS))
    for tile in tiles:
        length, y = LENGTHS[xs.index(float(tile.attributes["x"]))], ys.index(float(tile.attributes["y"]))
        score = needle[length][y] if length in needle else None
        said = "not measured" if score is None else f"{score:.0%}".replace("%", " %")
        assert tile.text == f"length {length}, depth {100 * DEPTHS[y]:.0f} %: {said}"
        assert tile.attributes["fill"] == ("url(#unmeasured)" if score is None else colour(score))


def test_a_better_score_is_lighter_and_no_two_tenths_look_the_same():
    light = [sum(int(colour(i / 10)[a : a + 2], 16) for a in (1, 3, 5)) for i in range(11)]
    assert light == sorted(light) and len(set(light)) == 11
    assert colour(0.0) == "#7a1f0a" and colour(1.0) == "#deeaf4" and colour(0.5) == "#e8a35c"


# What is said


def test_the_sentence_has_the_winners_numbers(result, ends):
    said = result.sentence()
    low, high = (f"{100 * end:.0f} %" for end in ends["alpha", 512])
    assert said.startswith(
        "alpha @ 512 tok is the cheapest that keeps 95 % of full attention's quality on small (tasks needle and text; "
        f"lengths 256 and 512), by bytes held: 99 % of its quality (interval {low} to {high}), 23 % of its bytes held, "
        "24 % of its bytes read per token and 0.53× its decode time."
    )
    assert "beta @ 64 MB reads least: 96 % of its quality" in said
    assert said.endswith("Not considered, with cells failed or missing: gamma @ 25 %.")


def test_ties_go_to_fewer_bytes_read_then_to_less_time():
    """Bytes that differ by less than a thousandth are the same; the label decides nothing."""

    def cell(label: str, held: float, read: float, decode: float) -> list[dict]:
        made = [r for r in golden().rows if (r["label"], r["budget"]) == ("alpha", 512)]
        return [
            r | {"label": label, "key": f"{label} {r['key']}", "bytes_held": held * r["bytes_full"],
                 "bytes_read": read * r["bytes_read_full"], "decode_ratio": decode}
            for r in made
        ]  # fmt: skip

    full = [r for r in golden().rows if r["label"] == "full"]

    def winner(*cells: list[dict]) -> str:
        found = {Result({}, [*full, *chain(*order)]).winner()["label"] for order in (cells, cells[::-1])}
        assert len(found) == 1
        return found.pop()

    assert winner(cell("a", 0.2, 0.5, 0.9), cell("b", 0.3, 0.1, 0.1)) == "a"
    assert winner(cell("a", 0.2, 0.5, 0.1), cell("b", 0.2, 0.4, 0.9)) == "b"
    assert winner(cell("a", 0.2001, 0.4, 0.9), cell("b", 0.2, 0.5, 0.1)) == "a"
    assert winner(cell("a", 0.2, 0.4, 0.9), cell("b", 0.2, 0.4, 0.8)) == "b"


def test_budgets_are_in_the_order_of_what_they_hold():
    order = [
        None,
        0.05,
        0.5,
        1.0,
        1,
        16,
        512,
        4096,
        "512B",
        "2KB",
        "900KB",
        "1MB",
        "64MB",
        "1500MB",
        "2GB",
        "1TB",
    ]
    mixed = random.Random(0).sample(order, len(order))
    assert sorted(mixed, key=budget_order) == order
    assert budget_order("1024KB")[:2] == budget_order("1MB")[:2]


def test_full_attention_is_not_the_unit_by_chance():
    assert FULL != 1.0 and all(scores == (FULL,) * 3 for scores in SCORES["full", None][0].values())
