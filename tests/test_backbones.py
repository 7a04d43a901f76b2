"""Backbones as Hugging Face's callers use them: what a forward is given is used, or refused by name."""

import copy
import io
import pickle

import pytest
import torch
from transformers import DataCollatorWithFlattening

from regard import catalog
from regard.core import Unsupported
from regard.kinds.block import BlockPage
from regard.kinds.mechanism import Mechanism
from regard.nn import RegardConfig, RegardForCausalLM, RegardForMaskedLM, RegardForSeq2SeqLM, register

CAUSAL = [
    name
    for name, page in catalog.every()
    if isinstance(page, Mechanism | BlockPage)
    and "causal_self" in page.patterns
    and not getattr(page, "roles", ())
]
MODELS = [RegardForCausalLM, RegardForMaskedLM, RegardForSeq2SeqLM]
IDS = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(0))


def built(model_class=RegardForCausalLM, mechanisms="softmax", **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "initializer_range": 0.3, "pad_token_id": 0}
    options = {"decoder_start_token_id": 1, **options}
    return model_class(RegardConfig(**{**sizes, "mechanisms": mechanisms, **options})).double().eval()


def labels_of(ids):
    """Some rows have fewer labels than others, so that a mean of means is not the mean."""
    labels = ids.clone()
    labels[0, 2:], labels[2, :3] = -100, -100
    return labels


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("model_class", MODELS)
def test_accumulated_steps_are_the_whole_batch(model_class):
    """What Trainer asks with gradient_accumulation_steps=4: four losses, each over the labels of all."""
    model, labels = built(model_class), labels_of(IDS)
    whole = model(IDS, labels=labels).loss
    whole.backward()
    wanted, total = gradients(model), 0
    shifted = labels[:, 1:] if model_class is RegardForCausalLM else labels
    for row in range(4):
        part = slice(row, row + 1)
        items = (shifted != -100).sum()
        loss = model(IDS[part], labels=labels[part], num_items_in_batch=items).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(gradients(model), wanted)


def test_a_loss_of_no_labels_is_zero_and_float64_stays():
    model = built()
    loss = model(IDS, labels=torch.full_like(IDS, -100)).loss
    assert loss == 0 and loss.dtype == torch.float64
    with pytest.raises(ValueError, match="labels stand under the tokens"):
        model(IDS, labels=IDS, logits_to_keep=2)


# packed texts

SIZES = (3, 5, 1, 5)
TEXTS = [row[:n] for row, n in zip(IDS, SIZES, strict=True)]


def flattened(**options):
    features = [{"input_ids": text.tolist()} for text in TEXTS]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, **options)(
        features
    )
    return dict(batch)


