"""What the report says in numbers, read from its pages and counted again from results.jsonl with other code."""

import io
import json
import math
import random
import re
from collections import defaultdict
from html.parser import HTMLParser
from statistics import fmean

import pytest
from rich.console import Console

from regard.bench.compare import compare
from regard.bench.executor import InProcess
from regard.models.shipped import load_shipped
from regard.report import Result, show, to_html, to_markdown


class Words(HTMLParser):
    """The text of every element of some tags and classes, in the page's order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[list] = []
        self.found: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in ("summary", "figcaption", "h3", "h4", "td", "tr", "h2", "p"):
            self.open.append([tag, ""])

    def handle_data(self, data):
        for element in self.open:
            element[1] += data

    def handle_endtag(self, tag):
        if self.open and self.open[-1][0] == tag:
            self.found.append((tag, " ".join(self.open.pop()[1].split())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real run, in which then full attention fails on all needles of 96 tokens, and a cell ends without a number."""
    out = tmp_path_factory.mktemp("counts") / "run"
    compare(load_shipped("lm"), ["streaming_llm", "snapkv"], ["needle", "recall", "perplexity"], [96, 200], [0.25, 0.5],
            out=out, samples=7, executor=InProcess())  # fmt: skip
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row in rows:
        if (row["method"], row["task"], row["length"]) == ("full", "needle", 96):
            row.update(quality=0.0, samples=[{**s, "score": 0.0} for s in row["samples"]])
        if (row["method"], row["task"], row["length"], row["budget"]) == ("snapkv", "recall", 200, 0.5):
            row.update(status="timeout", error="too long", quality=None, samples=[])
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture(scope="module")
def rows(folder):
    every = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [row for row in every if row["kind"] == "cell"]


@pytest.fixture(scope="module")
def result(folder):
    return Result.load(folder)


@pytest.fixture(scope="module")
def page(result):
    return Words(to_html(result)).found


def per_cent(text: str) -> float:
    return float(text.replace("%", "").strip()) / 100


def ending(row: dict) -> bool:
    return row["status"] == "ok"


def test_wrong_answers(page, rows):
    said = {}
    for text in (text for tag, text in page if tag == "summary" and "answers" in text):
        label, wrong, answers = re.match(r"(\S+) (\d+) of (\d+) answers wrong", text).groups()
        texts = int(re.search(r"(\d+) texts by perplexity", text).group(1))
        said[label] = (int(wrong), int(answers), texts)
    counted = defaultdict(lambda: [0, 0, 0])
    for row in filter(ending, rows):
        for sample in row["samples"]:
            if row["task"] == "perplexity":
                counted[row["method"]][2] += 1
            else:
                counted[row["method"]][0] += sample["generated"] != sample["answer"] or not row["quality"]
                counted[row["method"]][1] += 1
    assert said == {label: tuple(numbers) for label, numbers in counted.items()}
    assert said["full"][0] >= 7 and said["full"][2] == 14


def test_shares_of_the_maps(page, rows):
    said, task, label = {}, "", ""
    for tag, text in page:
        task = text if tag == "h3" else task
        label = text if tag == "h4" else label
        if tag == "figcaption" and task and label and re.fullmatch(r"(\d+ % · )?[\d.]+ %", text):
            budget, _, share = text.rpartition(" · ")
            said[task, label, budget] = per_cent(share)
    answers = defaultdict(list)
    for row in filter(ending, rows):
        if row["task"] != "perplexity":
            budget = f"{100 * row['budget']:.0f} %" if row["budget"] else ""
            answers[row["task"], row["method"], budget] += [s["score"] for s in row["samples"]]
    assert said.keys() == answers.keys() and len(said) == 2 * 5
    for at, scores in answers.items():
        assert said[at] == pytest.approx(sum(scores) / len(scores), abs=0.0051), at


