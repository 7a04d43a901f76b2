"""Composite attention: a slow loop, what updates an image token, and a causal model that it is attached to."""

import pytest
import torch

import regard
from regard import attach
from regard.core.roles import Roles
from regard.methods.masks import ee_mllm
from regard.testing.zoo import build

IMAGE = [0, 1, 1, 1, 0, 0, 2, 2, 0]


@pytest.mark.parametrize("visual", ["value", "nothing", "causal"])
@pytest.mark.parametrize("ahead", [False, True])
def test_by_a_slow_loop(visual, ahead):
    rows = [IMAGE, [-1, *IMAGE[:-1]]]
    mask = ee_mllm.build(ee_mllm.Config(visual, ahead))
    dense = mask.dense(len(IMAGE), roles=Roles(image=rows)).expand(2, -1, -1, -1)
    for row, image in enumerate(rows):
        for i in range(len(image)):
            for j in range(len(image)):
                if image[i] <= 0:
                    want = j <= i or (ahead and image[j] > 0)
                else:
                    want = {"value": i == j, "nothing": False, "causal": j <= i}[visual]
                assert bool(dense[row, 0, i, j]) == want, (row, i, j)


def test_what_updates_an_image_token():
    """With "value" its own value and no score, with "nothing" zeros; gradients are finite."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, len(IMAGE), 8, generator=g, requires_grad=True) for _ in range(3))
    visual, roles = torch.tensor(IMAGE) > 0, Roles(image=IMAGE)
    for name, wanted in (("value", v[:, :, visual]), ("nothing", torch.zeros_like(v[:, :, visual]))):
        mask = regard.method("ee_mllm", visual=name)
        out = regard.attend(q, k, v, "softmax", "self", mask=mask, roles=roles).out
        torch.testing.assert_close(out[:, :, visual], wanted)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert float(gradients[0][:, :, visual].abs().max()) < 1e-5, "its query is not read"


def test_ahead_changes_nothing_where_the_images_stand_first():
    roles = Roles(image=[1, 1, 2, 0, 0])
    literal, causal = (ee_mllm.build(ee_mllm.Config(ahead=a)).dense(5, roles=roles) for a in (True, False))
    assert torch.equal(literal, causal)


def test_unknown_updates_are_refused():
    with pytest.raises(ValueError, match="visual is one of value, nothing, causal"):
        ee_mllm.Config("values")


def test_attached_to_a_causal_model_no_image_token_reads_another():
    model, _ = build("llama")
    ids = torch.arange(3, 15)[None]
    roles = {
        "image": lambda ids: ((ids >= 4) & (ids < 9) | (ids == 100)).long()
    }  # tokens 1 to 5, edited or not
    # images that see the text after them, as the mask itself says it
    seen = ee_mllm.build(ee_mllm.Config()).dense(12, roles=Roles(image=roles["image"](ids)))
    own = torch.zeros(1, 1, 12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad(), attach(model, "ee_mllm", roles=roles):
        ahead = model(ids).logits
    with torch.no_grad():
        assert (ahead - model(ids, attention_mask=own).logits).abs().max() <= 1e-6
    edited = ids.clone()
    edited[0, 2] = 100
    states = {}
    with attach(model, "ee_mllm", ahead=False, roles=roles), torch.no_grad():
        for name, text in (("plain", ids), ("edited", edited)):
            states[name] = torch.stack(model(text, output_hidden_states=True).hidden_states[1:])
    change = (states["edited"] - states["plain"]).abs().amax((0, 1, 3))
    assert float(change[[0, 1, 3, 4, 5]].max()) == 0
    assert float(change[6:].min()) > 1e-6
