"""regard explain: source tokens, why a head attends, questions, the whole run; killed and resumed; on many families."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tests.test_explain_scans import MORE, Words, random_pairs, tiny

from regard.core import Edit, Observer, Site, Unsupported
from regard.explaining import settings
from regard.explaining.explanation import Explanation, explain
from regard.explaining.images import processed
from regard.explaining.pairs import Batch, Pairs, batch_of
from regard.explaining.questions import Question, asked, read_questions
from regard.explaining.runs import capture, forward
from regard.explaining.settings import Settings
from regard.explaining.sources import (
    Without,
    attention_scores,
    carried,
    gradient_scores,
    last_rows,
    output_matrices,
    parts_of,
    written_lengths,
)
from regard.explaining.why import why
from regard.models.shipped import load_shipped
from regard.testing.zoo import build

FAST = Settings(verify=3, top=2, draws=3, removals=8, parts=8, edges=6, why=True)
PROMPT = "The code of warning is 16122.\nQuestion: the code of warning is "


def one_pair(n=9):
    return random_pairs(1, n)


# -- source tokens


@pytest.mark.parametrize("family", ["llama", "neox", "gemma2", "qwen3"])
def test_a_removed_token_was_never_there(family):
    """As if it were hidden from every query in every layer, its place left empty."""
    n = 6 if family == "gemma2" else 8  # within the window: past what is gone it reaches further
    model, pairs = tiny(family), one_pair(n)
    spans = [(0, 1), (1, 3), (3, 4), (4, n)]
    without = Without(model, spans, pairs)
    masks = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
    found = without(masks)
    for mask, score in zip(masks, found):
        gone = tuple(
            i for (a, b), keep in zip(spans, mask.tolist()) if not keep for i in range(a, b) if i != n - 1
        )
        edits = [Edit(Site("scores", keys=gone), "block")] if gone else []
        with torch.no_grad():
            logits, _ = forward(model, pairs.clean, edits)
        assert float(score) == pytest.approx(float(pairs.score(logits)), abs=2e-5)
    # and so it is beside an image
    torch.testing.assert_close(without.hidden(masks).double(), found, rtol=0, atol=2e-5)


def test_ways_are_their_definitions():
    model, pairs = tiny("qwen3"), one_pair()
    heads = [(1, 2), (2, 0)]
    rows = last_rows(model, pairs.clean)
    eager = build("qwen3")[0]
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(input_ids=pairs.clean.ids, output_attentions=True).attentions
    torch.testing.assert_close(rows[1], weights[1][0, :, -1])
    wanted = weights[1][0, 2, -1] + weights[2][0, 0, -1]
    torch.testing.assert_close(attention_scores(rows, heads, None).float(), wanted)
    lengths, matrices = written_lengths(model, pairs.clean), output_matrices(model)
    _, values = capture(model, pairs.clean, ["v"])
    by_hand = (values["v"][1][0, 1] @ model.model.layers[1].self_attn.o_proj.weight[:, 16:24].T).norm(dim=-1)
    torch.testing.assert_close(lengths[1][2], by_hand)
    assert matrices[1].shape == (4, 8, 32)
    g = gradient_scores(model, pairs)
    table = model.get_input_embeddings().weight
    x = table[pairs.clean.ids].detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits[:, -1]
    (grad,) = torch.autograd.grad(pairs.score(logits).sum(), x)
    torch.testing.assert_close(
        g, ((x - table.mean(0)) * grad).sum(-1)[0].detach().double(), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
def test_what_a_head_writes_is_known_on_every_form(family):
    """Of GPT-2's own matrices, which lie the other way, and before a norm after the sublayer."""
    matrices = output_matrices(tiny(family))
    assert set(matrices) == {0, 1, 2} and matrices[0].shape == (4, 8, 32)


