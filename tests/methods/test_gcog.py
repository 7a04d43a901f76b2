"""gCOG's questions read anew from their text: their answers, the balance of these, what each split keeps apart."""

import random
import re
from collections import Counter
from itertools import accumulate

import pytest

from regard.catalog import task
from regard.tasks import gcog
from regard.tasks.gcog import COLOURS, OPERATORS, SHAPES, Codes, Config
from regard.testing.task import ChatTokenizer

SPLITS = [
    ({}, 1, 10),
    ({"trained": True}, 1, 5),
    ({"split": "systematic"}, 1, 5),
    ({"split": "productive", "trained": True}, 3, 5),
    ({"split": "productive"}, 5, 5),
]
TRIED = 48


def parsed(question):
    """A tree as nested triples, from its words."""
    if not question.startswith("if ("):
        return question
    parts, rest = [], question.removeprefix("if ")
    for link in (" then ", " else ", ""):
        levels = accumulate({"(": 1, ")": -1}.get(sign, 0) for sign in rest)
        i = next(i for i, level in enumerate(levels) if level == 0)
        parts.append(parsed(rest[1:i]))
        assert rest[i + 1 :].startswith(link)
        rest = rest[i + 1 :].removeprefix(link)
    assert not rest
    return tuple(parts)


def answered(tree, objects):
    """From what is read: objects are (colour, shape, row, column)."""
    if isinstance(tree, tuple):
        holds = answered(tree[0], objects)
        assert holds in ("true", "false")
        return answered(tree[1] if holds == "true" else tree[2], objects)
    named = {word for word in tree.split() if word in COLOURS + SHAPES}
    found = [o for o in objects if named <= {*o[:2]}]
    if tree.startswith("is there any"):
        return str(bool(found)).lower()
    assert len(found) == 1, tree
    [(colour, shape, row, column)] = found
    if parity := re.fullmatch(r"is the (sum|product) of the row and column of the .* (even|odd)", tree):
        value = row + column if parity[1] == "sum" else row * column
        return str((value % 2 == 1) == (parity[2] == "odd")).lower()
    begins = {"what colour": colour, "what shape": shape, "where is the": f"row {row}, column {column}"}
    [answer] = [said for words, said in begins.items() if tree.startswith(words)]
    return answer


def read(sample, tokenizer):
    """(tree, objects) of a prompt."""
    text = tokenizer.decode(sample.prompt)
    told, asked = text.rsplit("\nQuestion: ", 1)
    lines = told.rsplit("row and column:\n", 1)[1].split("\n")
    objects = [re.fullmatch(r"(\w+) (\w+) at (\d) (\d)", line).groups() for line in lines]
    return parsed(asked.split("? Say")[0]), [(c, s, int(y), int(x)) for c, s, y, x in objects]


def depth(tree):
    return 1 if isinstance(tree, str) else 2 + max(map(depth, tree[1:]))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("settings", "deep", "crowd"), SPLITS)