def recounted(rows: list[dict]) -> dict[tuple, dict]:
    """(label, budget) -> quality, interval's ends, held, read, failed."""
    full = {(r["task"], r["length"]): r for r in rows if r["method"] == "full"}
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], f"{100 * row['budget']:.0f} %" if row["budget"] else ""].append(row)
    made = {}
    for at, group in groups.items():
        good = list(filter(ending, group))
        pairs = [(r, full[r["task"], r["length"]]) for r in good if full[r["task"], r["length"]]["quality"]]
        made[at] = {
            "quality": fmean(r["quality"] / f["quality"] for r, f in pairs),
            "ends": resampled(pairs, random.Random(0)),
            "held": fmean(r["bytes_held"] / r["bytes_full"] for r in good),
            "read": fmean(r["bytes_read"] / full[r["task"], r["length"]]["bytes_read"] for r in good),
            "failed": len(group) - len(good),
        }
    return made


def resampled(pairs: list, rng: random.Random) -> tuple[float, float]:
    """The ratio of what is drawn, itself, where the page takes it to first order."""
    draws = []
    for _ in range(2000):
        ratios = []
        for row, full in pairs:
            picks = rng.choices(range(len(row["samples"])), k=len(row["samples"]))
            ours, theirs = ([r["samples"][i]["score"] for i in picks] for r in (row, full))
            if row["task"] == "perplexity":
                ratios.append(math.exp(fmean(map(math.log, ours))))
            else:
                ratios.append(fmean(ours) / (fmean(theirs) or full["quality"]))
        draws.append(fmean(ratios))
    draws.sort()
    return draws[50], draws[-50]


def test_the_table_of_the_page(page, rows):
    texts = [text for tag, text in page if tag == "td"]
    counted = recounted(rows)
    for (label, budget), numbers in counted.items():
        start = next(i for i in range(len(texts)) if texts[i : i + 2] == [label, budget])
        # held and read stand after the three tasks, what failed at the end of the row
        quality, ends = re.fullmatch(r"([\d.]+ %) (.*)", texts[start + 2]).groups()
        held, read, lost = texts[start + 6], texts[start + 7], texts[start + 13]
        assert per_cent(quality) == pytest.approx(numbers["quality"], abs=0.0051)
        assert per_cent(held) == pytest.approx(numbers["held"], abs=0.0051)
        assert per_cent(read) == pytest.approx(numbers["read"], abs=0.0051)
        assert lost == (str(numbers["failed"]) if numbers["failed"] else "")
        low, high = (per_cent(part) for part in ends.split("–"))
        assert (low, high) == pytest.approx(numbers["ends"], abs=0.04), (label, budget)
    assert counted["full", ""]["read"] == 1 and counted["full", ""]["ends"] == (1, 1)
    assert counted["snapkv", "50 %"]["failed"] == 1


def test_the_tables_of_terminal_and_markdown(result, rows):
    terminal = io.StringIO()
    show(result, Console(width=200, file=terminal))
    markdown = [
        line.strip("| \n").split(" | ") for line in to_markdown(result).replace("\\", "").splitlines()
    ]
    printed = [re.split(r"\s{2,}", line.strip()) for line in terminal.getvalue().splitlines()]
    for (label, budget), numbers in recounted(rows).items():
        line = next(x for x in markdown if x[:2] == [label, budget])
        shown = next(x for x in printed if x[0] == label and (x[1] == budget or not budget))
        shares = [cell for cell in shown[1:] if cell.endswith("%")][bool(budget) :]
        for key, cell, of_terminal in zip(
            ("quality", "held", "read"), (line[2], *line[6:8]), (shares[0], *shares[-2:])
        ):
            assert per_cent(cell) == per_cent(of_terminal) == pytest.approx(numbers[key], abs=0.0051), (
                label,
                key,
            )
        assert int(line[-1]) == numbers["failed"]


def test_the_counts_of_the_head(page, rows):
    head = next(text for tag, text in page if tag == "p" and "Started" in text)
    assert f"2 methods × 2 budgets × 3 tasks × 2 lengths: {len(rows)} cells, 1 failed" in head
