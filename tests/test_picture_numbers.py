"""Scores of answers about images, worked by hand: which way a gain goes, both ends of intervals, images drawn whole."""

import numpy as np
import pytest

from regard.bench.picture_scores import (
    chair_facts,
    draws_of,
    interval,
    paired,
    said_facts,
    scored,
    yes_no_facts,
)
from regard.bench.pictures import SCORES, Answers
from regard.catalog import get, list_methods
from regard.tasks.pictures import PictureQuestion


def asked(answers, objects=None, per_image: int = 1) -> list[PictureQuestion]:
    return [
        PictureQuestion(None, "", answer, f"image {i // per_image}", objects=tuple(objects or ()))
        for i, answer in enumerate(answers)
    ]


def yes_when(*margins: float) -> Answers:
    return Answers(said=["yes" if m > 0 else "no" for m in margins], margins=list(margins))


def test_images_are_drawn_whole():
    """Four questions to an image, all right or all wrong: the interval is that of 100 images, not of 400 questions."""
    images = [f"image {i // 4}" for i in range(400)]
    right = [float(i // 4 % 2) for i in range(400)]
    low, high = interval(images, lambda index: float(np.asarray(right)[index].mean()))
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.011)  # of binomial draws of 100; of 400: 45 to 55 %
    for drawn in draws_of(["a", "b", "b"])[:50]:
        assert list(drawn).count(1) == list(drawn).count(2)


def test_a_gain_is_over_the_base():
    images = [f"{i}" for i in range(4)]
    facts = scored(images, [1, 1, 1, 1], [1, 0, 1, 1])
    assert facts["quality"] == 1 and facts["quality_interval"] == [1, 1]
    assert facts["gain"] == 0.25 and facts["gain_interval"] == [0, 0.75]
    assert paired(images, [1, 0, 1, 1], [1, 1, 1, 1]) == (-0.25, [-0.75, 0])
    assert [s["score"] for s in scored(images, [1, 0, 1, 1], [1] * 4)["samples"]] == [1, 0, 1, 1]


def test_yes_and_no_by_hand():
    """The base says yes once; the method twice, both right; the control of equal bias adds the base's next margin."""
    questions = asked(["yes", "yes", "no", "no"])
    base, ours = yes_when(1.0, -3.0, -1.0, -2.0), yes_when(1.0, 1.0, -1.0, -1.0)
    facts = yes_no_facts(questions, ours, base)
    assert facts["quality"] == 1 and facts["gain"] == 0.25 and facts["yes_ratio"] == 0.5 and facts["f1"] == 1
    assert facts["over_control"] == 0.5  # the control says yes to the first and the third
    back = yes_no_facts(questions, base, ours)
    assert back["quality"] == 0.75 and back["gain"] == -0.25 and back["f1"] == pytest.approx(2 / 3)
    assert back["over_control"] == 0  # the ones it says yes to are tied, and the first of them is right
    assert facts["rules"]["first token"]["accuracy"] == facts["rules"]["opera"]["accuracy"] == 1


def test_captions_by_hand():
    """One false of three mentions, against the base's two of five; the base's first three are all there."""
    questions = [*asked([""], ["dog", "cat"]), PictureQuestion(None, "", "", "image 1", objects=("cup",))]
    base = Answers(said=["a dog and a cup.", "a cup, a cup and a cat."])
    ours = Answers(said=["a dog and a cat.", "a cat."])
    facts = chair_facts(questions, ours, base)
    assert facts["chair_i"] == pytest.approx(1 / 3) and facts["quality"] == pytest.approx(2 / 3)
    assert facts["gain"] == pytest.approx(2 / 5 - 1 / 3)
    assert facts["control"]["chair_i"] == 0 and facts["over_control"] == pytest.approx(-1 / 3)
    # a quarter of the draws takes the first image twice, another the second
    assert facts["quality_interval"] == pytest.approx([0, 1])
    assert facts["gain_interval"] == pytest.approx([1 / 3 - 1, 1 / 2])
    assert facts["over_control_interval"] == pytest.approx([-1, 0]) and not facts["works"]
    assert [(s["false"], s["named"]) for s in facts["samples"]] == [(0, 2), (1, 1)]


def test_a_method_works_where_the_whole_interval_is_better():
    many = asked(["a"] * 40)
    right, wrong = Answers(said=["A."] * 40), Answers(said=["b"] * 40)
    assert said_facts(many, right, wrong)["works"] and not said_facts(many, wrong, right)["works"]
    assert said_facts(many, right, wrong)["gain"] == 1 and not said_facts(many, right, right)["works"]


@pytest.mark.parametrize("name", [n for n in list_methods(kind="task") if get(n).pictures])
def test_who_answers_right_scores_one_and_who_answers_wrong_scores_none(name):
    """By the page's own metric, on its own questions; half of the images right scores a half."""
    page = get(name)
    questions = page.pictures(page.configure(), 4, 0)
    answer = right_and_wrong(page.metric, questions)
    for shares, quality in (([1] * 4, 1.0), ([0] * 4, 0.0), ([1, 1, 0, 0], 0.5)):
        images = list(dict.fromkeys(q.image for q in questions))
        mixed = Answers(*zip(*(answer[shares[images.index(q.image)]](q) for q in questions), strict=True))
        assert SCORES[page.metric](questions, mixed, mixed)["quality"] == pytest.approx(quality)


def right_and_wrong(metric: str, questions):
    """(what is said and its margin) of a question, answered wrong and right."""
    named = sorted({name for q in questions for name in q.objects})
    if metric == "chair":
        lists = [lambda q: [n for n in named if n not in q.objects][:1], lambda q: list(q.objects[:1])]
        return [lambda q, pick=pick: (f"a {pick(q)[0]}.", 0.0) for pick in lists]
    return [
        lambda q: ("nothing" if metric == "said" else {"yes": "no"}.get(q.answer, "yes"), -sign(q)),
        lambda q: (q.answer.upper() + ".", sign(q)),
    ]


def sign(question) -> float:
    return 1.0 if question.answer == "yes" else -1.0