def test_ways_are_judged_by_removal():
    model, pairs = tiny("llama"), random_pairs(3, 9)
    spans = parts_of([str(i) for i in range(9)], keep=1)
    found = carried(model, pairs, spans, [(1, 2)], samples=12, held=8, ks=(1, 2, 20))
    names = {c.method for c in found}
    assert {
        "attention",
        "attention·norm",
        "gradient",
        "removal",
        "surrogate",
        "random",
        "last layer",
    } == names
    assert [c.control for c in found] == sorted(c.control for c in found)
    removal = next(c for c in found if c.method == "removal")
    masks = torch.ones(2, len(spans), dtype=torch.bool)
    masks[1, removal.parts.argmax()] = False
    drops = [float(Without(model, spans, pairs.at([i]))(masks).diff().neg()) for i in range(3)]
    assert removal.drop["mean"][0] == pytest.approx(sum(drops) / 3, abs=1e-5)
    assert removal.drop["k"] == [1, 2]
    # the best single part is the one whose removal costs most: no other way's first part costs more
    assert all(
        drops[0] >= float(Without(model, spans, pairs.at([0]))(first(c.parts)).diff().neg()) - 1e-5
        for c in found
    )


def first(parts):
    masks = torch.ones(2, len(parts), dtype=torch.bool)
    masks[1, parts.argmax()] = False
    return masks


def test_parts():
    assert parts_of(["a", "b", "c"], keep=1) == [(1, 2), (2, 3)]
    text = ["word"] * 500
    for at in (60, 61, 200, 300):
        text[at] = ".\n"
    spans = parts_of(text, most=10, keep=1)
    assert spans[0][0] == 1 and spans[-1][1] == 500 and 8 <= len(spans) <= 16
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


# -- why a head attends


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3", "olmo2", "neox", "granite", "cohere"]
)
def test_the_parts_of_a_score_are_the_score(family):
    """Nothing is left where projections have no bias, norms of queries included; each part is what it is by hand."""
    model, pairs = tiny(family), one_pair(8)
    found = why(model, pairs.clean, 2, 3)
    assert float(found.shares.sum()) == pytest.approx(1, abs=1e-3)
    layers_before = 2
    assert len(found.parts) == 1 + layers_before * (4 + 1) + 1
    biased = family == "neox"
    rest = max(float(found.shares[-1].abs().max()), float(found.shares[:, -1].abs().max()))
    assert rest <= (10 if biased else 1e-3) * float(found.shares.abs().max())
    assert len(found.top(3)) == 3 and abs(found.top(1)[0]["share"]) == pytest.approx(
        float(found.shares.abs().max())
    )
    get = Observer("value", Site("scores", layers=2, heads=3, rows=-1), name="s")
    _, attached = forward(model, pairs.clean, [get])
    row = attached.records["s"][0][2][0, 0, 0]
    if family not in ("gemma2",):  # whose scores are capped after the product
        seen = row[row > -1e30]
        assert (
            found.score == pytest.approx(float(row[found.key] - seen.mean()), rel=2e-3, abs=1e-4)
            or family == "gemma3"
        )


def test_why_by_hand():
    """Before the first layer there is the embedding alone, and it is all of the score."""
    model, pairs = tiny("llama"), one_pair(6)
    found = why(model, pairs.clean, 0, 1, query=-1, key=2)
    assert found.parts == ("embedding", "rest")
    assert float(found.shares[0, 0]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="one prompt at a time"):
        why(model, random_pairs(2, 6).clean, 0, 1)
    with pytest.raises(ValueError, match="a head of this model"):
        why(model, pairs.clean, 0, 9)


def test_norms_of_unknown_form_are_refused():
    model, pairs = tiny("llama"), one_pair(6)
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x: x.tanh()
    with pytest.raises(Unsupported, match="scale cannot be held"):
        why(model, pairs.clean, 1, 0)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(hooks)


# -- questions


def test_a_prompt_is_corrupted_as_said(tmp_path):
    _, tokenizer = load_shipped("lm")
    swap = asked(tokenizer, [Question(PROMPT, "1", "7")], variations=3)
    assert "became '7' (2 of " in swap.corruption and len(swap.pairs) == 3
    clean, corrupt = swap.pairs.clean.ids, swap.pairs.corrupt.ids
    one, seven = (tokenizer.encode(t, add_special_tokens=False)[0] for t in "17")
    assert torch.equal(torch.where(clean == one, seven, clean), corrupt)
    assert not torch.equal(clean[0], clean[1])
    assert torch.equal(clean[:, -2:], clean[:1, -2:].expand(3, -1))
    drawn = asked(tokenizer, [Question(PROMPT, "1")], variations=2)
    assert "change places" in drawn.corruption
    assert torch.equal(drawn.pairs.clean.ids.sort(1).values, drawn.pairs.corrupt.ids.sort(1).values)
    given = asked(tokenizer, [Question(PROMPT, "1", "9", PROMPT.replace("16122", "96122"))], variations=1)
    assert int((given.pairs.clean.ids != given.pairs.corrupt.ids).sum()) == 1
    with pytest.raises(ValueError, match="equally long in tokens"):
        asked(tokenizer, [Question(PROMPT, "1", "9", PROMPT + "9")])
    with pytest.raises(ValueError, match="the target is one token"):
        asked(tokenizer, [Question(PROMPT, "161")])
    file = tmp_path / "several.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT, "foil": "9"}) + "\n" + json.dumps({"prompt": PROMPT}))
    assert [q.foil for q in read_questions(file, "1", "7", None)] == ["9", "7"]
    file.write_text(
        json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), "utf8"
    )  # which ends no line of JSON
    assert [q.prompt for q in read_questions(file, "1", None, None)] == ["a\u2028b"]
    file.write_text(json.dumps({"prompts": PROMPT}))
    with pytest.raises(ValueError, match="a line has prompt"):
        read_questions(file, None, None, None)