@pytest.mark.parametrize("told", ["position_ids", "seq_idx", "cu_seq_lens_q", "all"])
@pytest.mark.parametrize("model_class", [RegardForCausalLM, RegardForMaskedLM])
def test_packed_texts_do_not_mix(model_class, told):
    model, batch = built(model_class, ["softmax", "linear_attention"], conv=3), flattened()
    given = batch if told == "all" else {n: batch[n] for n in ("input_ids", "labels", told)}
    out = model(**given)
    alone = [model(text[None]).logits for text in TEXTS]
    torch.testing.assert_close(out.logits, torch.cat(alone, 1))
    if model_class is RegardForCausalLM:
        each = [model(t[None], labels=t[None]).loss * (len(t) - 1) for t in TEXTS if len(t) > 1]
        torch.testing.assert_close(out.loss, sum(each) / sum(len(t) - 1 for t in TEXTS))
    assert not torch.allclose(model(batch["input_ids"]).logits, out.logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_mechanism_and_block_packs(name):
    model, batch = built(mechanisms=name), flattened()
    out = model(batch["input_ids"], position_ids=batch["position_ids"], output_hidden_states=True)
    alone = [model(text[None], output_hidden_states=True) for text in TEXTS]
    torch.testing.assert_close(out.logits, torch.cat([one.logits for one in alone], 1))
    for i, hidden in enumerate(out.hidden_states):
        torch.testing.assert_close(hidden, torch.cat([one.hidden_states[i] for one in alone], 1))


def test_labels_behind_the_last_token_of_a_text_are_not_scored():
    """A collator marks them; whoever packs by hand may not."""
    model, batch = built(), flattened()
    marked = model(batch["input_ids"], labels=batch["labels"], position_ids=batch["position_ids"]).loss
    bare = model(batch["input_ids"], labels=batch["input_ids"], position_ids=batch["position_ids"]).loss
    torch.testing.assert_close(bare, marked)


def test_rows_may_each_hold_several_texts():
    model, ids = built(), IDS[:2]
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    out = model(ids, position_ids=places).logits
    for row, cut in ((0, 3), (1, 6)):
        for part in (slice(None, cut), slice(cut, None)):
            torch.testing.assert_close(out[row, part], model(ids[row : row + 1, part]).logits[0])


def test_position_ids_of_one_text_change_nothing():
    model = built()
    wanted = model(IDS).logits
    for places in (torch.arange(8)[None], torch.arange(8).expand(4, -1), torch.arange(2, 10)[None]):
        torch.testing.assert_close(model(IDS, position_ids=places).logits, wanted)
    padded = torch.cat([torch.zeros(4, 2, dtype=torch.long), IDS], 1)
    mask = (padded > 0).long()
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=counted, use_cache=True)
    torch.testing.assert_close(out.logits[:, 2:], wanted)
    step = {"past_key_values": out.past_key_values, "attention_mask": torch.cat([mask, mask[:, -1:]], 1)}
    with pytest.raises(ValueError, match=r"count the tokens of a text, padding left out .*counted=\[\[8\]"):
        model(IDS[:, :1], position_ids=torch.full((4, 1), 10), **step)
    more = model(IDS[:, :1], position_ids=torch.full((4, 1), 8), **step).logits
    torch.testing.assert_close(more[:, 0], model(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6, 7, 8]])}, ValueError, "where they start again"),
        ({"position_ids": torch.arange(7)[None]}, ValueError, r"position_ids is \[B, N\]"),
        ({"cu_seq_lens_q": [0, 3, 9]}, ValueError, r"ends at the number of tokens .*last=9, tokens=8"),
        ({"cu_seq_lens_q": [0, 3, 8], "cu_seq_lens_k": [0, 4, 8]}, ValueError, r"q=\[3, 5\], k=\[4, 4\]"),
        ({"cu_seq_lens_q": [0, 3, 8], "max_length_q": 4}, ValueError, r"longest=5, max_length_q=4"),
        ({"max_length_q": 4}, ValueError, "cu_seq_lens_q says where packed texts begin"),
        ({"cu_seq_lens_q": [0, 3, 8], "seq_idx": torch.tensor([[0] * 4 + [1] * 4])}, ValueError, "agrees"),
        ({"cu_seq_lens_q": [0, 3, 8], "use_cache": True}, Unsupported, "use_cache with packed texts"),
        (
            {"cu_seq_lens_q": [0, 3, 8], "attention_mask": torch.tensor([[0] + [1] * 7])},
            Unsupported,
            "beside padding",
        ),
    ],
)
def test_borders_that_contradict_are_errors(changes, error, message):
    with pytest.raises(error, match=message):
        built()(IDS[:1], **changes)


# what is accepted, what is refused


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("head_mask", torch.ones(2)), ("cache_position", torch.arange(8)), ("output_hiden_states", True),
     ("output_attentions", True), ("token_type_ids", torch.ones_like(IDS))],
)  # fmt: skip
def test_what_is_not_used_is_refused_by_name(model_class, name, value):
    more = {"decoder_input_ids": IDS} if model_class is RegardForSeq2SeqLM else {}
    model = built(model_class)
    with pytest.raises(Unsupported, match=name):
        model(IDS, **more, **{name: value})
    # nothing is asked by None
    assert model(IDS, **more, **{name: None}).logits.shape == (4, 8, 32)
    assert model(IDS, **more, token_type_ids=torch.zeros_like(IDS)).logits.shape == (4, 8, 32)


