"""Grammars against a walk letter by letter, spoiled strings, features in words, and lists with exceptions."""

import random
from itertools import product

import pytest

from regard.catalog import task
from regard.claims.findings import cot_overthinking_tasks as claim
from regard.tasks import artificial_grammar, labels_with_exceptions
from regard.tasks.deliberation import LETTERS, Grammar, random_grammar
from regard.testing.task import WordTokenizer


def test_the_strings_of_a_grammar_are_those_that_it_accepts():
    every = ["".join(letters) for n in range(2, 6) for letters in product(LETTERS, repeat=n)]
    for seed in range(6):
        grammar = random_grammar(random.Random(seed), states=4, at_least=5, least=2, most=5)
        assert grammar.strings(2, 5) == sorted(text for text in every if grammar.accepts(text))
    assert not Grammar(({"M": 1}, {"M": 0}), (1,)).accepts("MM")
    assert not grammar.accepts("") and not grammar.accepts("QQ")


def test_every_state_matters():
    for seed in range(5):
        grammar = random_grammar(random.Random(seed))
        used = {0}
        for text in grammar.strings(4, 8):
            state = 0
            for letter in text:
                state = grammar.edges[state][letter]
                used.add(state)
        assert used == set(range(6)) and all(len(edges) == 2 for edges in grammar.edges)
    with pytest.raises(ValueError, match="in 1000 draws"):
        random_grammar(random.Random(0), states=2, at_least=1000)


def test_a_spoiled_string_differs_in_one_letter_and_breaks_the_rules():
    grammar, rng = random_grammar(random.Random(3)), random.Random(0)
    for text in grammar.strings(4, 8):
        change = grammar.spoiled(text, rng)
        assert change is not None and not grammar.accepts(change)
        assert len(change) == len(text) and sum(a != b for a, b in zip(change, text)) == 1
    assert Grammar(({"M": 0, "T": 0},), (0,)).spoiled("MT", rng) is None


def test_both_sides_judge_strings_that_neither_has_seen():
    learn, judge = claim.draw(1)
    assert len({*learn.strings, *judge.strings}) == claim.TRAINED + claim.TESTED
    assert 0.4 < sum(judge.follows) / claim.TESTED < 0.6 and sum(learn.follows) + sum(judge.follows) == 350
    assert claim.ids(["MV"]).tolist() == [[0] * 8 + [1, 4]]
    follows, broken = (
        {s for s, f in zip(learn.strings, learn.follows) if f == wanted} for wanted in (True, False)
    )
    assert not follows & broken and {*map(len, follows | broken)} <= set(range(claim.LEAST, claim.MOST + 1))


def test_a_short_tree_asks_no_more_than_it_may_and_finds_what_can_be_said():
    rng = random.Random(0)
    strings = ["".join(rng.choices(LETTERS, k=6)) for _ in range(700)]
    easy = claim.Judged(strings[:300], ["MT" in s or s.endswith("X") for s in strings[:300]])
    unseen = claim.Judged(strings[300:], ["MT" in s or s.endswith("X") for s in strings[300:]])
    accuracy, questions = claim.rules(easy, unseen, 5)
    assert accuracy == 1.0 and questions == 2
    parity = claim.Judged(strings[:300], [s.count("M") % 2 == 0 and s[1] > s[4] for s in strings[:300]])
    assert claim.rules(parity, parity, 3)[1] <= 3


@pytest.mark.parametrize("name", ["artificial_grammar", "labels_with_exceptions"])
def test_the_questions_say_what_is_looked_for(name):
    tokenizer = WordTokenizer()
    for thinking in (0, 30):
        for sample in task(name, thinking=thinking).samples(tokenizer, 300, 6, 1):
            text, (wanted,) = tokenizer.decode(sample.prompt), sample.wanted
            assert (wanted in text.lower().split("question:")[1]) or not thinking
            assert text.endswith("think step by step." if thinking else ("The string", "The group is"))
            assert len(sample.answer) >= thinking + 2


def test_strings_that_are_asked_about_follow_or_break_the_rules_in_turn():
    cfg = artificial_grammar.Config(examples=6)
    for seed in range(6):
        for follows in (True, False):
            grammar, told, asked = artificial_grammar.draw(cfg, random.Random(seed), follows)
            assert grammar.accepts(asked) == follows and asked not in told and len({*told}) == 6


def test_one_feature_tells_the_group_of_all_but_the_exceptions():
    for seed in range(10):
        cfg = labels_with_exceptions.Config(vehicles=11, exceptions=3)
        vehicles, groups = labels_with_exceptions.draw(cfg, random.Random(seed))
        agree = sorted(labels_with_exceptions.agreeing(vehicles, groups))
        assert agree[-1] == 8 and agree[-2] < 8 and len({v[-1] for v in vehicles}) == 11


def test_lists_ask_for_exceptions_every_other_time():
    tokenizer = WordTokenizer()
    for i, sample in enumerate(task("labels_with_exceptions").samples(tokenizer, 300, 8, 2)):
        listed, question = tokenizer.decode(sample.prompt).split("groups:\n")[1].split("\nQuestion: ")
        rows = [line.replace(":", ",").replace("plate ", "").split(", ") for line in listed.split("\n")]
        vehicles = [(*one.split(), size, plate) for one, size, plate, _ in rows]
        groups = [row[-1] for row in rows]
        agree = labels_with_exceptions.agreeing(vehicles, groups)
        rule = agree.index(max(agree))
        at = next(k for k, v in enumerate(vehicles) if v[-1] in question)
        assert groups[at] == sample.wanted[0]
        like = [g for v, g in zip(vehicles, groups) if v[rule] == vehicles[at][rule]]
        assert (like.count(groups[at]) < len(like) / 2) == bool(i % 2)
