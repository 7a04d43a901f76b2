"""The tasks: same seed same samples, exact lengths, the answer where it is said to be and nowhere else."""

import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from regard.catalog import get, method, standard_tasks, task
from regard.core import Card, Method, Unsupported
from regard.kinds.task import TaskPage, ask
from regard.tasks import Source, mqar
from regard.tasks.base import contains, continuation, even
from regard.tasks.recall import Config, near_keys, weave, words
from regard.tasks.zoology_mqar import check_sizes
from regard.testing.task import WordTokenizer as Words
from regard.testing.task import check_task

FACTS = ("needle", "recall")
LENGTHS = (256, 300, 1024)


class Chat(Words):
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "<s>user:" + messages[0]["content"] + "\nassistant:"


class Merging(Words):
    """Digits in pairs where they can be: passkeys of different lengths in tokens, as in many tokenizers."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [self.bos_token_id] if add_special_tokens else []
        for piece in re.findall(r"[1-4]{2}|\d| ?[^\W\d]+|\s|.", text):
            if piece not in self.known:
                self.known[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.known[piece])
        return ids


@pytest.mark.parametrize("name", standard_tasks())
@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_have_exactly_the_asked_length(name, length):
    samples = task(name).samples(Words(), length, 5, 0)
    assert {len(s.prompt) for s in samples} == {length}
    assert len({len(s.answer) for s in samples}) == 1
    assert all(s.prompt[0] == 0 and 0 not in s.prompt[1:] for s in samples)
    assert all(0 <= s.depth <= 1 for s in samples)


@pytest.mark.parametrize("name", standard_tasks())
def test_a_seed_fixes_the_samples(name):
    first = task(name).samples(Words(), 256, 4, 7)
    assert task(name).samples(Words(), 256, 4, 7) == first
    other = task(name).samples(Words(), 256, 4, 8)
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", standard_tasks())
def test_without_a_first_token_the_text_begins_at_once(name):
    tokenizer = Words(bos=None)
    for sample in task(name).samples(tokenizer, 256, 3, 0):
        assert len(sample.prompt) == 256
        assert 0 not in sample.prompt


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("kind", [Words, Chat, Merging])
def test_the_answer_is_in_the_evidence_and_nowhere_else(name, kind):
    for sample in task(name).samples(kind(), 512, 9, 3):
        first, past = sample.evidence
        assert contains(sample.prompt[first:past], sample.answer)
        assert not contains(sample.prompt[: first + 4], sample.answer)
        assert not contains(sample.prompt[past - 1 :], sample.answer)


@pytest.mark.parametrize("name", FACTS)
def test_the_question_asks_for_the_fact_of_the_evidence(name):
    tokenizer = Words()
    for sample in task(name).samples(tokenizer, 512, 9, 3):
        statement = tokenizer.decode(sample.prompt[slice(*sample.evidence)])
        key, value = re.fullmatch(r"\nThe code of (.+) is (.+)\.", statement).groups()
        assert tokenizer.decode(sample.prompt).endswith(f"\nQuestion: the code of {key} is")
        assert tokenizer.decode(sample.answer) == " " + value


@pytest.mark.parametrize(("values", "form"), [("digits", r"[1-9]{3}"), ("words", r"[a-z]+ [a-z]+")])
def test_recall_asks_among_keys_that_share_words(values, form):
    tokenizer = Words()
    for sample in task("recall", values=values).samples(tokenizer, 512, 9, 3):
        facts = re.findall(rf"\nThe code of (\w+ \w+) is ({form})\.", tokenizer.decode(sample.prompt))
        keys = [key for key, _ in facts]
        assert len({value for _, value in facts}) == 8
        assert sample.chance == 1 / 8
        assert len(keys) == len(set(keys)) == 8
        for key in keys:
            assert sum(bool(set(key.split()) & set(other.split())) for other in keys) > 1


def test_the_needle_goes_down_evenly():
    samples = task("needle").samples(Words(), 512, 5, 0)
    assert [s.depth for s in samples] == [0, 0.25, 0.5, 0.75, 1]
    starts = [s.evidence[0] for s in samples]
    assert starts[0] == 1
    gaps = [b - a for a, b in pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1
    assert samples[-1].evidence[1] == 512 - len(Words().encode("\nQuestion: the code of word is", False))


def test_perplexity_continues_the_text():
    tokenizer = Words()
    source = Source("mine", " ".join(words()))
    for sample in task("perplexity").samples(tokenizer, 100, 4, 0, source):
        assert tokenizer.decode(sample.prompt[1:] + sample.answer) in source.text
        assert len(sample.answer) == 64


@pytest.mark.parametrize("name", FACTS)
def test_a_chat_template_stands_around_the_prompt(name):
    tokenizer = Chat()
    for sample in task(name).samples(tokenizer, 400, 3, 0, chat=True):
        text = tokenizer.decode(sample.prompt)
        assert len(sample.prompt) == 400
        assert text.startswith("<s>user:")
        assert re.search(r"\nQuestion: the code of ([\w ]+) is\nassistant:The code of \1 is$", text)
    with pytest.raises(ValueError, match="chat template"):
        task(name).samples(Words(), 400, 3, 0, chat=True)


@pytest.mark.parametrize("name", standard_tasks())
def test_the_users_own_text_is_the_filler(name, tmp_path):
    (tmp_path / "mine.txt").write_text("zebra and gnu . " * 200)
    source = Source.from_path(tmp_path / "mine.txt")
    tokenizer = Words()
    sample = task(name).samples(tokenizer, 256, 1, 0, source)[0]
    assert tokenizer.decode(sample.prompt).count(" gnu") > 10


@pytest.mark.parametrize("name", standard_tasks())
def test_what_is_too_short_or_too_long_is_refused(name):
    with pytest.raises(ValueError, match="length"):
        task(name).samples(Words(), 1, 2, 0)
    with pytest.raises(ValueError, match=r"tokens.*'mine'"):
        task(name).samples(Words(), 5000, 2, 0, Source("mine", "some words " * 40))


def test_texts_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9" * 100)
    with pytest.raises(ValueError, match=r"exists.*none\.txt"):
        Source.from_path(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"200 characters.*empty\.txt.*got=0"):
        Source.from_path(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"UTF-8.*bytes\.txt.*at byte 3"):
        Source.from_path(tmp_path / "bytes.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"\.txt or \.md"):
        Source.from_path(tmp_path / "folder")


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.md").write_text("second " * 50)
    (tmp_path / "a.txt").write_text("first " * 50)
    text = Source.from_path(tmp_path).text
    assert text.index("second") > text.rindex("first")


def test_wrong_names_and_metrics_are_refused():
    with pytest.raises(KeyError, match="near names: recall"):
        task("recal")
    with pytest.raises(ValueError, match="metric"):
        TaskPage(Config, Card("Mine", "none", 2026, "mine"), samples=lambda *_: [], metric="accuracy")
    with pytest.raises(Unsupported, match="no questions"):
        ask(
            Method(
                "mine", TaskPage(Config, Card("Mine", "none", 2026, "mine"), generate=lambda *_: ()), Config()
            )
        )


def test_uneven_samples_are_refused():
    one, two = task("needle").samples(Words(), 256, 1, 0) + task("needle").samples(Words(), 257, 1, 0)
    with pytest.raises(ValueError, match="equally long"):
        even([one, two])


def test_pieces_are_woven_in_order():
    ids, starts = weave(random.Random(0), list(range(50)), [[100, 101], [200], []])
    assert [i for i in ids if i < 100] == list(range(50))
    assert ids[starts[0] : starts[0] + 2] == [100, 101]
    assert ids[starts[1]] == 200
    assert starts == sorted(starts)
    keys = near_keys(random.Random(0), 32)
    assert len(set(keys)) == 32


def test_a_continuation_is_the_ids_after_the_text_before():
    tokenizer = Words()
    assert tokenizer.decode(continuation(tokenizer, "code is", " 12")) == " 12"


@pytest.mark.parametrize("filler", [True, False])
@pytest.mark.parametrize(
    ("vocab", "length", "pairs"), [(16, 28, 7), (64, 64, 4), (256, 128, 16), (21, 20, 3)]
)
def test_mqar_labels_are_the_values_of_the_queried_keys(vocab, length, pairs, filler):
    inputs, labels = mqar(vocab, length, pairs, 40, 3, filler=filler)
    assert inputs.shape == labels.shape == (40, length)
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        value_of = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == pairs
        assert all(1 <= k < vocab // 2 for k in value_of)
        assert all(vocab // 2 <= v < vocab for v in value_of.values())
        queried = [i for i in range(2 * pairs, length) if row[i] in value_of]
        assert sorted(row[i] for i in queried) == sorted(value_of)
        assert all(i % 2 == 0 for i in queried)
        assert wanted == [value_of[row[i]] if i in queried else -100 for i in range(length)]


def test_mqar_is_fixed_by_its_seed_whatever_torch_has_drawn():
    first = mqar(64, 32, 4, 1100, 5)
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, mqar(64, 32, 4, 1100, 5), strict=True))
    assert not torch.equal(first[0], mqar(64, 32, 4, 1100, 6)[0])
    assert len({tuple(row) for row in first[0].tolist()}) == 1100


def test_mqar_gaps_follow_the_power_law():
    _, labels = mqar(16, 20, 1, 20_000, 0, power=0.5)
    drawn = Counter(((labels != -100).nonzero()[:, 1] // 2 - 1).tolist())
    weights = [(s + 1) ** -0.5 for s in range(9)]
    for s, weight in enumerate(weights):
        assert drawn[s] / 20_000 == pytest.approx(weight / sum(weights), abs=0.012)


@pytest.mark.parametrize(
    "wrong", [{"pairs": 0}, {"pairs": 8}, {"length": 27}, {"length": 24}, {"power": 0.0}, {"count": 0}]
)
def test_mqar_refuses_what_has_no_room(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        mqar(**({"vocab": 16, "length": 28, "pairs": 7, "count": 1, "seed": 0} | wrong))


def test_a_sample_without_evidence_among_others_is_found():
    """A task that has none says so of every sample; the law is then not asked."""
    assert check_task(method("perplexity"))["evidence"].startswith("not applicable")
    assert check_task(method("recall"))["evidence"] == "held"

    def forgetful(cfg, tokenizer, length, count, seed, source=None, *, chat=False):
        drawn = get("recall").samples(Config(), tokenizer, length, count, seed, source, chat=chat)
        return [replace(drawn[0], evidence=(0, 0)), *drawn[1:]]

    def sure(cfg, tokenizer, length, count, seed, source=None, *, chat=False):
        drawn = get("recall").samples(Config(), tokenizer, length, count, seed, source, chat=chat)
        return [replace(sample, chance=1.0) for sample in drawn]

    card = Card("Mine", "none", 2026, "mine")
    for fault, said in ((forgetful, "1 of 9 samples have no evidence"), (sure, r"lies in \[0, 1\)")):
        with pytest.raises(AssertionError, match=said):
            check_task(Method("mine", TaskPage(Config, card, samples=fault), Config()))


def test_an_odd_length_is_no_length_of_zoology_mqar():
    check_sizes(vocab=64, length=64, pairs=4, power=0.01)
    with pytest.raises(ValueError, match=r"length is even \(length=63\)"):
        check_sizes(vocab=64, length=63, pairs=4, power=0.01)
