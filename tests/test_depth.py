"""Residuals along depth: a backbone reads by the equations written out here, however it is run, saved and trained."""

import copy
import inspect

import pytest
import torch

import regard
from regard import catalog
from regard.core import Unsupported
from regard.core.mask import window
from regard.kinds.block import BlockPage
from regard.kinds.mechanism import Mechanism
from regard.nn import RegardConfig, RegardForCausalLM, RegardForMaskedLM, RegardForSeq2SeqLM

IDS = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(0))
BLOCKS = [name for name, page in catalog.every() if isinstance(page, BlockPage)]
CAUSAL = [
    name
    for name, page in catalog.every()
    if isinstance(page, Mechanism) and "causal_self" in page.patterns and not page.roles
]
STEPPED = [name for name in CAUSAL if "decode" not in catalog.get(name).exempt]
MODELS = [RegardForCausalLM, RegardForMaskedLM, RegardForSeq2SeqLM]


def built(model_class=RegardForCausalLM, mechanisms="softmax", **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "initializer_range": 0.3, "pad_token_id": 0}
    options = {"decoder_start_token_id": 1, **options}
    return model_class(RegardConfig(**{**sizes, "mechanisms": mechanisms, **options})).double().eval()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def checkpoint(model, reentrant, what="enable"):
    """Under the name that this transformers has for it."""
    name = next(
        n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(model, f"{n}_{what}")
    )
    getattr(model, f"{name}_{what}")(*([{"use_reentrant": reentrant}] if what == "enable" else []))


def deep(model_class=RegardForCausalLM, mechanisms="softmax", block=1, zero=False, **options):
    """A model with attention residuals whose queries are not zero, unless asked for."""
    options = {"residual": "attention", "num_hidden_layers": 3, **options}
    settings = {"attention_residuals": {"block": block}, **options.pop("settings", {})}
    model = built(model_class, mechanisms, settings=settings, **options)
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("reads.queries") and not zero:
            p.data.normal_(0, 0.7, generator=draw)
    return model


def more(model):
    return {"decoder_input_ids": IDS} if isinstance(model, RegardForSeq2SeqLM) else {}


def read(w, outputs, block=1):
    """Σ softmax(w · RMSNorm(v)) v over [v_0, finished sums, sum so far], each [B, N, C]."""
    later = [sum(outputs[i : i + block]) for i in range(1, len(outputs), block)]
    v = torch.stack([outputs[0], *later])
    scores = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w).sum(-1, keepdim=True)
    return (scores.softmax(0) * v).sum(0)


def by_hand(model, ids, block=1):
    """The logits of a decoder by the paper's equations: (logits, what the first sublayer of each layer reads)."""
    stack, outputs, number, inputs = model.model, [model.embed(ids)], iter(model.model.reads.queries), []
    for layer in stack.layers:
        inputs.append(read(next(number), outputs, block))
        outputs.append(layer.attention(layer.norm(inputs[-1]))[0])
        outputs.append(layer.mlp(layer.mlp_norm(read(next(number), outputs, block))))
    last = read(next(number), outputs, block)
    assert next(number, None) is None, "one query for each sublayer and one for the last norm"
    return model.lm_head(stack.norm(last)), inputs


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_a_decoder_is_the_papers_equations(block):
    model = deep(block=block)
    wanted, inputs = by_hand(model, IDS, block)
    out = model(IDS, output_hidden_states=True)
    torch.testing.assert_close(out.logits, wanted)
    for hidden, h in zip(out.hidden_states, inputs, strict=False):
        torch.testing.assert_close(hidden, h)
    assert not torch.allclose(built(num_hidden_layers=3)(IDS).logits, wanted)
    grads = [torch.autograd.grad(x.sin().sum(), list(model.parameters()), allow_unused=True)
             for x in (out.logits, wanted)]  # fmt: skip
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if right is None else right)


def test_queries_of_zero_take_means():
    model = deep(zero=True)
    assert not model.model.reads.queries.any()
    outputs, seen = [model.embed(IDS)], []
    for layer in model.model.layers:
        for norm, sublayer in ((layer.norm, layer.attention), (layer.mlp_norm, layer.mlp)):
            norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
            sublayer.register_forward_hook(
                lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
            )
    model.model.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(IDS)
    assert len(outputs) == len(seen) == 7
    for i, h in enumerate(seen):
        torch.testing.assert_close(h, torch.stack(outputs[: i + 1]).mean(0), rtol=0, atol=1e-12)


def test_blocks_of_one_sublayer_are_full_attention_residuals():
    full, blocks = deep(settings={}), deep(block=1)
    torch.testing.assert_close(blocks(IDS).logits, full(IDS).logits, rtol=0, atol=0)
    assert (deep(block=2)(IDS).logits - full(IDS).logits).abs().max() > 1e-3


