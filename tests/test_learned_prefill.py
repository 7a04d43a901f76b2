"""Pages for prompts that learn on a model: what their gates and routers read, how they are taught, what they decide."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from regard import attend, catalog, nn
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted, configured, read_converted
from regard.attaching.function import native
from regard.attaching.knob import calibrate
from regard.attaching.ledger import LedgerLayer
from regard.attaching.replacement import Replacement, sizes
from regard.attaching.unrotated import unrotated
from regard.bench.compare import compare
from regard.core import Unsupported
from regard.core.call import Call
from regard.kinds.mechanism import run
from regard.methods.mechanisms.sparse import flux_attention as page
from regard.models.shipped import load_shipped
from regard.ops.blocks import largest_weights, placed
from regard.ops.rotary import rotate
from regard.testing.zoo import build
from regard.train.convert import convert
from regard.train.routes import Routes
from regard.train.teachers import GateTeacher

FLUX = dict(sinks=2, local=6, pool=3, block_q=4, block_k=2)
SEER = dict(threshold=0.2, width=6, block_q=8, block_k=4)


def text(n=24, rows=2):
    return torch.randint(3, 60, (rows, n), generator=torch.Generator().manual_seed(0))


def made(model, name, seed=0, **config):
    """What the page learns, at its start and moved a little."""
    method = catalog.method(name, **config)
    torch.manual_seed(seed)
    parts = method.page.init(method.config, sizes(model))
    sites = [f"model.layers.{i}.self_attn" for i in range(model.config.num_hidden_layers)]
    return Converted(method, {s: {n: p + 0.2 * torch.randn_like(p) for n, p in parts.items()} for s in sites})


def saying(converted, *full):
    """Routers that say full, or sparse, layer by layer."""
    params = {}
    for (site, parts), yes in zip(converted.params.items(), full, strict=True):
        params[site] = {**parts, "w_5": 0 * parts["w_5"], "b_5": torch.tensor([0.0, 9.0 if yes else -9.0])}
    return Converted(converted.method, params)


class Notes(Replacement):
    """The model's own attention; unrotated queries and keys are noted."""

    name, layer, needs_rotary = "notes", LedgerLayer, True

    def __init__(self):
        super().__init__()
        self.seen = []

    def compute(self, call):
        self.seen.append(unrotated("notes", call, call.k))
        return native(call)[0].transpose(1, 2)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3", "smollm3", "neox", "gpt2"])
