"""Tasks of images: scenes and their priors, splits of POPE, files of one's own, four readings of an answer, CHAIR."""

import json

import numpy as np
import pytest

from regard import catalog
from regard.bench.picture_scores import biased, chair_facts, cut, yes_no_facts
from regard.bench.pictures import Answers
from regard.core import Unsupported
from regard.tasks import chair as chair_page
from regard.tasks import pope
from regard.tasks.chair_scores import Counts, chair, counts, mentions, without_last
from regard.tasks.pictures import PictureQuestion, opened, own_questions
from regard.tasks.scene_questions import ASKED, PLURALS
from regard.tasks.scenes import CLEAR, GLYPHS, Prior, Scenes, letter, partner, shape, usual_colour
from regard.tasks.yes_no import RULES, yes_no_scores


def test_priors_hold_and_conflicts_break_them():
    usual, broken = (Scenes(3, conflict=c).many(400) for c in (False, True))
    together = [any(partner(p) in s.shapes for p in s.shapes) for s in usual]
    assert 0.9 < sum(together) / len(together) < 1
    assert not any(partner(p) in s.shapes for s in broken for p in s.shapes)
    asked = 0.7
    of_prior = [t for s in Scenes(3, prior=Prior(coloured=asked)).many(400) for t in s.of("digit")]
    share = sum(t.colour == usual_colour(t.name) for t in of_prior) / len(of_prior)
    assert abs(share - asked) < 4 * (asked * (1 - asked) / len(of_prior)) ** 0.5
    digits = [t for s in broken for t in s.of("digit")]
    assert digits and all(t.colour != usual_colour(t.name) for t in digits)
    assert [s.pixels().tolist() for s in Scenes(1).many(2)] == [
        s.pixels().tolist() for s in Scenes(1).many(2)
    ]


def test_shapes_look_like_what_they_are_called():
    circle, square, triangle, cross = (shape(name) > 0 for name in ("circle", "square", "triangle", "cross"))
    for x in (circle, square, cross):
        assert (x == x.T).all() and (x == x[::-1]).all() and x[3:5, 3:5].all()
    # each in the box that it fills: a square all of it, a circle all but the corners, a cross two bars through it
    box = {
        name: x[x.any(1)][:, x.any(0)]
        for name, x in (("circle", circle), ("square", square), ("cross", cross))
    }
    assert box["square"].all() and not box["circle"].all() and box["circle"].mean() > 0.7
    half = len(box["cross"]) // 2
    assert box["cross"][half - 1 : half + 1].all() and not box["cross"][: half - 1, : half - 1].any()
    widths = triangle.sum(1)[triangle.any(1)]
    assert (
        (triangle == triangle[:, ::-1]).all() and (np.diff(widths) >= 0).all() and widths[-1] > 2 * widths[0]
    )


def test_questions_have_the_right_answer():
    scenes = Scenes(5, contrast=CLEAR)
    for scene in scenes.many(60):
        for kind, ask in ASKED.items():
            question = ask(scene, scenes.rng)
            if question is None:
                assert kind in ("word", "digit", "colour")
            elif kind == "exists":
                colour, shape = question.text.split()[3:5]
                assert (question.answer == "yes") == ((colour, shape) in scene.shapes)
            elif kind == "count":
                shape = next(n for n, plural in PLURALS.items() if plural == question.text.split()[2])
                assert int(question.answer) == [name for _, name in scene.shapes].count(shape)


def test_a_letter_is_drawn_as_its_rows_say():
    for name, rows in GLYPHS.items():
        drawn = ["".join(str(int(x)) for x in row) for row in letter(name)]
        read = [
            int(row, 2) >> 2 for row in drawn[: len(rows)]
        ]  # a column is left free before it, and two behind
        assert read == list(rows)
        assert not any(map(int, drawn[len(rows) :]))
    assert len({letter(name).tobytes() for name in GLYPHS}) == len(GLYPHS)


def test_half_of_what_is_asked_for_is_there():
    scenes = Scenes(6)
    said = [ASKED["exists"](scene, scenes.rng).answer for scene in scenes.many(400)]
    assert 0.42 < said.count("yes") / 400 < 0.58


@pytest.mark.parametrize("split", pope.SPLITS)
def test_pope_asks_half_for_what_is_there(split):
    asked = pope.pictures(pope.Config(split=split), 30, seed=1)
    assert len(asked) == 180 and sum(q.answer == "yes" for q in asked) == 90
    assert len({q.image for q in asked}) == 30


def test_adversarial_questions_ask_for_partners_first():
    asked = pope.pictures(pope.Config(split="adversarial", conflict=True), 20, seed=2)
    for scene, first in zip(pope.scenes(20, 2, "mixed", True), asked[1::6], strict=True):
        pair = tuple(first.text.split()[3:5])
        assert pair in [partner(there) for there in scene.shapes] and first.answer == "no"


def test_four_readings_of_one_answer():
    said = ["Yes.", "I know it is there", "No, it is not", "There isn't one", "yes and no", ""]
    truth = ["yes", "no", "no", "no", "yes", "no"]
    read = {name: [rule(s, t) for s, t in zip(said, truth, strict=True)] for name, rule in RULES.items()}
    assert read["opera"] == ["yes", "yes", "no", "no", "no", "yes"]
    assert read["vcd"] == ["yes", "no", "no", "yes", "yes", "yes"]
    assert read["lmms_eval"] == ["unknown"] * 6
    assert read["vlmevalkit"] == ["yes", "unknown", "no", "unknown", "unknown", "unknown"]
    scores = yes_no_scores(["yes", "no", "unknown", "yes"], ["yes", "no", "no", "no"])
    assert scores == {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3),
                      "yes_ratio": 0.5, "unknown": 0.25}  # fmt: skip


