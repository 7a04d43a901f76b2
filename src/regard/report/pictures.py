"""What a comparison on images found: a table for each task, verdicts, and how evaluations read the same answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regard.report.words import NONE, clean, number, percent, times

Row = Mapping[str, Any]
FULL, RANDOM, DRAWS = "full", "random_tokens", 1000
HEADS = {
    "yes_no": {
        "method": "method", "quality": "right", "gain": "over base", "over_control": "over equal bias",
        "verdict": "verdict", "yes": "says yes", "shuffled": "shuffled", "neutral": "neutral", "kept": "tokens",
        "time": "time", "passes": "passes",
    },
    "chair": {
        "method": "method", "chair_i": "CHAIR_I", "dropped": "dropped", "chair_s": "CHAIR_S", "recall": "recall",
        "length": "words", "n": "n", "gain": "under base", "over_control": "under cut base", "verdict": "verdict",
        "shuffled": "shuffled", "neutral": "neutral", "kept": "tokens", "time": "time", "passes": "passes",
    },
    "said": {
        "method": "method", "quality": "right", "gain": "over base", "verdict": "verdict", "shuffled": "shuffled",
        "neutral": "neutral", "kept": "tokens", "time": "time", "passes": "passes",
    },
}  # fmt: skip
KEYS = (
    "right, CHAIR: of the questions, with the paired 95 % interval over images of what it gains on the model as it is. "
    "Equal bias: a constant added to the model's own yes/no margin until it says yes as often; cut base: its own "
    "captions, cut to as many mentions. Works: the interval excludes this control. Dropped: CHAIR_I without an "
    "incomplete last sentence. Shuffled: the image's role on the prompt's other tokens. Neutral: largest change of a "
    "logit at the setting that should change nothing. Tokens: visual tokens x layers that are read. Time: seconds per "
    "token over the model's own."
)


@dataclass
class PictureResult:
    """The cells of one comparison on images: `run` says where and how, a row is a method on a task."""

    run: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: str | Path) -> "PictureResult":
        folder = Path(folder)
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").split("\n")
        rows = {row["key"]: row for row in map(json.loads, filter(None, lines))}
        return cls(run, [rows[key] for key in run["cells"] if key in rows])

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row["task"] for row in self.rows))

    def of(self, task: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["task"] == task]

    def size(self) -> int:
        """How many there are."""
        return len(self.rows)

    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] != "ok"]

    def verdict(self, row: Row) -> str:
        """In words: "works", "no better than equal bias", "below random", ...; "" of the model as it is."""
        if row["status"] != "ok":
            return row["status"]
        if row["method"] == FULL:
            return ""
        if row.get("kind_of_method") == "tokens":
            return self.beside_random(row)
        if row["works"]:
            return "works"
        over, gain = row.get("over_control_interval") or row["gain_interval"], row["gain_interval"]
        if over[1] < 0:
            return "worse than its control"
        if gain[0] == gain[1] == 0:
            return "changes no answer"
        return (
            "as its control" if gain[0] > 0 else "worse, as its control" if gain[1] < 0 else "no effect shown"
        )

    def beside_random(self, row: Row) -> str:
        """A reduction beside random tokens, in pairs over the images that both answered."""
        others = [r for r in self.of(row["task"]) if r["method"] == RANDOM and r["status"] == "ok"]
        if not others or row["method"] == RANDOM:
            return ""
        other = next((r for r in others if alike(row.get("kept"), r.get("kept"))), None)
        if other is None:
            return "not at random's budget"
        low, high = apart(row, other)
        return "above random" if low > 0 else "below random" if high < 0 else "as random"

    def sentence(self) -> str:
        """What works here, in a sentence or two for each task."""
        said = []
        for task in self.tasks():
            rows, steered, reduced = self.of(task), [], []
            for row in rows:
                verdict = self.verdict(row)
                if verdict == "works":
                    steered.append(row["label"])
                if verdict == "above random":
                    reduced.append(row["label"])
            parts = []
            if any(row.get("kind_of_method") == "steering" for row in rows):
                parts.append(
                    f"{', '.join(steered)} beat the control" if steered else "no steering beat its control"
                )
            if any(row.get("kind_of_method") == "tokens" for row in rows):
                parts.append(
                    f"{', '.join(reduced)} beat random tokens" if reduced else "no choice beat random tokens"
                )
            said.append(
                f"On {clean(task)} {clean('; '.join(parts))}."
                if parts
                else f"On {clean(task)} nothing was compared."
            )
        return " ".join(said)

    def readings(self) -> list[dict[str, Any]]:
        """Accuracy and F1 of yes-no answers under each rule, and how far apart the rules are."""
        found = []
        for row in self.rows:
            rules = row.get("rules")
            if row["status"] == "ok" and rules:
                right = {name: scores["accuracy"] for name, scores in rules.items()}
                apart = max(right.values()) - min(right.values())
                f1 = {f"F1 {name}": percent(scores["f1"]) for name, scores in rules.items()}
                shown = {name: percent(value) for name, value in right.items()}
                found.append(
                    {"method": row["label"], "task": row["task"], **shown, **f1, "apart": percent(apart)}
                )
        return found

    def cells(self, task: str) -> list[dict[str, str]]:
        """A table's rows as text, by the keys of HEADS."""
        return [self.shown(row) for row in self.of(task)]

    def shown(self, row: Row) -> dict[str, str]:
        base = row["method"] == FULL
        gap = row.get("neutral")
        return {
            "method": "the model as it is" if base else clean(row["label"]),
            "quality": percent(row.get("quality")), "chair_i": percent(row.get("chair_i")),
            "dropped": percent((row.get("dropped") or {}).get("chair_i")), "chair_s": percent(row.get("chair_s")),
            "recall": percent(row.get("recall")), "length": count(row.get("length")), "n": count(row.get("n")),
            "gain": NONE if base else gained(row, "gain"),
            "over_control": NONE if base else gained(row, "over_control"),
            "verdict": self.verdict(row), "yes": percent(row.get("yes_ratio")),
            "shuffled": percent(shuffled(row)), "neutral": NONE if gap is None else "0" if gap == 0 else f"{gap:.0e}",
            "kept": percent(row.get("kept")), "time": times(row.get("time_ratio")), "passes": times(row.get("passes")),
        }  # fmt: skip


