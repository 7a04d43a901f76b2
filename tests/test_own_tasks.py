"""Tasks and methods of one's own, given to compare as files, pages and methods."""

import json

import pytest

import regard
from regard import catalog
from regard.bench.asked import grid, named, parsed, specs
from regard.bench.cell import FULL, Cell
from regard.bench.compare import compare
from regard.bench.executor import InProcess
from regard.bench.measuring import Bench, measure
from regard.kinds.task import Task
from regard.models.shipped import load_shipped
from regard.tasks.own import own_task
from regard.testing.task import WordTokenizer
from regard.testing.tokenizers import ChatTokenizer

PROMPTS = (
    {"prompt": "one two three four", "answer": "five six"},
    {"prompt": "one two", "answer": "three", "id": 7},
    {"prompt": "one two three", "choices": ["yes", "no"], "answer": "no"},
    {"prompt": "one two three", "choices": ["yes", "no"], "answer": 0},
    {"prompt": "four", "regex": "a|b"},
)


@pytest.fixture
def written(tmp_path):
    """Writes lines into a file and gives its path."""

    def write(lines, name: str = "mine.jsonl"):
        text = lines if isinstance(lines, str) else "\n".join(map(json.dumps, lines))
        path = tmp_path / name
        path.write_text(text, encoding="utf8")
        return path

    return write


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(catalog, "_registered", dict(catalog._registered))


def asked(path, tokenizer=None, length: int = 0, count: int = 9, chat: bool = False, **settings):
    page = own_task(path)
    return page.samples(page.configure(**settings), tokenizer or WordTokenizer(), length, count, 0, chat=chat)


def test_prompts_are_asked_as_they_are(written):
    path, tokenizer = written(PROMPTS), WordTokenizer()
    samples = asked(path, tokenizer, tokens=30)
    assert [tokenizer.decode(s.prompt) for s in samples] == [f"<s>{line['prompt']}" for line in PROMPTS]
    assert {len(s.answer) for s in samples} == {30} and [s.counted > 0 for s in samples] == [True] * 4 + [
        False
    ]
    assert tokenizer.decode(samples[0].answer[: samples[0].counted]) == " five six"
    yes, no = (tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in ("yes", "no"))
    assert samples[2].choices == (yes, no) and samples[2].answer[0] == no and samples[3].answer[0] == yes
    assert [s.chance for s in samples] == [0, 0, 0.5, 0.5, 0] and samples[4].pattern == "a|b"
    assert own_task(path).own == 5 and len(asked(path, count=2)) == 2


def test_messages_go_through_the_chat_template(written):
    said = [{"role": "system", "content": "short"}, {"role": "user", "content": "one two"}]
    path, tokenizer = (
        written([{"messages": said, "answer": "x"}, {"prompt": "one", "answer": "y"}]),
        ChatTokenizer(),
    )
    first, second = asked(path, tokenizer, chat=True)
    template = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert first.prompt == tokenizer.encode(template, add_special_tokens=False)
    assert len(second.prompt) > len(tokenizer.encode("one"))
    with pytest.raises(ValueError, match=r"messages need a tokenizer with a chat template.*line 1"):
        asked(path)


def test_a_needle_stands_at_every_depth_of_a_text(written):
    line = {"statement": "Ada plays the cello.", "question": "What does Ada play?", "answer": "cello"}
    path, tokenizer = written([line]), WordTokenizer()
    samples = asked(path, tokenizer, length=120, count=4)
    assert {len(s.prompt) for s in samples} == {120} and own_task(path).own == 0
    assert [s.depth for s in samples] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    for s in samples:
        assert tokenizer.decode(s.prompt[slice(*s.evidence)]).strip() == line["statement"]
        assert tokenizer.decode(s.prompt).endswith("What does Ada play?\nAnswer:")