def test_unrotated_is_what_the_model_had_before_its_rotation(family):
    """Rotated once more by the model's own way it is what came; at position 0 nothing turned."""
    model, _ = build(family)
    notes, ids = Notes(), text(1)
    with torch.no_grad(), attach(model, notes):
        # one token at position 0 is not turned; put elsewhere, the same token must come back the same
        model(ids, use_cache=False)
        first, notes.seen = notes.seen, []
        if family == "gpt2":
            return
        model(ids, position_ids=torch.full_like(ids, 17), use_cache=False)
    for (q, k), (q_far, k_far) in zip(first, notes.seen, strict=True):
        torch.testing.assert_close(q_far, q, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(k_far, k, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_turned_back_is_refused_by_name():
    model, _ = build("deepseek3")
    method = made(model, "seer_attention", **SEER)
    said = "reads what is before rotary positions, and DeepseekV3Attention"
    with pytest.raises(Unsupported, match=said), torch.no_grad(), attach(model, method):
        model(text())


def test_a_layer_hands_the_gate_what_is_not_rotated():
    torch.manual_seed(0)
    layer = nn.Attention(16, 4, "seer_attention", kv_heads=2, **{**SEER, "block_q": 4})
    x = torch.randn(2, 13, 16)
    q, k, v, _ = layer.project(x, x, None, None)
    at = torch.arange(13).expand(2, -1)
    wanted = run(
        layer.method,
        rotate(q, at, 1e4),
        rotate(k, at, 1e4),
        v,
        params=layer.params.tensors(),
        unrotated=(q, k),
    )[0]
    assert torch.equal(layer(x)[0], layer.o_proj(wanted.transpose(1, 2).flatten(2)))
    out, state = layer(x[:, :8])
    more, _ = layer(x[:, 8:], initial_state=state)
    torch.testing.assert_close(torch.cat([out, more], 1), layer(x)[0])


@pytest.mark.parametrize("given", ["shape", "unasked"])
def test_unrotated_of_another_shape_or_for_a_page_that_reads_none(given):
    q = torch.randn(1, 2, 5, 4)
    method = catalog.method("seer_attention" if given == "shape" else "block_topk")
    params = (
        method.page.init(method.config, dict(heads=2, kv_heads=2, key=4, value=4))
        if given == "shape"
        else None
    )
    rule = "unrotated k has the shape and dtype of k" if given == "shape" else "for mechanisms that read them"
    with pytest.raises(ValueError, match=rule):
        run(method, q, q, q, params=params, unrotated=(q, q[:, :, :3]))


def test_attend_takes_what_is_not_rotated():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 24, 6).unbind()
    method = catalog.method("seer_attention", **SEER)
    params = {
        n: 3 * p
        for n, p in method.page.init(method.config, dict(heads=2, kv_heads=2, key=6, value=6)).items()
    }
    raw = torch.randn(2, 1, 2, 24, 6).unbind()
    found = attend(q, k, v, method, params=params, unrotated=raw).aux["blocks"]
    wanted = attend(*raw, v, method, params=params).aux["blocks"]
    assert found.same(wanted) and not found.same(attend(q, k, v, method, params=params).aux["blocks"])
    with pytest.raises(ValueError, match="unrotated k holds nan"):
        attend(q, k, v, method, params=params, unrotated=(q, torch.full_like(k, math.nan)))
    with pytest.raises(Unsupported, match="unrotated queries and keys beside cu_seqlens"):
        attend(q, k, v, method, params=params, unrotated=raw, cu_seqlens=torch.tensor([0, 24]))


@pytest.mark.parametrize("pads", [0, 3])
def test_the_largest_weight_of_each_block(pads):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8)
    mask = None if pads == 0 else torch.arange(11).expand(2, 1, -1) >= torch.tensor([pads, 0])[:, None, None]
    found = largest_weights(placed(q, k, k, Call(key_mask=mask), 4), 4, 2)
    for b in range(2):
        cut = pads if b == 0 else 0
        for h in range(4):
            s = q[b, h, cut:] @ k[b, h // 2, cut:].T / math.sqrt(8)
            w = s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf).softmax(-1)
            for i in range(-(-len(w) // 4)):
                for j in range(found.shape[-1]):
                    part = w[4 * i : 4 * i + 4, 2 * j : 2 * j + 2]
                    wanted = part.max().item() if part.numel() else 0.0
                    assert abs(found[b, h, i, j].item() - wanted) < 1e-6


def test_a_gates_lesson_is_the_divergence_of_its_blocks():
    """Layer by layer: KL of the row-normalised largest weights from the gate's softmax, the first quarter left out."""
    model, _ = build("llama")
    teacher, ids = GateTeacher(catalog.method("seer_attention", **SEER), 0), text(40, 1)
    notes = Notes()
    with torch.no_grad(), attach(model, notes):
        model(ids, use_cache=False)
    with torch.no_grad(), attach(model, teacher):
        model(ids, use_cache=False)
        teacher.teaching = True
        model(ids, use_cache=False)
    cfg, site = teacher.method.config, "model.layers.0.self_attn"
    raw = notes.seen[0]
    turned = [rotate(x, torch.arange(40)[None], model.config.rope_parameters["rope_theta"]) for x in raw]
    at = placed(*turned, turned[1], Call(unrotated=raw), cfg.block_q)
    wanted = F.normalize(largest_weights(at, cfg.block_q, cfg.block_k), p=1, dim=-1)
    given = teacher.method.page.gate(at, cfg, Call(params=teacher.params[site])).softmax(-1).detach()
    kl = torch.where(wanted > 0, wanted * (wanted.clamp(min=1e-9) / given.clamp(min=1e-30)).log(), 0.0).sum(
        -1
    )
    assert abs(kl[:, :, 1:].mean().item() - teacher.losses[site]) < 1e-5  # five blocks: the first is left out


def test_gates_learn_and_the_model_stays(tmp_path):
    model, tokenizer = load_shipped("lm")
    before = {n: p.clone() for n, p in model.named_parameters()}
    options = dict(block_q=32, block_k=32, width=16, length=256, batch=2)
    learned = convert(model, tokenizer, "seer_attention", steps=12, **options)
    losses = learned.report["transfer_loss"]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]) and learned.report["finetune"] is None
    assert not learned.weights and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    learned.save(tmp_path / "gates")
    again = configured("seer_attention", {"learned": str(tmp_path / "gates"), "threshold": 0.03})
    assert again.method.config.threshold == 0.03 and again.method.config.width == 16
    reached = calibrate(model, tokenizer, again, "mass:0.8", length=512, samples=1)
    assert reached.params == again.params and all(
        sum(row["mass"]) / len(row["mass"]) >= 0.8 for row in reached.report["reached"]
    )
    with pytest.raises(ValueError, match="the folder holds what this page learned"):
        configured("block_topk", {"learned": str(tmp_path / "gates")})
    assert read_converted(tmp_path / "gates").params.keys() == learned.params.keys()