# -- all of it


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "neox", *MORE])
def test_explain_on_every_form(family, tmp_path):
    """Grouped heads, windows, norms after sublayers, parallel blocks: one call, and a page."""
    words = "one two three four five six seven eight nine ten"
    found = explain(tiny(family), Words(), words, target="alpha", foil="beta", variations=3, settings=FAST)
    data = found.found
    assert len(data["effects"]["mean"]) == 3 and len(data["effects"]["mean"][0]) == 4
    assert data["graph"]["edges"] and data["faithfulness"]["cpr"] + data["faithfulness"]["cmd"] >= 1 - 1e-6
    assert data["heads"][0]["why"] and len(data["controls"]) == 3
    json.dumps(data, allow_nan=False)
    page = found.save(tmp_path / "page.html").read_text(encoding="utf8")
    assert "<script" in page and "layer" in found.text(80) and "<script" not in found._repr_html_()


def test_a_foil_that_changes_nothing_is_not_the_corruption():
    """The target stands in the prompt and is not what the answer is read from: the page says what was asked instead."""
    model, tokenizer = load_shipped("lm")
    prompt = "Of page 1.\nThe code of warning is 26122.\nQuestion: the code of warning is "
    few = Settings(verify=2, top=1, draws=2, removals=4, edges=0)
    found = explain(model, tokenizer, prompt, target="2", foil="7", variations=4, settings=few).found
    assert "became '7'" in found["corruption"]
    prompt = "Of page 2.\nThe code of warning is 1.\nQuestion: the code of warning is "
    model = tiny("llama")
    found = explain(
        model, Words(), "one x two three four five six", target="x", foil="y", variations=4, settings=few
    ).found
    assert ("became" in found["corruption"]) != any("another corruption" in t for t in found["tested"])


def test_a_long_prompt_is_given_less_only_where_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(settings, "LONG", 6)
    words, stages = "alpha one two three four five six seven", []
    asked_for = Settings(verify=3, top=1, draws=2, removals=4)
    found = explain(tiny("llama"), Words(), words, target="alpha", foil="beta", settings=asked_for,
                    progress=lambda *a: stages.append(a[0])).found  # fmt: skip
    assert found["pairs"] == settings.FOR_LONG.variations and found["graph"] is None
    assert sum(map(sum, found["effects"]["exact"])) == 3
    assert all(way["drop"]["k"] == [1, 4] for way in found["sources"])
    assert {"gradients", "patching z", "controls", "random directions", "removals", "faithfulness"} <= {
        *stages
    }


def test_the_models_own_answer_is_explained_where_none_is_given():
    model, tokenizer = load_shipped("lm")
    found = explain(model, tokenizer, PROMPT, variations=2, settings=FAST).found
    assert found["target"] == "1" and found["metric"] == "log probability"


def test_explain_finds_the_token_that_is_copied():
    model, tokenizer = load_shipped("lm")
    few = Settings(verify=6, top=3, draws=4, removals=16, edges=6)
    found = explain(model, tokenizer, PROMPT, target="1", foil="7", variations=4, settings=few).found
    together, random_heads, random_change = (c["mean"] for c in found["controls"])
    assert together > 0.6 and abs(random_heads) < 0.2 and random_change < 0.5 * together
    attention = next(s for s in found["sources"] if s["method"] == "attention")
    first_one = found["tokens"].index("1")
    assert max(range(1, len(found["tokens"])), key=lambda i: attention["scores"][i]) == first_one


