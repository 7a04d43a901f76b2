"""VISTA steers the last token of a prompt and every token after it; earlier layers are read on models of text too."""

import pytest
import torch

from regard import attach
from regard.methods.steering import vista as page
from regard.ops.steered import Steered
from regard.testing.zoo import build

ROLES = {"context": lambda ids: torch.arange(ids.shape[1]).expand(ids.shape) == 2}


def test_bad_settings_are_refused():
    for wrong in ({"strength": -1.0}, {"mix": 1.5}, {"window": 0}, {"hides": ""}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            page.Config(**wrong)


@pytest.mark.parametrize("prompt", [False, True])
def test_of_a_prompt_the_last_token_is_steered_or_all_are(prompt):
    x, v = torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    at = Steered(layer=0, layers=1, phase="prefill", memory=v, rows=torch.tensor([[0, 1, 2], [0, 1, -1]]))
    same = (page.steer(at, x, page.Config(prompt=prompt)) == x).all(-1)
    assert same.tolist() == ([[False] * 3] * 2 if prompt else [[True, True, False], [True, False, True]])
    at.phase = "decode"
    assert not torch.equal(page.steer(at, x[:, :1], page.Config()), x[:, :1])


def test_logits_of_a_text_model_are_augmented_by_its_earlier_layers():
    model, inputs = build("llama")
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with attach(model, "vista", strength=0.0, mix=0.5, hides="context", roles=ROLES):
            mixed = model(**inputs).logits[:, -1]
        early = [model.lm_head(model.model.norm(h[:, -1])) for h in plain.hidden_states[1:-1]]
    wanted = 0.5 * plain.logits[:, -1] + 0.5 * torch.stack(early).mean(0)
    assert torch.allclose(mixed, wanted, atol=1e-5)