def test_who_reads_the_objects_answers_every_question(settings, deep, crowd, chat):
    tokenizer, counts = ChatTokenizer(), Counter()
    for sample in task("gcog", **settings).samples(tokenizer, 600, TRIED, 1, chat=chat):
        tree, objects = read(sample, tokenizer)
        assert depth(tree) == deep
        assert (answered(tree, objects),) == sample.wanted
        assert len({o[2:] for o in objects}) == len(objects) <= crowd + 2 ** (deep // 2 + 1) - 1
        counts[len(objects)] += 1
    if settings:
        assert len(counts) > 3  # some more, some fewer
    else:
        assert {*counts} == {10, 11}  # the object that is asked for may be absent


@pytest.mark.parametrize(("settings", "deep", "crowd"), SPLITS)
def test_answers_are_balanced_and_so_is_what_a_guess_gets(settings, deep, crowd):
    drawn = task("gcog", **settings).samples(ChatTokenizer(), 600, TRIED, 2)
    said = Counter(sample.wanted[0] for sample in drawn)
    assert said["true"] == said["false"] == TRIED / 8
    assert sum(said[c] for c in COLOURS) == sum(said[s] for s in SHAPES) == TRIED / 4
    chances = {0.5: TRIED / 4, 0.1: TRIED / 2, 0.01: TRIED / 4}
    assert Counter(sample.chance for sample in drawn) == chances


def asks(tree):
    return (
        [tree]
        if isinstance(tree, gcog.Ask)
        else [a for t in (tree.condition, tree.then, tree.other) for a in asks(t)]
    )


def test_pairs_of_operator_and_operand_are_parted_and_all_words_are_trained_on():
    pairs = {
        trained: {gcog.draw(Config("systematic", trained), random.Random(i), i)[0] for i in range(4000)}
        for trained in (True, False)
    }
    assert not pairs[True] & pairs[False]
    known = {(a.operator, kind, getattr(a, kind)) for a in pairs[True] for kind in ("colour", "shape")}
    alone = {(op, kind) for op in OPERATORS for kind in ("colour", "shape")}
    for op, kind in alone - {
        ("colour", "colour"),
        ("shape", "shape"),
        ("colour", "shape"),
        ("shape", "colour"),
    }:
        assert {n for o, k, n in known if (o, k) == (op, kind)} == {*range(10)}
    sizes = {trained: len(found) for trained, found in pairs.items()}
    assert sizes[False] / sum(sizes.values()) == pytest.approx(1 / 5, abs=0.02)


def test_operators_of_conditions_and_leaves_are_all_drawn_and_either_branch_is_taken():
    conditions, leaves, taken = Counter(), Counter(), Counter()
    for i in range(400):
        tree, grid, answer = gcog.draw(Config("productive", True), random.Random(i), i)
        conditions[tree.condition.operator] += 1
        leaves[tree.then.operator] += 1
        taken[gcog.solve(tree.condition, grid)] += 1
        assert answer == gcog.solve(tree, grid)
    assert len(conditions) == 5 and min(conditions.values()) > 50
    assert len(leaves) == len(OPERATORS) and min(leaves.values()) > 8
    assert min(taken.values()) > 160


def test_ids_say_the_same_as_the_tree_and_its_grid():
    cfg = Config("productive", True, side=5, colours=6, shapes=7)
    codes, count = Codes(cfg), 64
    # nothing, if, operators, colours, shapes, false and true, places, objects
    assert codes.size == 2 + len(OPERATORS) + 6 + 7 + 2 + 25 + 6 * 7
    inputs, labels = gcog.generate(cfg, count, 3)
    assert inputs.shape == (count, 12 + 25) and inputs.max() < codes.size
    assert (labels[:, :-1] == -100).all()
    for i, (row, label) in enumerate(zip(inputs.tolist(), labels[:, -1].tolist(), strict=True)):
        tree, grid, answer = gcog.draw(cfg, random.Random(f"gcog 3 {i}"), i)
        assert row[:3] == [1, 0, 0]
        for ask, ids in zip(asks(tree), (row[3:6], row[6:9], row[9:12]), strict=True):
            colour, shape = (
                None if i == 0 else i - start
                for i, start in zip(ids[1:], (codes.colour, codes.shape), strict=True)
            )
            assert ask == gcog.Ask(OPERATORS[ids[0] - codes.operator], colour, shape)
        seen = {divmod(n, 5): divmod(i - codes.object, 7) for n, i in enumerate(row[12:]) if i}
        assert seen == grid
        words = {codes.colour + n: COLOURS[n] for n in range(6)} | {
            codes.shape + n: SHAPES[n] for n in range(7)
        }
        words |= {codes.truth: False, codes.truth + 1: True} | {
            codes.place + n: divmod(n, 5) for n in range(25)
        }
        assert words[label] == answer and type(words[label]) is type(answer)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"split": "others"}, "split is one of"),
        ({"colours": 4}, "5 <= colours"),
        ({"crowd": 3}, "distractors <= crowd"),
        ({"side": 3}, "a cell for each object"),
        ({"split": "productive", "side": 5}, "suffice for the operators"),
        ({"split": "productive", "shapes": 6}, "suffice for the operators"),
    ],
)
def test_what_has_no_room_is_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        Config(**settings)


def test_a_tree_needs_an_object_for_each_operator():
    kinds = (("productive", False), ("productive", True), ("distractor", True))
    assert [Config(split, trained).needed for split, trained in kinds] == [7, 3, 1]
    assert Config("productive", colours=7, shapes=7).needed == 7  # as many as there are


def test_a_guess_is_right_as_often_as_there_are_answers_of_its_sort():
    """Codes of places, yes or no, colours, shapes."""
    cfg = Config(side=4, colours=7, shapes=5)
    chances = [gcog.chance_of(cfg, answer) for answer in ((1, 2), True, COLOURS[0], SHAPES[0])]
    assert chances == [1 / 16, 1 / 2, 1 / 7, 1 / 5]