def test_an_explanation_goes_on_where_it_was_stopped(tmp_path):
    model, tokenizer = load_shipped("lm")
    how = dict(target="1", foil="7", variations=2, settings=FAST)
    whole = explain(model, tokenizer, PROMPT, **how).found

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage == "removals" and done > 10:
            raise Stop

    with pytest.raises(Stop):
        explain(model, tokenizer, PROMPT, **how, folder=tmp_path / "run", progress=stop)
    stages = []
    again = explain(
        model, tokenizer, PROMPT, **how, folder=tmp_path / "run", progress=lambda *a: stages.append(a[0])
    ).found
    same = ("effects", "controls", "graph", "tested")
    assert {k: again[k] for k in same} == {k: whole[k] for k in same}
    with pytest.raises(ValueError, match="of the same run"):
        explain(
            model,
            tokenizer,
            PROMPT,
            target="6",
            foil="7",
            variations=2,
            settings=FAST,
            folder=tmp_path / "run",
        )


def test_a_command_killed_with_9_resumes(tmp_path, regard_command):
    command = [sys.executable, "-m", "regard.cli", "explain", "--out", str(tmp_path / "out"), "--variations", "2",
               "--verify", "24", "--removals", "4", "--edges", "0", "--json"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first_run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    rows = tmp_path / "out" / "patching-z" / "results.jsonl"
    end = time.monotonic() + 90
    while time.monotonic() < end and not (rows.exists() and rows.read_bytes().count(b"\n") >= 1):
        time.sleep(0.02)
    first_run.send_signal(signal.SIGKILL)
    first_run.communicate()
    before = rows.read_bytes()
    assert before.count(b"\n") >= 1
    result = regard_command(*command[3:])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["model"] == "the shipped lm" and rows.read_bytes().startswith(
        before[: before.rfind(b"\n") + 1]
    )
    assert (tmp_path / "out" / "explanation.html").exists()


def test_bad_input_is_named(regard_command):
    result = regard_command("explain", "--target", "161")
    assert result.returncode == 2 and "the target is one token" in result.stderr
    result = regard_command("explain", "--model", "smollm2")
    assert result.returncode == 2 and "a prompt" in result.stderr


# -- images


class Processor:
    """What a processor of LLaVA's kind makes: 16 image tokens, and pixels."""

    image_token = "<image>"
    tokenizer = Words()

    def __call__(self, text, images, return_tensors):
        words = [[120] * 16 if w == "<image>" else Words().encode(w) for w in text.split()]
        ids = [i for part in words for i in part]
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids)),
            "pixel_values": images[0],
        }


def test_explain_a_vision_language_model():
    """The clean and the corrupted prompt differ by the image alone."""
    model, inputs = build("llava")
    image = inputs["pixel_values"]
    prompt, (clean, other) = processed(Processor(), "what is it", image, image.flip(-1) + 0.5)
    assert prompt[:16] == [120] * 16
    few = Settings(verify=2, top=1, draws=2, removals=4, parts=6, edges=4)
    how = dict(target="alpha", foil="beta", variations=1, settings=few)
    found = explain(model, Words(), prompt, images=(clean, other), **how).found
    assert found["corruption"] == "the other image" and found["effects"]["low"][0][0] is None
    wide = {"pixel_values": torch.zeros(1, 3, 64, 32)}
    with pytest.raises(ValueError, match="same grid of tokens"):
        explain(model, Words(), prompt, images=(clean, wide), **how)


def test_a_page_of_a_notebook():
    data = explain(
        tiny("llama"), Words(), "a b c d e f g h", target="x", foil="y", variations=2, settings=FAST
    )
    assert isinstance(data, Explanation)
    assert "layer" in data._repr_html_()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bfloat16(dtype):
    model = tiny("llama").to(dtype)
    pairs = Pairs(Batch(random_pairs(2, 8).clean.ids, torch.ones(2, 8).long()), random_pairs(2, 8).corrupt,
                  torch.tensor([7, 7]), torch.tensor([9, 9]))  # fmt: skip
    found = carried(model, pairs, [(1, 3), (3, 8)], [(0, 1)], samples=4, held=4, ks=(1,))
    assert all(torch.isfinite(c.tokens).all() for c in found)
    assert batch_of([[1, 2], [3]]).mask.tolist() == [[1, 1], [0, 1]]
