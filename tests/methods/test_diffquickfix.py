"""Diff-QuickFix: the solved weight against the paper's formula and its optimum, and the edit of models."""

import pytest
import torch
import transformers as tf

from regard.core import Unreachable, Unsupported
from regard.explaining import quickfix
from regard.methods.tracing.diffquickfix import METHOD, Config, edited, recovery
from regard.testing import zoo

PLACES = dict(positions=[[2, 3], [5, 4]], target_positions=[[1, 2], [3, 0]])


def clip_text():
    torch.manual_seed(0)
    config = tf.CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = tf.CLIPTextModel(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)  # a trained projection has a bias
    return model


def texts(n, seed):
    return torch.randint(3, 60, (2, n), generator=torch.Generator().manual_seed(seed))


def models():
    yield "clip text", clip_text()
    for family in ("llama", "gpt2", "neox"):
        yield family, zoo.build(family)[0]


def test_the_paper_formula_and_no_gradient_at_the_optimum():
    g = torch.Generator().manual_seed(0)
    w, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, 7), (4, 7), (4, 5)))
    new = edited(w, k, v, Config(0.3))
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(new, (0.3 * w + v.mT @ k) @ torch.linalg.inv(0.3 * eye + k.mT @ k))
    new.requires_grad_()
    loss = (new @ k.mT - v.mT).square().sum() + 0.3 * (new - w).square().sum()
    assert torch.autograd.grad(loss, new)[0].abs().max() < 1e-12


def test_neutral_settings_leave_the_weight():
    w, k, v = torch.randn(5, 7), torch.randn(4, 7), torch.randn(4, 5)
    assert torch.equal(edited(w, k, v, Config(**METHOD.card.neutral)), w)
    assert torch.equal(edited(w, k[:0], v[:0], Config()), w)
    assert edited(w.bfloat16(), k, v, Config()).dtype == torch.bfloat16
    torch.testing.assert_close(edited(w, k, k @ w.mT, Config()), w)  # values that are met already


def test_wrong_inputs_say_so():
    w, k, v = torch.randn(5, 7), torch.randn(4, 7), torch.randn(4, 5)
    for wrong in ((w.mT, k, v), (w, k[:3], v), (w, k[0], v[0])):
        with pytest.raises(ValueError, match="weight"):
            edited(*wrong, Config())
    for strength in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="strength"):
            Config(strength)
    with pytest.raises(ValueError, match="costs something"):
        recovery(torch.ones(2), torch.ones(2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"patched \[S, B\]"):
        recovery(torch.ones(2), torch.zeros(2), torch.ones(2))


@torch.no_grad()
@pytest.mark.parametrize(("name", "model"), models(), ids=lambda x: x if isinstance(x, str) else "")
def test_the_concept_answers_like_its_target_and_the_model_is_left_as_it_was(name, model):
    edit, target = texts(8, 0), texts(5, 1)
    path, projection = quickfix.output_projection(model, 0)
    own, copy, before = projection.weight, projection.weight.clone(), model(edit)[0]
    made = {}
    hook = projection.register_forward_hook(lambda _, args, out: made.update(out=out))
    model(target)
    wanted = torch.stack([made["out"][i, p] for i, at in enumerate(PLACES["target_positions"]) for p in at])
    with quickfix.edit_output_projection(model, 0, edit, target, **PLACES, strength=1e-6) as fix:
        assert fix.name == path and fix.error < 0.01 and projection.weight is not own
        during = model(edit)[0]
        got = torch.stack([made["out"][i, p] for i, at in enumerate(PLACES["positions"]) for p in at])
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())
    hook.remove()
    assert not torch.equal(before, during)
    assert projection.weight is own and torch.equal(own, copy)
    assert torch.equal(model(edit)[0], before)
    assert not projection._forward_hooks and not projection._forward_pre_hooks


@torch.no_grad()
def test_left_by_an_error_and_nested():
    model = clip_text()
    projection = model.get_submodule(quickfix.output_projection(model, 1)[0])
    own = projection.weight

    def enter():
        return quickfix.edit_output_projection(model, 1, texts(8, 0), texts(5, 1), **PLACES)

    with pytest.raises(KeyError), enter():
        raise KeyError
    assert projection.weight is own
    with enter():
        middle = projection.weight
        with enter():
            assert projection.weight is not middle
        assert projection.weight is middle
    assert projection.weight is own
    tensors = {id(p) for p in model.parameters()}
    with enter():
        assert len(tensors & {id(p) for p in model.parameters()}) == len(tensors) - 1  # one weight alone


@torch.no_grad()
def test_padding_is_no_part_of_a_key():
    model, ids = clip_text(), texts(6, 0)
    short = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    padded = {key: torch.cat([x, torch.zeros_like(x)], 1) for key, x in short.items()}
    _, projection = quickfix.output_projection(model, 0)
    keys = [quickfix.given(model, projection, text, [2, 5]) for text in (short, padded, ids)]
    torch.testing.assert_close(keys[1], keys[0])
    assert torch.equal(keys[0], keys[2])


def test_what_cannot_be_edited_is_refused():
    model = clip_text()
    with pytest.raises(ValueError, match="layer < 2"):
        quickfix.output_projection(model, 2)
    for positions in ([8, 1], [-1, 1], [[1]], [0.5, 1.0]):
        with (
            pytest.raises(ValueError, match="position"),
            quickfix.edit_output_projection(model, 0, texts(8, 0), texts(5, 1), positions, [1, 2]),
        ):
            pass
    with (
        pytest.raises(ValueError, match="for each"),
        quickfix.edit_output_projection(model, 0, texts(8, 0), texts(5, 1), [1, 2], [[1, 2], [1, 2]]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="eval"),
        quickfix.edit_output_projection(model.train(), 0, texts(8, 0), texts(5, 1), [1, 2], [1, 2]),
    ):
        pass
    with pytest.raises(Unreachable, match="no output projection"):
        quickfix.output_projection(torch.nn.Linear(2, 2), 0)
    model.get_submodule(quickfix.output_projection(model, 0)[0]).weight = torch.nn.Parameter(
        torch.zeros(32, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(Unsupported, match="not a Linear"):
        quickfix.output_projection(model, 0)