@pytest.mark.parametrize("name", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_an_encoder_decoder_does_not_pack(name):
    with pytest.raises(Unsupported, match=f"forward takes no '{name}'"):
        built(RegardForSeq2SeqLM)(IDS, decoder_input_ids=IDS, **{name: IDS})


@pytest.mark.parametrize("model_class", MODELS)
def test_hidden_states_and_tuples(model_class):
    more = {"decoder_input_ids": IDS} if model_class is RegardForSeq2SeqLM else {}
    model = built(model_class, num_hidden_layers=3)
    out = model(IDS, **more, labels=IDS, output_hidden_states=True)
    sides = [out.encoder_hidden_states, out.decoder_hidden_states] if more else [out.hidden_states]
    for hidden in sides:
        assert len(hidden) == 4 and all(h.shape == (4, 8, 16) for h in hidden)
        torch.testing.assert_close(hidden[0], model.embed(IDS))
    torch.testing.assert_close(model.lm_head(sides[-1][-1]), out.logits)
    loss, logits, *_ = model(IDS, **more, labels=IDS, return_dict=False)
    torch.testing.assert_close((loss, logits), (out.loss, out.logits))
    told = built(model_class, num_hidden_layers=3, output_hidden_states=True, return_dict=False)
    assert isinstance(told(IDS, **more), tuple)


def checkpoint(model, reentrant, what="enable"):
    """Under the name that this transformers has for it."""
    name = next(
        n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(model, f"{n}_{what}")
    )
    options = [{"use_reentrant": reentrant}] if what == "enable" else []
    getattr(model, f"{name}_{what}")(*options)


@pytest.mark.parametrize("mechanisms", ["softmax", "gla", "lightning_attention_tnl"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(mechanisms, reentrant):
    model = built(mechanisms=mechanisms).train()
    model(IDS, labels=IDS).loss.backward()
    wanted = gradients(model)
    checkpoint(model, reentrant)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(0))
    inner = next(m for m in model.model.layers[0].modules() if m is not model.model.layers[0])
    inner.register_forward_hook(lambda *_: calls.append(1))
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(gradients(model), wanted)
    if mechanisms != "lightning_attention_tnl":
        assert calls.count(1) == 2, "a layer is computed again for its gradients"
    checkpoint(model, reentrant, "disable")
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(gradients(model), wanted)


@pytest.mark.parametrize("model_class", [RegardForMaskedLM, RegardForSeq2SeqLM])
def test_checkpointing_reaches_encoders_and_memories(model_class):
    model = built(model_class).train()
    model(IDS, labels=IDS).loss.backward()
    wanted = gradients(model)
    for reentrant in (False, True):
        checkpoint(model, reentrant)
        model(IDS, labels=IDS).loss.backward()
        torch.testing.assert_close(gradients(model), wanted)


# embeddings, labels alone, weights


def test_labels_alone_are_shifted_to_the_right():
    model, labels = built(RegardForSeq2SeqLM), labels_of(IDS)
    asked = torch.cat([torch.ones(4, 1, dtype=torch.long), labels[:, :-1]], 1).masked_fill(
        torch.cat([torch.zeros(4, 1, dtype=torch.bool), labels[:, :-1] == -100], 1), 0
    )
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), asked)
    out = model(IDS, labels=labels)
    torch.testing.assert_close(out.loss, model(IDS, decoder_input_ids=asked, labels=labels).loss)
    with pytest.raises(ValueError, match="decoder_start_token_id=None"):
        built(RegardForSeq2SeqLM, decoder_start_token_id=None)(IDS, labels=labels)