def test_chair_counts_mentions_and_drops_an_open_sentence():
    caption = "A red circle and two dogs. The cat sits on a"
    assert mentions(caption, ["red circle", "dog", "cat"]) == ["red circle", "dog", "cat"]
    assert without_last(caption) == "A red circle and two dogs."
    kept = counts(caption, ["red circle"], ["red circle", "dog", "cat"])
    assert (kept.false, kept.named, kept.found, kept.there) == (2, 3, 1, 1)
    facts = chair([kept, Counts(0, 1, 1, 2, 3)])
    assert facts["chair_i"] == 0.5 and facts["chair_s"] == 0.5 and facts["recall"] == pytest.approx(2 / 3)
    assert mentions("a hot dog", ["dog", "hot dog"], {"puppy": "dog"}) == ["hot dog"]


def answers(said=(), margins=()):
    return Answers(said=list(said), margins=list(margins))


def test_a_method_that_only_says_yes_more_often_does_not_work():
    """The control of equal bias says just the same."""
    g = np.random.default_rng(0)
    truth = g.random(200) < 0.5
    margins = np.where(truth, 1.0, -1.0) + g.normal(0, 2, 200) - 1.5
    questions = [
        PictureQuestion(None, "", "yes" if t else "no", f"image {i // 4}") for i, t in enumerate(truth)
    ]
    base = answers(["x"] * 200, margins)
    shifted = yes_no_facts(questions, answers(["x"] * 200, margins + 1.5), base)
    assert shifted["gain"] > 0.02 and shifted["over_control"] == 0 and not shifted["works"]
    better = yes_no_facts(questions, answers(["x"] * 200, np.where(truth, 1.0, -1.0)), base)
    assert better["works"] and better["over_control_interval"][0] > 0
    assert biased([0.3, -2.0, 1.0, 0.0], 2).tolist() == [True, False, True, False]


def test_a_method_that_only_says_less_does_not_work():
    """Captions cut to as many mentions are the control."""
    shown, missing = ("red circle",), "blue square"
    questions = [PictureQuestion(None, "", "", f"image {i}", objects=shown) for i in range(40)]
    questions.append(PictureQuestion(None, "", "", "image 40", objects=(missing,)))
    long = ["a red circle and a blue square"] * 40 + ["a blue square"]
    short = ["a red circle"] * 40 + ["a blue square"]
    facts = chair_facts(questions, answers(short), answers(long))
    assert facts["chair_i"] == 0 and facts["gain"] > 0.4 and facts["over_control"] == 0 and not facts["works"]
    assert sum(c.named for c in cut(questions, long, ["red circle", "blue square"], 50)) == 50


def test_images_and_annotations_of_ones_own(tmp_path):
    from PIL import Image

    Image.fromarray(Scenes(0).draw().pixels()).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    file = tmp_path / "asked.jsonl"
    published = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"}
    file.write_text(json.dumps(published) + "\n" + json.dumps({"image": "a.png", "objects": ["dog"]}) + "\n")
    found = own_questions(tmp_path, 4)
    assert found[0].answer == "no" and found[0].text.startswith("Is there") and found[1].objects == ("dog",)
    assert opened(found[0].picture).size == (32, 32)
    file.write_text(
        json.dumps({**published, "text": "a dog\u2028here?"}, ensure_ascii=False) + "\r\n", "utf-8"
    )
    assert own_questions(tmp_path, 4)[0].text == "a dog\u2028here?"  # which ends no line of JSON
    with pytest.raises(ValueError, match=r"the image can be read.*broken.png"):
        opened(tmp_path / "broken.png")
    with pytest.raises(ValueError, match="the image is there"):
        opened(tmp_path / "gone.png")
    file.write_text('{"image": "a.png"}\n')
    with pytest.raises(ValueError, match=r"annotations are lines of image.*line 1"):
        own_questions(file, 1)
    file.write_text("yes\n")
    with pytest.raises(ValueError, match="annotations are JSON"):
        own_questions(file, 1)
    coco = {"images": [{"id": 3, "file_name": "a.png"}], "categories": [{"id": 18, "name": "dog"}],
            "annotations": [{"image_id": 3, "category_id": 18}] * 2}  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    one = own_questions(tmp_path / "instances.json", 5)
    assert [q.objects for q in one] == [("dog",)]
    assert chair_page.pictures(chair_page.Config(), 5, 0, tmp_path / "instances.json")[0].text.startswith(
        "Please"
    )


def test_tasks_of_text_and_of_images_are_told_apart():
    assert catalog.asks_pictures("pope:split=random") and not catalog.asks_pictures("needle")
    assert catalog.metric_of("chair:conflict=true") == "chair" and catalog.metric_of("needle") == "exact"
    with pytest.raises(Unsupported, match="nothing about images"):
        catalog.picture_task("needle")
    with pytest.raises(Unsupported, match="no questions for a language model"):
        catalog.task("pope")
    with pytest.raises(KeyError, match="near names: pope"):
        catalog.picture_task("pop")
