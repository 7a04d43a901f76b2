"""Layers and backbones with every mechanism: decode = parallel, padding, saving, generating."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from regard import catalog
from regard.core import Unsupported
from regard.kinds.block import BlockPage
from regard.kinds.mechanism import Mechanism
from regard.nn import (
    Attention,
    RegardConfig,
    RegardForCausalLM,
    RegardForMaskedLM,
    RegardForSeq2SeqLM,
    register,
)
from regard.ops.rotary import rotate

# without those that read roles or are for one number of tokens, whose own tests have layers
EVERY = {
    name: page
    for name, page in catalog.every()
    if isinstance(page, Mechanism)
    and not page.roles
    and page.for_tokens is None
    and {"self", "causal_self"} & {*page.patterns}
}
CAUSAL = [name for name, page in EVERY.items() if "causal_self" in page.patterns]
BLOCKS = [
    name for name, page in catalog.every() if isinstance(page, BlockPage) and page.pattern == "causal_self"
]
# by their mathematics a step is not the row of the whole: the first tokens see each other
WHOLE_ONLY = {name for name, page in EVERY.items() if "decode" in page.exempt}
STEPPED = [name for name in CAUSAL if name not in WHOLE_ONLY]


def layer(name, pattern="causal_self", **options):
    torch.manual_seed(0)
    return Attention(16, 2, name, pattern, **options).double()


def x(n=9, seed=0, batch=2):
    return torch.randn(batch, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("name", STEPPED)
def test_token_by_token_is_all_at_once(name, conv):
    attention, text, state, rows = layer(name, conv=conv), x(), None, []
    for i in range(9):
        row, state = attention(text[:, i : i + 1], initial_state=state)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 1), attention(text)[0])


@pytest.mark.parametrize("name", STEPPED)
def test_padding_before_and_after_changes_nothing(name):
    attention, text = layer(name, conv=3), x()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    out, state = attention(text[:, :6], mask=mask[:, :6])
    more, state = attention(text[:, 6:7], initial_state=state, mask=mask[:, 6:7])
    last, _ = attention(text[:, 7:], initial_state=state)
    joined = torch.cat([out, more, last], 1)
    torch.testing.assert_close(joined[0, 3:], attention(text[:1, 3:])[0][0])
    torch.testing.assert_close(joined[1], attention(text[1:])[0][0])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    _, state = attention(text, mask=mask)
    more, _ = attention(text[:, :2], initial_state=state)
    torch.testing.assert_close(more[0], attention(torch.cat([text[:1, :6], text[:1, :2]], 1))[0][0, 6:])


@pytest.mark.parametrize("pattern", ["self", "cross", "causal_cross"])
@pytest.mark.parametrize("name", list(EVERY))
def test_other_patterns_or_a_refusal(name, pattern):
    if pattern not in EVERY[name].patterns:
        with pytest.raises(Unsupported, match=pattern):
            layer(name, pattern)
        return
    memory = x(7, seed=1) if "cross" in pattern else None
    out, state = layer(name, pattern)(x(), memory)
    assert out.shape == (2, 9, 16) and out.isfinite().all() and state is None


# aaren asks with a query of its own; routing's keys are its queries, and its centroids move by means, not by gradients;
# what seer and flux learn chooses without a gradient, and a conversion teaches it
UNUSED = {
    "aaren": ["q_proj.weight"],
    "routing_transformer": ["k_proj.weight", "params.centroids"],
    "seer_attention": ["params.w_q", "params.w_k"],
    "flux_attention": [f"params.{kind}_{i}" for i in range(1, 6) for kind in "wb"],
}


@pytest.mark.parametrize("name", list(EVERY))
def test_every_parameter_learns(name):
    pattern = "causal_self" if name in CAUSAL else "self"
    attention = layer(name, pattern)
    attention(x(12))[0].square().sum().backward()
    still = [
        n
        for n, p in attention.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert still == UNUSED.get(name, [])


def test_rotary_positions_turn_scores_by_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()
    at = torch.tensor([[3.0]])
    near, far = (rotate(q, at + s, 1e4) @ rotate(k, at + s - 2, 1e4).mT for s in (2, 40))
    torch.testing.assert_close(near, far)
    assert not torch.allclose(near, q @ k.mT)


def test_wrong_layers_are_errors():
    with pytest.raises(KeyError, match="softmax"):
        Attention(16, 2, "softmx")
    with pytest.raises(Unsupported, match="cache page"):
        Attention(16, 2, "h2o")
    with pytest.raises(ValueError, match="heads divide dim"):
        Attention(15, 2)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        Attention(16, 4, kv_heads=3)
    with pytest.raises(ValueError, match="memory"):
        layer("softmax", "cross")(x())
    with pytest.raises(KeyError, match="causal_self"):
        Attention(16, 2, pattern="causal")


# backbones


def config(mechanisms="softmax", **options):
    options = {"vocab_size": 32, "hidden_size": 16, "initializer_range": 0.3, "pad_token_id": 0, **options}
    return RegardConfig(mechanisms=mechanisms, **options)


def decoder(mechanisms, **options):
    torch.manual_seed(0)
    return RegardForCausalLM(config(mechanisms, **options)).eval()


def greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)


IDS = torch.randint(1, 32, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mechanisms", [*STEPPED, *BLOCKS, ["softmax", "linear_attention"]], ids=str)
def test_generation_is_the_forward_and_padding_does_not_change_it(mechanisms):
    model = decoder(mechanisms)
    out = greedy(model, IDS)
    with torch.no_grad():
        logits = model(out).logits[:, 7:-1]
    best = logits.gather(-1, out[:, 8:, None])[..., 0]
    torch.testing.assert_close(best, logits.amax(-1), rtol=1e-4, atol=1e-4)
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), IDS], 1)
    with torch.no_grad():
        left = model(padded, attention_mask=(padded > 0).long()).logits[:, 3:]
        torch.testing.assert_close(left, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(model, padded, attention_mask=(padded > 0).long())[:, 3:], out)


@pytest.mark.parametrize("mechanisms", ["softmax", "linear_attention"])
def test_beam_search_and_turns(mechanisms):
    model = decoder(mechanisms)
    assert greedy(model, IDS, num_beams=3).shape == (3, 13)
    first = model(IDS[:, :5], use_cache=True)
    second = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(second.logits, model(IDS).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_states_do_not_grow_where_the_mechanism_says_so():
    sizes = {}
    for name in ("softmax", "linear_attention"):
        model = decoder(name)
        sizes[name] = [model(IDS[:, :n], use_cache=True).past_key_values.nbytes() for n in (2, 8)]
    assert sizes["linear_attention"][0] == sizes["linear_attention"][1]
    assert sizes["softmax"][0] < sizes["softmax"][1]


@pytest.mark.parametrize("model_class", [RegardForCausalLM, RegardForMaskedLM, RegardForSeq2SeqLM])
def test_saved_and_loaded(model_class, tmp_path):
    torch.manual_seed(0)
    model = model_class(
        config(["softmax", "linear_attention"], conv=3 if model_class is not RegardForSeq2SeqLM else 0)
    ).eval()
    more = {"decoder_input_ids": IDS[:, :4]} if model_class is RegardForSeq2SeqLM else {}
    wanted = model(IDS, **more).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(model_class.from_pretrained(tmp_path).eval()(IDS, **more).logits, wanted)


def test_auto_classes_know_the_models_once_registered(tmp_path):
    from transformers import AutoModelForCausalLM

    decoder("softmax").save_pretrained(tmp_path)
    register()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), RegardForCausalLM)


@pytest.mark.parametrize("name", [n for n in EVERY if "causal_cross" in EVERY[n].patterns])
def test_an_encoder_decoder_asks_its_memory(name):
    torch.manual_seed(0)
    settings = config(cross_mechanisms=name, decoder_start_token_id=1)
    model = RegardForSeq2SeqLM(settings).eval()
    out = greedy(model, IDS)
    with torch.no_grad():
        logits = model(IDS, decoder_input_ids=out).logits[:, :-1]
        other = model(IDS.flip(0), decoder_input_ids=out).logits[:, :-1]
    torch.testing.assert_close(
        logits.gather(-1, out[:, 1:, None])[..., 0], logits.amax(-1), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(logits, other)


def test_labels_give_a_loss_that_falls():
    model = decoder(["softmax", "linear_attention"]).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_wrong_configurations_are_errors():
    with pytest.raises(ValueError, match="one for every layer"):
        decoder(["softmax"] * 3)
    with pytest.raises(Unsupported, match="mask page"):
        decoder("causal")
    with pytest.raises(ValueError, match="StateCache"):
        decoder("softmax")(IDS, past_key_values=DynamicCache(), use_cache=True)