# however it is run


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("name", STEPPED)
def test_token_by_token_is_all_at_once(name, block):
    model, cache, rows = deep(mechanisms=name, block=block), None, []
    for i in range(8):
        out = model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits)
    torch.testing.assert_close(torch.cat(rows, 1), model(IDS, use_cache=False).logits)


def test_nothing_goes_from_token_to_token_along_depth():
    caches = [m(IDS, use_cache=True).past_key_values for m in (deep(), built(num_hidden_layers=3))]
    assert caches[0].nbytes() == caches[1].nbytes()


@pytest.mark.parametrize("model_class", MODELS)
def test_padding_changes_nothing(model_class):
    model, left = deep(model_class, block=2), torch.zeros(4, 3, dtype=torch.long)
    padded = torch.cat([left, IDS], 1)
    out = model(padded, attention_mask=(padded > 0).long(), **more(model)).logits
    torch.testing.assert_close(out[:, -8:], model(IDS, **more(model)).logits)


def test_packed_texts_do_not_mix():
    model, texts = deep(block=2), [row[:n] for row, n in zip(IDS, (3, 5, 1, 5), strict=True)]
    places = torch.cat([torch.arange(len(text)) for text in texts])[None]
    out = model(torch.cat(texts)[None], position_ids=places).logits
    torch.testing.assert_close(out, torch.cat([model(text[None]).logits for text in texts], 1))


@pytest.mark.parametrize("name", [*CAUSAL, *BLOCKS])
def test_every_mechanism_takes_it_and_no_block_does(name):
    if name in BLOCKS:
        rule = f"residual='attention': {name} is a whole layer"
        if catalog.get(name).pattern != "causal_self":
            rule = f"{name} is a block for self, not for causal_self"
        with pytest.raises(Unsupported, match=rule):
            deep(mechanisms=["softmax", name, "softmax"])
        return
    model = deep(mechanisms=["softmax", name, name]).train()
    model(IDS, labels=IDS).loss.backward()
    assert model.model.reads.queries.grad[1:].abs().amax(-1).min() > 0


@pytest.mark.parametrize(
    "changes", [{"intermediate_size": 0}, {"conv": 3}, {"num_hidden_layers": 1}], ids=str
)
def test_other_layers(changes):
    model = deep(**changes)
    sublayers = model.config.num_hidden_layers * (1 if "intermediate_size" in changes else 2)
    assert model.model.reads.queries.shape == (sublayers + 1, 16)
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (4, 11)


def test_an_encoder_decoder_reads_before_each_of_its_sublayers():
    model = deep(RegardForSeq2SeqLM, num_hidden_layers=2)
    assert model.encoder.stack.reads.queries.shape[0] == 5 and model.model.reads.queries.shape[0] == 7
    memory = model.encoder(IDS).last_hidden_state
    stack, outputs, number = model.model, [model.embed(IDS)], iter(model.model.reads.queries)
    for layer in stack.layers:
        outputs.append(layer.attention(layer.norm(read(next(number), outputs)))[0])
        outputs.append(layer.cross(layer.cross_norm(read(next(number), outputs)), memory)[0])
        outputs.append(layer.mlp(layer.mlp_norm(read(next(number), outputs))))
    wanted = model.lm_head(stack.norm(read(next(number), outputs)))
    torch.testing.assert_close(model(IDS, decoder_input_ids=IDS).logits, wanted)


def test_generation_with_beams_and_without_a_cache():
    model = deep(mechanisms=["softmax", "gla", "softmax"], block=2).float()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    wanted = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options, use_cache=False), wanted)
    assert model.generate(IDS, **options, num_beams=3).shape == (4, 13)