@pytest.mark.parametrize("target", ["blocks", "routes", "output"])
def test_a_target_is_of_the_page_that_has_it(target):
    model, tokenizer = load_shipped("lm")
    name = "hedgehog" if target != "output" else "seer_attention"
    with pytest.raises(ValueError, match="only a page with transfer="):
        convert(model, tokenizer, name, target=target, steps=1)


def test_compare_asks_for_what_was_learned(tmp_path):
    with pytest.raises(ValueError, match="learns on the model first: regard convert"):
        compare(methods=["seer_attention"], out=tmp_path / "a")
    with pytest.raises(ValueError, match="learned= is for pages that learn"):
        compare(methods=["block_topk:learned=x"], out=tmp_path / "b")
    with pytest.raises(ValueError, match="a conversion's folder"):
        compare(methods=[f"seer_attention:learned={tmp_path}/none"], out=tmp_path / "c")


# decided once


@pytest.mark.parametrize("pool", [2, 5, 40])
def test_a_router_is_its_equation(pool):
    """Of both ends of the real queries, as the page's reference writes it out; it decides by the threshold."""
    torch.manual_seed(0)
    q, cfg = torch.randn(3, 2, 13, 6), page.Config(pool=pool)
    params = {n: 0.7 * torch.randn_like(p) for n, p in page.init(cfg, {"key": 6}).items()}
    real = torch.ones(3, 13, dtype=torch.bool)
    real[0, [0, 1, 5, 12]] = False
    found = page.router(q, real, cfg, params).softmax(-1)[:, 1]
    wanted = [
        page.probability(q[b].double(), real[b].nonzero()[:, 0].tolist(), cfg, params) for b in range(3)
    ]
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-5, rtol=0)
    middle = page.Config(pool=pool, threshold=sorted(wanted)[1] + 1e-4)
    decided = page.decide(q, real, middle, params).tolist()
    assert decided == [p >= middle.threshold for p in wanted] and sum(decided) == 1
    many = torch.randn(1, 2, 13, 6)
    assert torch.equal(page.router(many, None, cfg, params), page.router(many, real[1:2], cfg, params))


def test_all_full_is_the_model_and_sparse_is_not():
    model, _ = build("llama")
    converted, ids = made(model, "flux_attention", **FLUX), text()
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, saying(converted, True, True, True)) as attached:
            assert torch.equal(model(ids).logits, plain)
            assert all("router" in row["dense"] for row in attached.selection())
        with attach(model, saying(converted, True, False, True)) as attached:
            assert (model(ids).logits - plain).abs().max() > 1e-3
            assert ["dense" in row for row in attached.selection()] == [True, False, True]


def test_rows_of_a_batch_decide_for_themselves():
    model, _ = build("llama")
    converted, ids = made(model, "flux_attention", **FLUX), text()
    # the router reads the sign of one channel of the first layer, which the rows are picked to differ in
    with torch.no_grad(), attach(model, converted):
        cache = model(ids, use_cache=True).past_key_values
        notes = [layer.memory["flux_attention"] for layer in cache.layers]
        alone = [[x.memory["flux_attention"] for x in model(row[None], use_cache=True).past_key_values.layers]
                 for row in ids]  # fmt: skip
    assert [n.tolist() for n in notes] == [[a.item(), b.item()] for a, b in zip(*alone, strict=True)]


