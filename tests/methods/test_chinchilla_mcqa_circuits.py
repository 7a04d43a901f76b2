"""Direct effects add up to the difference of logits; projected queries and keys are what a model attends with."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from regard.claims import multiple_choice
from regard.claims.lab import seeded
from regard.claims.small_lm import small_gpt2
from regard.claims.tracing import chinchilla_mcqa_circuits as claim
from regard.core import Observer, Site
from regard.explaining.runs import forward
from regard.methods.tracing.chinchilla_mcqa_circuits import Config, axes_of, measure


@pytest.fixture
def model():
    return small_gpt2(multiple_choice.VOCABULARY, 4, 8, 64, multiple_choice.TOKENS, seed=3)


@pytest.fixture
def grouped():
    """A Llama whose keys two query heads share, with a gain that is not one, to be asked the toy's prompts."""
    config = LlamaConfig(
        vocab_size=multiple_choice.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with seeded(3):
        model = LlamaForCausalLM(config).eval()
        nn.init.uniform_(model.model.norm.weight, 0.5, 2.0)
    return model


class Words:
    """A tokenizer by letter runs: words, spaces with the word after them, signs."""

    def __init__(self):
        self.known = {}

    def encode(self, text):
        parts = re.findall(r" ?\w+| ?\(|\)[,?]|[^\w]", text)
        return [self.known.setdefault(part, len(self.known)) for part in parts]

    def convert_tokens_to_ids(self, names):
        return [self.known.setdefault(name, len(self.known)) for name in names]


def asked(seed, any_letters=False):
    return multiple_choice.choices(
        multiple_choice.knowledge(3), 16, torch.Generator().manual_seed(seed), any_letters
    )


@pytest.mark.parametrize("which", ["model", "grouped"])
def test_the_difference_of_logits_is_the_models(which, request):
    model, choice = request.getfixturevalue(which), asked(0)
    with torch.no_grad():
        logits, _ = forward(model, choice.batch)
    wanted = logits.gather(1, choice.right[:, None])[:, 0] - logits.gather(1, choice.wrong).mean(1)
    heads, mlps, whole = claim.effects(model, choice)
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    layers, of = model.config.num_hidden_layers, model.config.num_attention_heads
    assert heads.shape == (16, layers * of) and mlps.shape == (16, layers)
    if which == "grouped":  # no biases: what is left is of the embedding
        embedded = model.model.embed_tokens(choice.ids[:, -1]).detach()
        last = claim.used(model, choice.batch, {"resid_post": -1})["resid_post"][layers - 1][:, 0]
        to = model.lm_head.weight[choice.right] - model.lm_head.weight[choice.wrong].mean(1)
        eps = model.config.rms_norm_eps
        scale = (last.square().mean(-1, keepdim=True) + eps).rsqrt()
        left = (embedded * scale * model.model.norm.weight * to).sum(-1)
        torch.testing.assert_close(heads.sum(1) + mlps.sum(1) + left, wanted, rtol=1e-4, atol=1e-4)


def test_projected_queries_and_keys_are_what_is_attended_with(model):
    heads, choice = [(1, 2), (2, 0)], asked(1, any_letters=True)
    (known,) = claim.spaces(model, asked(0), heads, [3])
    look = [Observer("value", Site(q, tower="text"), name=q) for q in ("q", "k")]
    with torch.no_grad():
        _, plain = forward(model, choice.batch, look)
        _, edited = forward(model, choice.batch, [*claim.projecting(known, choice.labels), *look])
    before, after = ({q: {n: x for n, _, x in a.records[q]} for q in "qk"} for a in (plain, edited))
    rows = list(multiple_choice.LABELS)
    wanted = known["k", 1, 2].project(before["k"][1][:, 2, rows])
    torch.testing.assert_close(after["k"][1][:, 2, rows], wanted, rtol=1e-4, atol=1e-6)
    others = [i for i in range(choice.ids.shape[1]) if i not in rows]
    assert torch.equal(after["k"][1][:, 2, others], before["k"][1][:, 2, others])
    last = after["q"][2][:, 0, -1]
    torch.testing.assert_close(known["q", 2, 0].project(last), last, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(before["q"][2][:, 0, -1], last, atol=1e-5)


def test_keys_that_heads_share_are_projected_once_for_all_of_them(grouped):
    choice = asked(1)
    (known,) = claim.spaces(grouped, asked(0), [(1, 3), (1, 2), (2, 0)], [2])
    assert [key for key in known if key[0] == "k"] == [("k", 1, 1), ("k", 2, 0)]
    assert [key for key in known if key[0] == "q"] == [("q", 1, 3), ("q", 1, 2), ("q", 2, 0)]
    rows = list(choice.labels)
    with torch.no_grad():
        before = claim.used(grouped, choice.batch, {"k": rows})["k"][1]
        look = [Observer("value", Site("k", layers=1, rows=rows, tower="text"), name="k")]
        after = forward(grouped, choice.batch, [*claim.projecting(known, choice.labels), *look])[1].records[
            "k"
        ][0][2]
    torch.testing.assert_close(after[:, 1], known["k", 1, 1].project(before[:, 1]), rtol=1e-4, atol=1e-6)
    assert torch.equal(after[:, 0], before[:, 0]) and not torch.allclose(after[:, 1], before[:, 1], atol=1e-3)


def test_keys_of_each_label_keep_axes_of_its_own(grouped):
    fit, choice = asked(0), asked(1, any_letters=True)
    rows = list(choice.labels)
    with torch.no_grad():
        before, given = (claim.used(grouped, c.batch, {"k": rows})["k"][1] for c in (choice, fit))
        look = [Observer("value", Site("k", layers=1, rows=rows, tower="text"), name="k")]
        edits = claim.by_label(grouped, fit, [(1, 3), (1, 2)], 2)
        after = forward(grouped, choice.batch, [*edits, *look])[1].records["k"][0][2]
    for i in range(4):
        wanted = axes_of(given[:, 1, i], 2).project(before[:, 1, i])
        torch.testing.assert_close(after[:, 1, i], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(after[:, 0], before[:, 0])


def test_the_best_of_the_four_letters_is_an_answer(monkeypatch, model):
    choice = asked(2, any_letters=True)
    logits = torch.zeros(16, multiple_choice.VOCABULARY)
    logits[:, 0] = 9.0
    rows = torch.arange(16)
    logits[rows, choice.right] = 1.0
    logits[rows[:4], choice.wrong[:4, 0]] = 2.0
    logits[rows[12:], choice.right[12:]] = 10.0
    monkeypatch.setattr(claim, "forward", lambda *_: (logits, SimpleNamespace()))
    assert claim.accuracy(model, choice) == (75.0, 25.0)


def test_all_axes_change_nothing_and_centred_labels_have_three():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 8, generator=g, dtype=torch.float64)
    torch.testing.assert_close(axes_of(x, 8).project(x), x)
    four = torch.randn(1, 4, 8, generator=g, dtype=torch.float64).expand(6, -1, -1)
    torch.testing.assert_close(axes_of(four, 3).project(four), four)
    with pytest.raises(ValueError, match="as many vectors"):
        axes_of(x, 9)


def test_prompts_of_the_claim_have_one_right_choice():
    known = multiple_choice.knowledge(3)
    for any_letters in (False, True):
        choice = asked(4, any_letters)
        for ids, right, place in zip(choice.ids.tolist(), choice.right.tolist(), choice.place.tolist()):
            text = multiple_choice.FIRST + int(known[ids[1] - multiple_choice.QUESTION])
            at = multiple_choice.LABELS[place]
            assert (ids[at], ids[at + 1]) == (right, text) and ids.count(text) == 1 and ids.count(right) == 1
        assert choice.wrong.shape == (16, 3)
        fixed = [multiple_choice.LETTER + i for i in range(4)]
        assert (
            choice.ids[:, list(multiple_choice.LABELS)] == torch.tensor(fixed)
        ).all().item() != any_letters


def test_prompts_for_smollm2_ask_for_the_letter_after_the_right_text():
    words = Words()
    for any_letters in (False, True):
        choice = multiple_choice.colours(words, 12, torch.Generator().manual_seed(0), any_letters)
        names = {number: text for text, number in words.known.items()}
        for row, right, place in zip(choice.ids.tolist(), choice.right.tolist(), choice.place.tolist()):
            texts = [names[i] for i in row]
            label = choice.labels[place]
            assert texts[label - 2 : label] == texts[-2:] == [texts[3], " ("] and row[label] == right
            assert texts[label + choice.to_text] == texts[3]
            assert texts.count(texts[3]) == 3 and len({texts[i] for i in choice.labels}) == 4
        assert ([names[i] for i in choice.letters[0].tolist()] == ["A", "B", "C", "D"]) != any_letters
        plain, texts = choice.texts
        assert [names[i] for i in texts.tolist()] == [names[i] for i in choice.ids[:, 3].tolist()]
        assert [names[i] for i in plain[0].tolist()][-2:] == [names[int(choice.ids[0, 1])], "?"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rank >= 1"):
        Config(rank=0)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="as many components"):
        measure(torch.randn(2, 4, 3), x, x, x[:, None], torch.randn(2, 4, 3))