def test_an_encoder_decoder_has_one_table_of_embeddings():
    model = built(RegardForSeq2SeqLM)
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model.encoder.embedding[0] is model.embed and model.lm_head.weight is model.embed.weight
    assert model(torch.full((1, 3), 39), decoder_input_ids=torch.full((1, 2), 39)).logits.shape == (1, 2, 40)
    table = torch.nn.Embedding(40, 16).double()
    model.set_input_embeddings(table)
    wanted = model(inputs_embeds=table(IDS), decoder_inputs_embeds=table(IDS)).logits
    torch.testing.assert_close(model(IDS, decoder_input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("model_class", [RegardForCausalLM, RegardForMaskedLM])
def test_embeddings_grow(model_class):
    model = built(model_class)
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model(torch.full((1, 3), 39)).logits.shape == (1, 3, 40)
    assert model.config.vocab_size == 40 and model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize("name", CAUSAL)
def test_weights_that_a_checkpoint_lacks_are_drawn(name, tmp_path):
    """A model of softmax layers read as one of this mechanism: its own parameters are not in the file."""
    built().float().save_pretrained(tmp_path)
    model = RegardForCausalLM.from_pretrained(tmp_path, mechanisms=name, conv=3)
    fresh = built(mechanisms=name, conv=3).float()
    for (label, weight), (_, like) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert weight.isfinite().all() and weight.abs().max() <= 5 * like.abs().max() + 1e-6, label
        assert like.std(correction=0) < 1e-6 or weight.std(correction=0) > 0, label
    assert torch.equal(model.embed.weight, RegardForCausalLM.from_pretrained(tmp_path).embed.weight)
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("model_class", MODELS)
def test_models_are_pickled_saved_and_copied(model_class):
    model = built(model_class, ["softmax", "gla"])
    more = {"decoder_input_ids": IDS} if model_class is RegardForSeq2SeqLM else {}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for back in (pickle.loads(pickle.dumps(model)), loaded, copy.deepcopy(model)):
        torch.testing.assert_close(back(IDS, **more).logits, model(IDS, **more).logits, rtol=0, atol=0)
        assert back.lm_head.weight is back.embed.weight


def test_a_cache_is_pickled_and_copied():
    model = built(mechanisms=["softmax", "gla"])
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    wanted = model(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(
        model(IDS[:, :1], past_key_values=pickle.loads(pickle.dumps(cache))).logits, wanted, rtol=0, atol=0
    )


def test_settings_go_through_a_configuration_file(tmp_path):
    """JSON has lists for tuples."""
    settings = {"agent_attention": {"agents": 4, "grid": (2, 4)}}
    model = built(RegardForMaskedLM, "agent_attention", settings=settings).float()
    model.save_pretrained(tmp_path)
    back = RegardForMaskedLM.from_pretrained(tmp_path).eval()
    assert back.model.layers[0].attention.method.config.grid == (2, 4)
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits)


def test_dropout_and_value_width_come_from_the_configuration():
    model = built(dropout=0.5, v_head_dim=4)
    assert model.model.layers[0].attention.v_proj.weight.shape == (8, 16)
    torch.testing.assert_close(model(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(IDS).logits, model(IDS).logits)
    with pytest.raises(Unsupported, match=r"dropout=0.5: gam"):
        built(mechanisms="gam", dropout=0.5)


# generating and compiling


def test_generate_in_every_mode_that_is_promised():
    model = built(mechanisms=["softmax", "gla"], eos_token_id=2).float()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    wanted = model.generate(IDS, **options)
    for changes in (
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"position_ids": torch.arange(8).expand(4, -1)},
    ):
        assert torch.equal(model.generate(IDS, **options, **changes), wanted), changes
    assert torch.equal(model.generate(inputs_embeds=model.embed(IDS), **options), wanted[:, 8:])
    for changes in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        assert model.generate(IDS, **{**options, **changes}).shape == (8, 13)
    asked = model.generate(IDS, **options, return_dict_in_generate=True, output_hidden_states=True)
    assert [h[0].shape[1] for h in asked.hidden_states] == [8, 1, 1, 1, 1]
    more = model.generate(wanted, past_key_values=asked.past_key_values, **options)
    assert torch.equal(more, model.generate(wanted, **options))
    for changes in (
        {"output_attentions": True, "return_dict_in_generate": True},
        {"cache_implementation": "static"},
    ):
        with pytest.raises(Unsupported, match=next(iter(changes))):
            model.generate(IDS, **options, **changes)
    with pytest.raises(Unsupported, match="no assisted generation"):
        model.generate(IDS[:1], **options, prompt_lookup_num_tokens=2)


def test_a_whole_model_is_one_graph_at_two_lengths():
    model = built(mechanisms=["softmax", "gla"])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for n in (8, 5):
            torch.testing.assert_close(
                compiled(IDS[:, :n], use_cache=False).logits, model(IDS[:, :n], use_cache=False).logits
            )
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch\.compile cannot trace them"):
        compiled(IDS, position_ids=torch.arange(8)[None], use_cache=False)
    torch._dynamo.reset()


def test_a_model_takes_no_tokens():
    model = built(mechanisms=["softmax", "lightning_attention_tnl"])
    assert model(IDS[:, :0]).logits.shape == (4, 0, 32) and model(IDS[:0]).logits.shape == (0, 8, 32)
    cache = model(IDS, use_cache=True).past_key_values
    assert model(IDS[:, :0], past_key_values=cache, use_cache=True).past_key_values.seen == 8


def test_once_registered_label_smoothing_knows_that_a_decoder_shifts():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    register()
    assert "RegardForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