def test_a_decision_holds_for_parts_and_tokens_after_the_first():
    """By the page itself on the same queries and keys: its state carries the decision."""
    model, _ = build("llama")
    converted, ids = saying(made(model, "flux_attention", **FLUX), False, True, False), text(24, 1)
    with torch.no_grad(), attach(model, converted):
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 7, 1, 1, 5], 1)]
    # all in one call, every layer's decision being that of its router whatever it reads
    with torch.no_grad(), attach(model, converted):
        whole = model(ids).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_it_is_the_first_call_that_decides(full):
    model, _ = build("llama")
    base = made(model, "flux_attention", **FLUX)
    first, then = saying(base, *[full] * 3), saying(base, *[not full] * 3)
    ids = text(20, 1)
    with torch.no_grad():
        with attach(model, first):
            cache = model(ids[:, :12], use_cache=True).past_key_values
            wanted = model(ids[:, 12:], past_key_values=cache).logits
        with attach(model, first):
            cache = model(ids[:, :12], use_cache=True).past_key_values
        with attach(model, then):
            found = model(ids[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_decoding_reads_sinks_and_window_in_padded_batches_and_beams():
    model, _ = build("llama")
    converted = saying(made(model, "flux_attention", **FLUX), False, True, False)
    ids = text(20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad(), attach(model, converted):
        both = model.generate(ids, attention_mask=mask, **options)
        alone = model.generate(ids[:1, 5:], **options)
        beams = model.generate(ids[1:], num_beams=3, **options)
        full = model(beams[:, :-1]).logits
    assert torch.equal(both[0, 20:], alone[0, 15:]) and beams.shape == (1, 26) and full.isfinite().all()


def test_beside_a_policy_the_policy_decodes():
    model, _ = build("llama")
    converted = saying(made(model, "flux_attention", **FLUX), False, False, False)
    methods = [converted, catalog.method("snapkv", budget=10, window=4)]
    with torch.no_grad(), attach(model, methods) as attached:
        cache = model(text(), use_cache=True).past_key_values
        assert attached.stored() == [[10, 10]] * 3
        assert model(torch.tensor([[5], [6]]), past_key_values=cache).logits.isfinite().all()


def test_routers_learn_what_is_asked_of_each_kind():
    """Two kinds of text that begin and end in tokens of their own: one is to be sparse, the other not."""
    model, _ = build("llama")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (64, 16), generator=g)
    kinds = torch.arange(64) % 2
    for part in (slice(0, 4), slice(8, 12)):
        ids[:, part] = torch.where(kinds == 0, 7, 50)[:, None]
    routes = Routes(torch.full((64,), 12), kinds.float())
    learned = convert(
        model,
        None,
        "flux_attention",
        ids=ids,
        routes=routes,
        steps=60,
        rate=1e-2,
        batch=8,
        **{**FLUX, "pool": 4},
    )
    with torch.no_grad(), attach(model, learned):
        layers = model(ids[:, :12], use_cache=True).past_key_values.layers
    full = torch.stack([layer.memory["flux_attention"] for layer in layers]).float().mean(0)
    assert full[kinds == 0].mean() > 0.9 and full[kinds == 1].mean() < 0.1
    assert set(learned.report["sparse_layers"]) == {"0", "1"}


@pytest.mark.parametrize(
    ("prompts", "sparse", "rule"),
    [
        (torch.tensor([4, 4]), torch.tensor([0.5]), "are \\[rows\\]"),
        (torch.tensor([0]), torch.tensor([0.5]), "a prompt has tokens"),
        (torch.tensor([4]), torch.tensor([1.5]), "0 <= sparse <= 1"),
    ],
)
def test_routes_are_judged_at_once(prompts, sparse, rule):
    with pytest.raises(ValueError, match=rule):
        Routes(prompts, sparse)


def test_routes_stand_beside_rows():
    model, _ = build("llama")
    with pytest.raises(ValueError, match="routes stand beside ids"):
        convert(model, None, "flux_attention", ids=text(64, 1)[0], length=16, steps=1,
                routes=Routes(torch.tensor([4]), torch.tensor([0.5])))  # fmt: skip
