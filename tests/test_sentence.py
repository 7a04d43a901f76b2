"""The sentence of a comparison, recomputed from results.jsonl by other means, and what it says cannot be told."""

import json
import math
import re
from collections import defaultdict

import pytest
from tests.golden import golden

from regard.report.result import Result
from regard.report.sentence import doubt, slower, winner_text


def recomputed(lines: list[str]) -> dict:
    """The winner and its numbers, from the rows as text: nothing of regard is asked."""
    rows = [json.loads(line) for line in lines]
    cells = [r for r in rows if r["kind"] == "cell" and r["status"] == "ok"]
    full = {(r["task"], r["length"]): r for r in cells if r["method"] == "full"}
    methods = defaultdict(dict)
    for r in cells:
        if r["method"] != "full":
            methods[r["label"], r["budget"]][r["task"], r["length"]] = r
    found = []
    for (label, budget), mine in methods.items():
        if set(mine) < set(full):
            continue
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        quality = mean([r["quality"] / full[at]["quality"] for at, r in mine.items()])
        if quality >= 0.95:
            held = mean([r["bytes_held"] / r["bytes_full"] for r in mine.values()])
            read = mean([r["bytes_read"] / r["bytes_read_full"] for r in mine.values()])
            log = mean([math.log(r["decode_ratio"]) for r in mine.values()])
            found.append((round(held, 3), round(read, 3), label, budget, quality, held, read, math.exp(log)))
    *_, label, budget, quality, held, read, decode = min(found)
    return {"label": label, "budget": budget, "numbers": (quality, held, read, decode)}


def test_the_sentence_is_what_the_rows_say(tmp_path):
    made = golden()
    (tmp_path / "run.json").write_text(json.dumps({"model": "small"}))
    lines = [json.dumps(row) for row in made.rows]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    said, wanted = Result.load(tmp_path).sentence(), recomputed(lines)
    assert said.startswith(f"{wanted['label']} @ {wanted['budget']} tok is the cheapest")
    quality, held, read, decode = wanted["numbers"]
    shown = re.search(
        r"by bytes held: (\d+) % of its quality.*?, (\d+) % of its bytes held, (\d+) % of its bytes read",
        said,
    )
    assert [int(n) for n in shown.groups()] == [round(100 * n) for n in (quality, held, read)]
    assert f"{decode:.2f}× its decode time" in said


def summary(quality: float, low: float | None = None, high: float | None = None, **rest) -> dict:
    costs = {"held": 0.5, "read": 0.5, "decode_ratio": 0.8, "decode_spread": 0.05}
    ends = {"quality_low": low, "quality_high": high}
    return {"label": "a", "budget": 0.5, "quality": quality, "tasks": {}, **ends, **costs, **rest}


def test_few_samples_tell_nothing():
    assert "With 3 samples in a cell nothing can be told" in doubt(summary(0.99, 0.98, 1.0), 3)
    assert doubt(summary(0.99, 0.98, 1.0), 8) == ""
    assert doubt(summary(0.99), 0) == ""  # rows that hold no samples


def test_an_interval_that_spans_95_per_cent_says_how_many_samples_would_tell():
    """Half as wide takes four times the samples: 0.97 with 0.93 below it is told at 0.95 from 4 x 16 on."""
    assert "16 samples in a cell cannot tell its side; about 64 samples in a cell would." in doubt(
        summary(0.97, 0.93, 1.0), 16
    )
    # from the other side it is the upper end that counts
    assert "about 36 samples in a cell would" in doubt(summary(0.93, 0.5, 0.96), 16)
    assert "even 10,000 samples would not" in doubt(summary(0.95, 0.9, 1.0), 16)
    assert doubt(summary(0.97, 0.95, 1.0), 16) == "" == doubt(summary(0.9, 0.8, 0.94), 16)


def test_a_winner_that_is_slower_says_so():
    assert slower(summary(1.0, decode_ratio=1.2)) == " It decodes slower than full attention: 1.20× its time."
    assert slower(summary(1.0, decode_ratio=1.04)) == "" == slower(summary(1.0, decode_ratio=None))
    best = {**summary(1.0, 0.99, 1.01, decode_ratio=1.3), "tasks": {"needle": 1.0}}
    assert winner_text([best], "here", 16).endswith("1.30× its time.")


@pytest.mark.parametrize("asked", [8, 64])
def test_the_number_of_samples_is_the_smallest_cells(asked):
    made = golden()
    for row in made.rows[:-1]:
        row["samples"] = [{"score": 1.0}] * asked
    made.rows[-1]["samples"] = [{"score": 1.0}] * (asked - 1)
    assert made.least_samples() == asked - 1
    # rows that hold none, and rows that failed, are none of them
    made.rows[0]["samples"] = []
    made.rows[1] |= {"status": "failed", "samples": [{"score": 1.0}]}
    assert made.least_samples() == asked - 1


def test_a_notebook_shows_the_sentence_and_the_rows():
    made = golden()
    shown = made._repr_html_()
    assert shown.startswith(f"<p>{made.sentence()}</p>".replace("'", "&#x27;"))
    rows = re.findall(r"<tr>(<td>.*?)</tr>", shown)
    assert len(rows) == len(made.summary()) and rows[0].startswith("<td>full</td>")
    assert "<td>alpha</td><td>512 tok</td><td>99 %</td>" in shown and "<script" not in shown
