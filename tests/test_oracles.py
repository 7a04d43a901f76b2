"""Scans against TransformerLens on a tiny GPT-2: the same heads, the same layers, the same numbers (make oracles)."""

import copy
from functools import partial

import pytest
import torch
import transformers as tf

from regard.explaining.attribution import attribute
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.patching import patch

pytestmark = pytest.mark.oracles
lens = pytest.importorskip("transformer_lens", reason="the extra regard[oracles] is not installed")

# our quantity -> the function of transformer_lens.patching
HEADS = {
    "z": "get_act_patch_attn_head_out_all_pos",
    "q": "get_act_patch_attn_head_q_all_pos",
    "k": "get_act_patch_attn_head_k_all_pos",
    "v": "get_act_patch_attn_head_v_all_pos",
}
STREAMS = {
    "resid_pre": "get_act_patch_resid_pre",
    "resid_mid": "get_act_patch_resid_mid",
    "out": "get_act_patch_attn_out",
    "mlp": "get_act_patch_mlp_out",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    config.architectures = ["GPT2LMHeadModel"]
    model = tf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    # it puts modules of its own into the model that it is given
    return model, TransformerBridge.boot_transformers(str(folder), hf_model=copy.deepcopy(model))


@pytest.fixture(scope="module")
def prompts():
    g = torch.Generator().manual_seed(1)
    clean = torch.randint(3, 118, (3, 9), generator=g)
    corrupt = clean.clone()
    corrupt[:, 3] = 50
    return clean, corrupt


def change(logits):
    """The mean difference of two logits at the last token."""
    return (logits[:, -1, 7] - logits[:, -1, 9]).mean()


def ours(prompts):
    clean, corrupt = (Batch(ids, torch.ones_like(ids)) for ids in prompts)
    return Pairs(clean, corrupt, torch.full((3,), 7), torch.full((3,), 9))


@pytest.mark.parametrize("quantity", HEADS)
def test_heads(both, prompts, quantity):
    model, bridge = both
    clean, corrupt = prompts
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        theirs = getattr(lens.patching, HEADS[quantity])(bridge, corrupt, cache, change) - change(
            bridge(corrupt)
        )
    found = patch(model, ours(prompts), quantity)
    torch.testing.assert_close(found.values.mean(0).float(), theirs, rtol=1e-4, atol=1e-5)
    assert float(theirs.abs().max()) > 1e-2


@pytest.mark.parametrize("quantity", STREAMS)
def test_layers_by_token(both, prompts, quantity):
    model, bridge = both
    clean, corrupt = prompts
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        theirs = getattr(lens.patching, STREAMS[quantity])(bridge, corrupt, cache, change) - change(
            bridge(corrupt)
        )
    found = patch(model, ours(prompts), quantity, tokens=range(9))
    torch.testing.assert_close(found.values.mean(0).float(), theirs, rtol=1e-4, atol=1e-5)
    assert float(theirs.abs().max()) > 1e-2


def test_gradients(both, prompts):
    """Attribution is (clean - corrupt) · gradient, theirs by hooks on their own points."""
    model, bridge = both
    clean, corrupt = prompts
    with torch.no_grad():
        _, donors = bridge.run_with_cache(clean)
    kept = {}

    def forth(x, hook, name):
        kept[name] = x
        x.requires_grad_() if x.is_leaf else x.retain_grad()
        return x

    names = [f"blocks.{n}.attn.hook_z" for n in range(3)]
    with torch.enable_grad():
        logits = bridge.run_with_hooks(
            corrupt, fwd_hooks=[(name, partial(forth, name=name)) for name in names]
        )
        (change(logits) * len(clean)).backward()
    theirs = [((donors[n] - kept[n]) * kept[n].grad).reshape(3, 9, 4, 8).sum((1, 3)) for n in names]
    found = attribute(model, ours(prompts), ["z"])["z"]
    torch.testing.assert_close(found.values.float(), torch.stack(theirs, 1), rtol=1e-3, atol=1e-5)