def shuffled(row: Row) -> float | None:
    """Quality with shuffled roles; of captions CHAIR_I."""
    value = number(row.get("shuffled"))
    return value if value is None or row.get("metric") != "chair" else 1 - value


def count(value: object) -> str:
    value = number(value)
    return NONE if value is None else f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def gained(row: Row, key: str) -> str:
    """Points with their interval."""
    value, ends = number(row.get(key)), row.get(f"{key}_interval")
    if value is None or not ends:
        return NONE
    return in_points(value, ends)


def in_points(value: float, ends: Sequence[float]) -> str:
    """Shares as points with their interval, no minus before a zero.

    >>> in_points(0.25, (-0.0001, 0.5))
    '+25.0 (+0.0 to +50.0)'
    """
    points = [round(100 * x, 1) + 0.0 for x in (value, *ends)]
    return f"{points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f})"


def alike(a: object, b: object) -> bool:
    """Whether two budgets are within a twentieth of each other."""
    a, b = number(a), number(b)
    return a is not None and b is not None and abs(a - b) <= 0.05 * max(a, b)


def apart(row: Row, other: Row) -> tuple[float, float]:
    """95 % of the difference in quality over images, in pairs; of captions that of CHAIR_I, lower being better."""
    ours, theirs = by_image(row), by_image(other)
    images = [i for i in ours if i in theirs]
    picks = np.random.default_rng(0).integers(0, len(images), (DRAWS, len(images)))
    sides = []
    for side in (ours, theirs):
        x = np.array([side[i] for i in images])[picks].sum(1)  # [draws, 2]
        sides.append(x[:, 0] / np.maximum(x[:, 1], 1e-9))
    gap = sides[0] - sides[1]
    gap = -gap if row.get("metric") == "chair" else gap
    return float(np.percentile(gap, 2.5)), float(np.percentile(gap, 97.5))


def by_image(row: Row) -> dict[str, tuple[float, float]]:
    """Image -> (score, how much it counts): right answers of questions, or absent mentions of mentions."""
    found: dict[str, list[float]] = {}
    for sample in row["samples"]:
        own = (sample["false"], sample["named"]) if "false" in sample else (sample["score"], 1.0)
        old = found.setdefault(sample["image"], [0.0, 0.0])
        old[0], old[1] = old[0] + own[0], old[1] + own[1]
    return {image: (a, b) for image, (a, b) in found.items()}


def columns(rows: Sequence[Mapping[str, str]], metric: str) -> dict[str, str]:
    """The heads of a table, without columns in which nothing is said."""
    return {k: head for k, head in HEADS[metric].items() if any(row[k] not in ("", NONE) for row in rows)}
