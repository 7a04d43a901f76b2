"""Masks that show later tokens, on models that are causal: the mask says what is causal, in prompts and after."""

import pytest
import torch

from regard import catalog
from regard.attaching import masking
from regard.attaching.attachment import attach
from regard.core import Edit, Site, Unsupported
from regard.core.mask import predicate
from regard.testing.zoo import build

PREFIX = catalog.method("prefix", prefix=7)


@predicate()
def near(at):
    return at.q - at.k < 9


def text(n=20, rows=2):
    return torch.randint(3, 60, (rows, n), generator=torch.Generator().manual_seed(0))


def own_mask(seen, dtype=torch.float32):
    """[.., 1, N, N] 0 or the smallest number, as a user gives it to a model."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def prefix_mask(n, prefix=7):
    at = torch.arange(n)
    return (at <= at[:, None]) | (at < prefix)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("short", [0, 256])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gptoss"])
def test_it_is_the_model_under_that_mask(family, short, monkeypatch):
    """As a 4-D mask of the user's own, whether by lists of blocks or as a dense mask."""
    monkeypatch.setattr(masking, "SHORT", short)
    model, _ = build(family)
    ids = text()
    if family == "gptoss":
        said = "shows later tokens, and this layer has a mask of its own"
        with pytest.raises(Unsupported, match=said), attach(model, PREFIX):
            model(ids)
        return
    seen = prefix_mask(20)[None, None].expand(2, 1, -1, -1)
    wanted = model(ids, attention_mask=own_mask(seen)).logits
    with attach(model, PREFIX):
        found = model(ids).logits
    assert (found - wanted).abs().max() <= 1e-6
    assert (found - model(ids).logits).abs().max() > 1e-3


def test_tokens_after_the_prompt_and_padding():
    model, _ = build("llama")
    ids, mask = text(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    with attach(model, PREFIX):
        both = model.generate(ids, attention_mask=mask, **options)
        alone = model.generate(ids[:1, 5:], **options)
        whole = model(alone[:, :-1]).logits
    assert torch.equal(both[0, 20:], alone[0, 15:])
    assert torch.equal(whole[0, 14:].argmax(-1), alone[0, 15:])


def test_images_see_the_question_that_follows():
    """A text of one image and its question, with roles read off the ids; the second turn is another call."""
    model, _ = build("llama")
    ids = torch.tensor([[2, 50, 50, 50, 11, 12, 13, 4, 21, 22]])
    roles = {
        "image": lambda x: (x == 50).long(),
        "question": lambda x: torch.where((x == 50) | ((x > 10) & (x < 20)), 1, -1),
    }
    seen = torch.ones(10, 10).tril().bool()
    seen[1:4, 4:7] = True
    wanted = model(ids, attention_mask=own_mask(seen[None, None])).logits
    with attach(model, "aki_mma", roles=roles):
        assert (model(ids).logits - wanted).abs().max() <= 1e-6
        parts = model(ids[:, :8], use_cache=True)
        step = model(ids[:, 8:9], past_key_values=parts.past_key_values).logits
        assert (step[0, 0] - wanted[0, 8]).abs().max() <= 1e-6
        said = "lets tokens that were fed before see those of this call"
        cache = model(ids[:, :6], use_cache=True).past_key_values
        with pytest.raises(Unsupported, match=said):
            model(ids[:, 6:], past_key_values=cache)


def test_beside_another_mask_a_policy_and_an_edit():
    model, _ = build("llama")
    ids = text()
    seen = prefix_mask(20) & (torch.arange(20)[:, None] - torch.arange(20) < 9)
    wanted = model(ids, attention_mask=own_mask(seen[None, None].expand(2, 1, -1, -1))).logits
    with attach(model, [PREFIX, near()]):
        assert (model(ids).logits - wanted).abs().max() <= 1e-6
    with attach(model, [PREFIX, catalog.method("snapkv", budget=8, window=4)]) as attached:
        cache = model(ids, use_cache=True).past_key_values
        assert attached.stored() == [[8, 8]] * 3
        assert model(torch.tensor([[5], [6]]), past_key_values=cache).logits.isfinite().all()
    with attach(model, [PREFIX, Edit(Site("weights", layers=0), "scale", 1.0)]):
        edited = model(ids).logits
    alone = own_mask(prefix_mask(20)[None, None].expand(2, 1, -1, -1))
    assert (edited - model(ids, attention_mask=alone).logits).abs().max() <= 1e-6
