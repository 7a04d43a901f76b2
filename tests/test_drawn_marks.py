"""Marks, lines and letters as they are drawn: what a report's eye reads, and what a rendered scene shows."""

import math

import pytest
from tests.test_report import one

from regard.report import Result
from regard.report.figures import length_trace, quality_cost
from regard.report.marks import FULL, corners, marks
from regard.tasks.chair_scores import chair, counts
from regard.tasks.scenes import GLYPHS, RGB, Scene, Thing


@pytest.mark.parametrize(
    ("shape", "radii"),
    [("square", {6.0}), ("diamond", {6.0}), ("hexagon", {6.0}), ("star", {6.5, 2.8}), ("x", {6.2, 3.0})],
)
def test_shapes_have_their_corners_at_their_radii(shape, radii):
    assert {round(math.hypot(x, y), 6) for x, y in corners(shape)} == radii
    if shape == "star":
        assert [round(math.hypot(x, y), 1) for x, y in corners(shape)] == [6.5, 2.8] * 5


def test_full_attention_is_a_thicker_dotted_line_with_a_larger_mark():
    marked = marks({"full": "full", "snapkv": "snapkv"}, "full")
    points = [{"length": 64, "quality": 0.5, "quality_low": 0.4, "quality_high": 0.6}]
    full, other = (length_trace(0, name, "", points, marked, None) for name in ("full", "snapkv"))
    assert marked["full"] == FULL
    assert (
        full["line"]["width"] > other["line"]["width"]
        and full["line"]["dash"] == "dot" != other["line"]["dash"]
    )
    assert full["marker"]["size"] > other["marker"]["size"]


def test_the_front_goes_on_to_the_right_end_of_its_axis():
    rows = [one("full"), one("snapkv", 0.25, quality=0.4), one("snapkv", 0.5, quality=0.8)]
    result = Result({"model": "small"}, rows)
    figure = quality_cost(result, "held", marks({"full": "full", "snapkv": "snapkv"}, "full"))
    front = next(trace for trace in figure["data"] if trace.get("line", {}).get("dash") == "dash")
    span = figure["layout"]["xaxis"]["range"]
    right = 10 ** span[1] if figure["layout"]["xaxis"].get("type") == "log" else span[1]
    assert front["x"][-1] == right and front["x"] == sorted(front["x"])


def test_colours_are_what_they_are_called():
    channels = {"red": [0], "green": [1], "blue": [2], "yellow": [0, 1]}
    for name, strong in channels.items():
        bright = [i for i, value in enumerate(RGB[name]) if value >= 0.9]
        assert bright == strong and all(v <= 0.3 for i, v in enumerate(RGB[name]) if i not in strong)


def test_letters_are_five_dots_wide_and_those_with_an_axis_have_it():
    drawn = {name: [f"{row:05b}" for row in rows] for name, rows in GLYPHS.items()}
    assert all(len(rows) == 7 and all(len(row) == 5 for row in rows) for rows in drawn.values())
    for name in "imot":
        assert all(row == row[::-1] for row in drawn[name]), name
    assert all(row[0] == "1" for row in drawn["l"]) and drawn["l"][-1] == "11111"
    assert drawn["b"][:4] == drawn["r"][:4] and drawn["e"][0] == drawn["e"][-1] == "11111"


def test_one_mention_counts_as_one():
    found = [counts("a cat", ["dog"], ["cat", "dog"])]
    assert chair(found)["chair_i"] == 1.0
    assert chair([counts("nothing", ["dog"], ["cat", "dog"])])["chair_i"] == 0.0
    half = [counts("a cat and a dog", ["dog"], ["cat", "dog"])]
    assert chair(half) == {"chair_i": 0.5, "chair_s": 1.0, "recall": 1.0, "length": 5.0, "n": 1}


def test_a_scene_shows_its_thing_in_its_colour_before_dark_noise():
    pixels = Scene((Thing("shape", "square", "red", cell=5, contrast=1.0),), noise=3).pixels()
    thing, other = pixels[8:16, 8:16], pixels[16:]
    assert (thing[3:5, 3:5] == [255, 26, 26]).all()
    assert other.max() <= 128 and other.min() < 8 and other.std() > 30
