"""Retrieval and induction scores against transformers' own attention weights."""

from dataclasses import dataclass

import pytest
import torch

from regard.attaching import calibrate as heads
from regard.explaining import tracing as trace
from regard.methods.tracing import retrieval_heads as page
from regard.testing import zoo


@dataclass
class Question:
    prompt: list[int]
    answer: list[int]
    evidence: tuple[int, int]


@pytest.fixture
def model():
    return zoo.build("llama")[0]


@torch.no_grad()
def test_scores_are_those_of_a_loop(model):
    questions = [Question(row.tolist(), row[7:11].tolist(), (5, 13)) for row in torch.randint(3, 6, (3, 20))]
    model.lm_head.weight[:3], model.lm_head.weight[6:] = 0, 0  # it says what the prompts are made of
    model.set_attn_implementation("eager")
    expected = torch.zeros(3, 4)
    for question in questions:
        ids = torch.tensor([question.prompt])
        copied = [[set() for _ in range(4)] for _ in range(3)]
        for _ in question.answer:
            out = model(ids, output_attentions=True)
            token = int(out.logits[0, -1].argmax())
            for layer, weights in enumerate(out.attentions):
                for head, j in enumerate(weights[0, :, -1].argmax(-1).tolist()):
                    if 7 <= j < 11 and question.prompt[j] == token:
                        copied[layer][head].add(j)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        expected += torch.tensor([[len(c) / 4 for c in row] for row in copied]) / len(questions)
    model.set_attn_implementation("sdpa")
    result = trace.retrieval_heads(model, [questions])
    torch.testing.assert_close(result.scores, expected)
    assert expected.max() > 0
    assert result.layers == (0, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("how", page.HOW)
def test_switched_off_heads_act_in_generation_only(model, how):
    questions = [Question(zoo.ids(1, 20)[0].tolist(), [5, 6, 7], (0, 1))]
    [text] = trace.read_all(model, [questions])
    before = text.cache.layers[0].keys.clone()
    plain, _ = trace.answer(model, text)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    off, _ = trace.answer(model, text, page.ablate(every, page.Config(how=how)))
    assert not torch.equal(plain, off)
    assert torch.equal(before, text.cache.layers[0].keys)
    assert torch.equal(plain, trace.answer(model, text)[0])


@torch.no_grad()
def test_induction_and_echo_are_mass_on_earlier_copies(model):
    length, repeats = 20, 3
    result, ids = heads.retrieval_scores(model, length, repeats), heads.repeated(model, length, repeats, 0)
    model.set_attn_implementation("eager")
    weights = torch.stack(model(ids, output_attentions=True).attentions)[:, 0]  # [L, H, n, n]
    rows = torch.arange(ids.shape[1] - length, ids.shape[1])
    for kind, after in (("echo", 0), ("induction", 1)):
        mass = sum(weights[:, :, rows, rows - length * back + after] for back in range(1, repeats))
        torch.testing.assert_close(result[kind], mass.mean(-1))


def test_induction_heads_are_measured_once_and_again_when_weights_change(model):
    result = heads.induction_heads(model)
    assert sorted(result) == [(layer, group) for layer in range(3) for group in range(2)]
    measured = heads.measured(model)
    assert heads.induction_heads(model) == result and heads.measured(model) is measured
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
    assert heads.measured(model) is not measured


def test_random_ids_have_no_role():
    model, _ = zoo.build("llava")
    assert {0, 1, 2, 120} <= heads.special_ids(model)
    assert not {0, 1, 2, 120} & set(heads.repeated(model, 300, 2, 0)[0, 1:].tolist())