WRONG = {
    "": r"at least one line of JSON \(.*lines=0\)",
    "{": "line 1: a line is a JSON object",
    "[1]": "a line is a JSON object.*found='list'",
    '{"prompt": "a", "anwser": "b"}': r"found='anwser', near=\['answer'\]",
    '{"prompt": "a"}': "an answer, choices or a regex",
    '{"answer": "a"}': "a prompt or messages",
    '{"prompt": "", "answer": "a"}': "prompt is a text",
    '{"prompt": "a", "answer": 3}': "answer is a text",
    '{"prompt": "a", "messages": [], "answer": "a"}': "a prompt or messages",
    '{"messages": [{"role": "user"}], "answer": "a"}': "messages are a list of",
    '{"messages": [{"role": "assistant", "content": "a"}], "answer": "a"}': "last message is not the assistant's",
    '{"prompt": "a", "regex": "("}': "line 1: regex",
    '{"prompt": "a", "regex": "a", "answer": "a"}': "a regex or an answer",
    '{"prompt": "a", "choices": ["x"], "answer": "x"}': "choices are texts, two or more",
    '{"prompt": "a", "choices": ["x", "y"], "answer": 2}': "one of the choices, or its number from 0",
    '{"statement": "a", "answer": "b"}': "question is a text",
    '\n{"prompt": "a", "answer": "b"}\n{"statement": "a", "question": "b", "answer": "c"}': "not both.*line 2.*line 3",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_line_that_cannot_be_asked_is_refused(written, text):
    with pytest.raises(ValueError, match=WRONG[text]):
        regard.register(written(text))
    assert "mine" not in catalog.pages()


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="UTF-8"):
        regard.register(path)
    with pytest.raises(ValueError, match="a file that exists"):
        named(str(tmp_path / "absent.jsonl"))
    other = tmp_path / "needle.jsonl"
    other.write_text('{"prompt": "a", "answer": "b"}')
    with pytest.raises(ValueError, match="name of its own"):
        named(str(other))


def test_choices_that_begin_alike_are_refused(written):
    with pytest.raises(ValueError, match="begin with different tokens"):
        asked(written([{"prompt": "a", "choices": ["x y", "x z"], "answer": 0}]))


def test_own_questions_have_one_cell_a_method_and_budget(written):
    path = written(PROMPTS)
    cells = grid(["h2o"], [path, "needle"], [64, 96], [0.5, 0.25], None, 0, None, None)
    own = [c for c in cells if c.task == "mine"]
    assert [(c.what, c.method, c.length, c.samples) for c in own] == [
        (what, method, 0, 5) for what in ("cell", "timing") for method in (FULL, "h2o", "h2o")
    ]
    assert {c.samples for c in cells if c.task == "needle"} == {8}
    assert {c.samples for c in grid(["h2o"], [path], None, None, 2, 0, None, None)} == {2}


def test_methods_and_tasks_are_given_as_files_pages_and_methods(tmp_path, regard_command):
    page = tmp_path / "mine_cache.py"
    assert regard_command("new", "cache", "mine_cache", "--in", str(tmp_path)).returncode == 0
    assert parsed(str(page))[0] == "mine_cache" == named(page)
    assert parsed(regard.method("snapkv+adakv", window=8)) == ("snapkv+adakv", {"window": 8})
    assert parsed(catalog.get("h2o")) == ("h2o", {})
    assert (
        named(regard.method("needle", digits=3))
        == "needle:digits=3"
        == named(catalog.task("needle", digits=3))
    )
    with pytest.raises(ValueError, match="a Task is one of the catalogue's"):
        named(Task("mine", "Mine", "exact", lambda *asked, **more: []))
    assert specs("snapkv, streaming_llm:sinks=2,window=8") == ["snapkv", "streaming_llm:sinks=2,window=8"]
    for empty in ("", [""], " , "):
        with pytest.raises(ValueError, match="a name is no empty text"):
            specs(empty)
    with pytest.raises(ValueError, match="with budgets="):
        parsed("snapkv:budget=64")


def test_a_task_of_ones_own_is_compared(written, tmp_path):
    lines = [{"prompt": "The " + "quick brown fox " * n, "regex": "."} for n in (9, 12, 9)]
    path = written([*lines, {"prompt": "Say yes or no:", "choices": ["yes", "no"], "answer": 0}])
    model = load_shipped("lm")
    result = compare(
        model, "streaming_llm", f"{path}:tokens=3", budgets="50%", out=tmp_path / "run", at_floor=True,
        executor=InProcess(),
    )  # fmt: skip
    assert [r["status"] for r in (*result.rows, *result.timings)] == ["ok"] * 4
    longest = max(len(model[1].encode(line["prompt"])) for line in lines)
    assert {r["length"] for r in (*result.rows, *result.timings)} <= {longest, longest + 1}
    assert all(len(r["samples"]) == 4 and r["decode_ms"] > 0 for r in result.rows)
    assert result.rows[0]["quality"] >= 0.75
    alone = measure(Cell(FULL, "mine:tokens=3", 0, samples=4), Bench(*model))
    assert alone["quality"] == result.rows[0]["quality"]