def test_no_tokens_and_one_graph():
    model = deep(block=2)
    assert model(IDS[:, :0]).logits.shape == (4, 0, 32) and model(IDS[:0]).logits.shape == (0, 8, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for n in (8, 5):
            wanted = model(IDS[:, :n], use_cache=False).logits
            torch.testing.assert_close(compiled(IDS[:, :n], use_cache=False).logits, wanted)
    torch._dynamo.reset()


# training, precision


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("block", [1, 2])
def test_checkpointed_gradients_are_the_same(block, model_class):
    model = deep(model_class, block=block, dropout=0.0).train()
    model(IDS, labels=IDS, **more(model)).loss.backward()
    wanted = gradients(model)
    assert "model.reads.queries" in wanted
    for reentrant in (False, True):
        checkpoint(model, reentrant)
        calls = []
        hook = model.model.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        model(IDS, labels=IDS, **more(model)).loss.backward()
        torch.testing.assert_close(gradients(model), wanted)
        assert len(calls) == 2, "a layer is computed again for its gradients"
        hook.remove()
        checkpoint(model, reentrant, "disable")


def test_autocast_does_not_narrow_the_stream():
    model, seen = deep().float(), []
    model.model.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert seen == [torch.float32]
    wanted = deep()(IDS).logits
    low = deep().to(torch.bfloat16)(IDS).logits
    assert low.dtype == torch.bfloat16 and ((low.double() - wanted).norm() / wanted.norm()) < 0.05


def test_it_learns():
    model = deep(zero=True, block=2).float().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and model.model.reads.queries[1:].abs().amax(-1).min() > 1e-3


# what names it


@pytest.mark.parametrize("model_class", MODELS)
def test_saved_loaded_and_copied(model_class, tmp_path):
    model = deep(model_class, block=2).float()
    wanted = model(IDS, **more(model)).logits
    model.save_pretrained(tmp_path)
    back = model_class.from_pretrained(tmp_path).eval()
    assert back.config.residual == "attention" and back.model.reads.method.config.block == 2
    for other in (back, copy.deepcopy(model)):
        torch.testing.assert_close(other(IDS, **more(model)).logits, wanted, rtol=0, atol=0)


def test_a_checkpoint_without_queries_gets_zeros_and_one_without_the_setting_adds(tmp_path):
    plain = built(num_hidden_layers=3).float()
    plain.save_pretrained(tmp_path)
    model = RegardForCausalLM.from_pretrained(tmp_path, residual="attention").eval()
    assert model.model.reads.queries.shape == (7, 16) and not model.model.reads.queries.any()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, by_hand(model, IDS)[0])
    back = RegardForCausalLM.from_pretrained(tmp_path).eval()
    assert back.model.reads is None
    torch.testing.assert_close(back(IDS).logits, plain(IDS).logits)
    assert RegardConfig.from_dict({"hidden_size": 16}).residual == "add"


def test_names():
    torch.testing.assert_close(
        deep(residual="attention_residuals")(IDS).logits, deep()(IDS).logits, rtol=0, atol=0
    )
    for residual, error, message in (
        ("atention", KeyError, "no residual is called 'atention'; near names: attention"),
        (
            "softmax",
            Unsupported,
            r"residual='softmax' is no mechanism along depth; known: add, .*attention_residuals",
        ),
        ("h2o", Unsupported, "residual='h2o' is no mechanism along depth"),
    ):
        with pytest.raises(error, match=message):
            built(residual=residual)
    with pytest.raises(ValueError, match="no setting 'blocks'"):
        deep(settings={"attention_residuals": {"blocks": 2}})


OWN = '''
"""Sums with a learned weight for each output, by the state of a recurrence."""
import torch
from dataclasses import dataclass
from regard.core import Card
from regard.kinds.mechanism import Mechanism

@dataclass(frozen=True)
class Config:
    start: float = 1.0

def init(cfg, dims):
    return {"weight": torch.full((dims["value"],), cfg.start)}

def reference(q, k, v, cfg, call):
    before = 0 if call.initial_state is None else call.initial_state[:, :, None]
    total = before + (v * call.params["weight"]).cumsum(2)
    return total, total[:, :, -1]

METHOD = Mechanism(config=Config, reference=reference, init=init, patterns=("causal_self",),
                   card=Card(title="Weighted sums", paper="-", year=2026, idea="-"))
'''


def test_a_page_of_ones_own_with_a_state_of_fixed_size_and_parameters(tmp_path):
    """With weights of one it is the sum: the model with residual="add"."""
    (tmp_path / "weighted_sums.py").write_text(inspect.cleandoc(OWN) + "\n")
    name = regard.register(tmp_path / "weighted_sums.py")
    try:
        plain, model = built(num_hidden_layers=3), built(num_hidden_layers=3, residual=name)
        model.load_state_dict({**model.state_dict(), **plain.state_dict()})
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
        model.train()(IDS, labels=IDS).loss.backward()
        wanted = gradients(model)
        assert wanted["model.reads.params.weight"].abs().min() > 0
        for reentrant in (False, True):
            checkpoint(model, reentrant)
            model(IDS, labels=IDS).loss.backward()
            torch.testing.assert_close(gradients(model), wanted)
    finally:
        catalog._registered.pop(name)


# the duality of depth and sequence


@pytest.mark.parametrize("width", [1, 3, 7])
def test_windowed_attention_on_the_transpose_is_attention_along_depth(width):
    """Queries, keys and values of 7 layers at every position: layers become tokens, positions rows of the batch."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, 2, 5, 8, dtype=torch.float64, generator=draw) for _ in range(3))  # [L, B, N, C]
    turned = (t.permute(1, 2, 0, 3).reshape(10, 1, 7, 8) for t in (q, k, v))
    out = regard.attend(*turned, "softmax", mask=window(width)).out
    for b in range(2):
        for n in range(5):
            for layer in range(7):
                low = max(0, layer - width + 1)
                scores = [float(q[layer, b, n] @ k[i, b, n]) / 8**0.5 for i in range(low, layer + 1)]
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                wanted = sum(a * v[low + i, b, n] for i, a in enumerate(weights))
                assert (out[b * 5 + n, 0, layer] - wanted).abs().max() < 1e-12
