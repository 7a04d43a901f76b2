"""Sparse prefill and attached masks on models: against the model itself, by row, by part, beside a cache policy."""

import copy
import json

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from regard import catalog
from regard.attaching import masking
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.attaching.replacement import sizes
from regard.attaching.sparse import is_sparse
from regard.bench.compare import compare
from regard.cli import app
from regard.core import NeverFired, Unsupported
from regard.core.mask import causal, first, predicate, window
from regard.models.shipped import load_shipped
from regard.report.markdown import to_markdown
from regard.report.prefill import crossing_text, first_token_sentence, only_prompts, table_rows
from regard.report.result import Result
from regard.testing.zoo import build

FAMILIES = ("llama", "qwen3", "phi", "neox", "gptoss", "deepseek3", "smollm3")
ALL = {"top_k": 2**40, "block_q": 8, "block_k": 4}
FEW = {"top_k": 2, "block_q": 8, "block_k": 4}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def padded(n=40, pads=6):
    x = torch.randint(3, 60, (2, n), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(x)
    mask[0, :pads] = 0
    return {"input_ids": x, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_are_the_model_and_rows_are_the_rows_alone(family):
    model, _ = build(family)
    feed = padded()
    real = feed["attention_mask"].bool()
    with attach(model, "block_topk", **ALL):
        out = model(**feed).logits
    assert (out - model(**feed).logits)[real].abs().max() <= 1e-6
    with attach(model, "block_topk", **FEW) as attached:
        attached.selection(mass=True)
        both = model(**feed, use_cache=True)
        alone = [
            model(input_ids=feed["input_ids"][:1, 6:]).logits,
            model(input_ids=feed["input_ids"][1:]).logits,
        ]
        rows = attached.selection()
    assert (both.logits[:1, 6:] - alone[0]).abs().max() <= 1e-6
    assert (both.logits[1:] - alone[1]).abs().max() <= 1e-6
    acted = [row for row in rows if "kept" in row]
    assert acted and all(0 < share < 1 for row in acted for share in row["kept"] + row["mass"])


SMALL = {
    "a_shape": {"sinks": 2, "local": 8, "block_q": 4, "block_k": 2},
    "block_topk": FEW,
    "dhsa": {"budget": 6, "local": 4, "chunk": 3, "block_q": 4},
    "flexprefill": {"gamma": 0.6, "min_budget": 0, "block_q": 4, "block_k": 4},
    "hip_attention": {"block_q": 8, "block_k": 2, "top_k": 4, "local": 8, "sinks": 2},
    "hyperattention": {"block": 4, "sample": 2, "exact_below": 8},
    "quest": {"budget": 8, "block_q": 4, "block_k": 4, "dense_layers": 0},
    "rectified_spaattn": {"share": 0.3, "block_q": 4, "block_k": 4},
    "vertical_slash": {
        "vertical": 4,
        "slash": 4,
        "rows": 4,
        "sinks": 1,
        "local": 1,
        "block_q": 4,
        "block_k": 4,
    },
    "xattention": {"threshold": 0.6, "stride": 2, "block_q": 4, "block_k": 4},
}


LEARNED = {
    "flux_attention": {"threshold": 0.985, "sinks": 2, "local": 6, "pool": 3, "block_q": 4, "block_k": 2},
    "seer_attention": {"threshold": 0.2, "width": 6, "block_q": 8, "block_k": 4},
    "superlinear_attention": {"top_k": 2, "window_index": 1, "back": 1.0},
}


def ready(model, name):
    """The page with small settings; what it learns stands at its start, moved a little."""
    method = catalog.method(name, **{**SMALL, **LEARNED}[name])
    if name in SMALL:
        return method
    torch.manual_seed(1)
    parts = method.page.init(method.config, sizes(model))
    sites = [f"model.layers.{i}.self_attn" for i in range(model.config.num_hidden_layers)]
    return Converted(method, {s: {n: p + 0.2 * torch.randn_like(p) for n, p in parts.items()} for s in sites})


def test_every_page_for_prompts_is_asked():
    pages = [catalog.method(name) for name in catalog.list_methods(kind="mechanism", family="sparse")]
    assert {*SMALL, *LEARNED} == {m.name for m in pages if is_sparse(m)}


@pytest.mark.parametrize("name", [*SMALL, *LEARNED])
def test_padding_anywhere_and_half_precision(name):
    """A row with padding before, between and after its tokens is that text alone; bf16 and fp16 are near."""
    model, _ = build("llama")
    ids = padded()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, [0, 1, 2, 10, 11, 12, 13, 38, 39]] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    real = mask[0].bool()
    method = ready(model, name)
    with attach(model, method):
        both = model(**feed).logits
        alone = model(input_ids=ids[:1, real]).logits
    assert (both[:1, real] - alone).abs().max() <= 1e-6
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        with attach(half, method):
            near = half(**feed).logits.float()
        # a block that is chosen otherwise moves single rows, not all of them
        gap = (near - both)[mask.bool()].norm() / both[mask.bool()].norm()
        assert gap <= 0.2, dtype


def test_prompts_in_parts_at_borders_of_blocks_are_the_whole():
    model, _ = build("llama")
    feed = padded(pads=0)
    with attach(model, "block_topk", **FEW):
        whole = model(**feed, use_cache=True).logits
        cache, parts = DynamicCache(), []
        for part in feed["input_ids"].split((16, 8, 16), 1):
            parts.append(model(part, past_key_values=cache).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-6


def test_what_follows_the_prompt_is_the_models_own():
    """Single tokens read all that is stored: as the model does on the cache that the sparse prompt left."""
    model, _ = build("llama")
    feed, token = padded(pads=0), torch.tensor([[5], [6]])
    with attach(model, "block_topk", **FEW):
        cache = model(**feed, use_cache=True).past_key_values
        step = model(token, past_key_values=cache).logits
    plain = DynamicCache()
    for i, layer in enumerate(cache.layers):
        plain.update(layer.groups[0].k()[:, :, :-1], layer.groups[0].v()[:, :, :-1], i)
    assert (model(token, past_key_values=plain).logits - step).abs().max() <= 1e-6


def test_beside_a_cache_policy():
    model, _ = build("llama")
    feed = padded(pads=0)
    both = [catalog.method("block_topk", **FEW), catalog.method("snapkv", budget=12, window=4)]
    with attach(model, both) as attached:
        out = model(**feed, use_cache=True)
        assert attached.stored() == [[12, 12]] * 3
        assert attached.selection()[0]["kept"]
        step = model(torch.tensor([[5], [6]]), past_key_values=out.past_key_values).logits
        again = model(feed["input_ids"][:, :9], past_key_values=out.past_key_values).logits
    with attach(model, "block_topk", **FEW):
        assert (model(**feed).logits - out.logits).abs().max() <= 1e-6
    assert step.isfinite().all() and again.isfinite().all()


def test_layers_left_to_the_model():
    model, _ = build("llama")
    with attach(model, "block_topk", **FEW, dense_layers=2) as attached:
        model(**padded())
        rows = attached.selection()
    assert ["dense" in row for row in rows] == [True, True, False]
    with attach(model, "block_topk", **FEW, dense_below=20) as attached:
        short = model(input_ids=padded(20, 0)["input_ids"]).logits
        assert all("dense_below" in row["dense"] for row in attached.selection())
        model(**padded())
        assert all("kept" in row for row in attached.selection())
    assert torch.equal(short, model(input_ids=padded(20, 0)["input_ids"]).logits)
    model, _ = build("mistral")
    said = "block_topk was never asked in 1 forwards: every layer has"
    with pytest.raises(NeverFired, match=said), attach(model, "block_topk"):
        model(**padded())


def test_what_cannot_be_is_refused_by_name():
    model, inputs = build("gemma2")
    said = r"block_topk at model.layers.1.self_attn .*softcap"
    with pytest.raises(Unsupported, match=said), attach(model, "block_topk"):
        model(**inputs)
    model, _ = build("llama")
    two, said = (
        ["block_topk", catalog.method("window", window=9)],
        "an attached mask beside blocks that the data chooses",
    )
    with pytest.raises(Unsupported, match=said), attach(model, two):
        model(**padded())
    with (
        attach(model, "h2o", budget=0.5) as attached,
        pytest.raises(Unsupported, match="no method that leaves"),
    ):
        attached.selection()
    with pytest.raises(
        Unsupported, match="lean_attention is a mechanism page; here stand cache pages, masks"
    ):
        compare(None, ["lean_attention"], out="nowhere")
    with pytest.raises(Unsupported, match="prefix lets tokens see later ones"):
        compare(None, ["prefix"], out="nowhere")
    with pytest.raises(ValueError, match="a mask of compare reads no roles"):
        compare(None, ["document"], out="nowhere")


@predicate()
def striped(at, heads):
    return ((at.k - at.h) % heads == 0) | (at.k == at.q)


@predicate("odd")
def odd(at):
    return (at.k_role("odd") == 1) | (at.k == at.q)


MASKS = [
    catalog.method("window", window=30), causal() & (window(20) | first(3)), striped(heads=4), odd(),
    catalog.method("power_attention", block=4, local=2), window(2**40),
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gptoss", "qwen3"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_attached_masks_by_blocks_are_those_by_pairs(family, mask, monkeypatch):
    """A prompt, single tokens, a second prompt: over blocks, and over every pair."""
    model, _ = build(family)
    outs, roles = [], {"odd": lambda ids: ids % 2}
    for least in (8, 2**40):
        monkeypatch.setattr(masking, "SHORT", least)
        with attach(model, mask, roles=roles):
            logits, cache = [], DynamicCache()
            for part in padded(150)["input_ids"].split((130, 1, 1, 18), 1):
                logits.append(model(part, past_key_values=cache).logits)
        outs.append(torch.cat(logits, 1))
    assert (outs[0] - outs[1]).abs().max() <= 2e-6


def test_masks_that_differ_by_layer(monkeypatch):
    """Each layer under its own window, over blocks and over pairs: what one mask of pairs for each layer gives."""
    model, _ = build("llama")
    spans = {0: 3.0, 1: 40.0, 2: 9.0}
    method = catalog.method("moa_spans", alpha=(5.0,), beta=(0.0,), sinks=1, block=1)
    by_layer = {layer: {"alpha": (span,)} for layer, span in spans.items()}
    ids, outs = padded(60, 0)["input_ids"], []
    for least in (8, 2**40):
        monkeypatch.setattr(masking, "SHORT", least)
        with attach(model, Converted(method, by_layer=by_layer)):
            outs.append(model(input_ids=ids).logits)
    seen = {at: (causal() & (window(int(span)) | first(1))).dense(60)[0, 0] for at, span in spans.items()}
    hooks = [layer.self_attn.register_forward_pre_hook(by_pairs(seen[i]), with_kwargs=True)
             for i, layer in enumerate(model.model.layers)]  # fmt: skip
    wanted = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    assert (outs[0] - wanted).abs().max() <= 2e-6 and (outs[1] - wanted).abs().max() <= 2e-6


def by_pairs(seen):
    """A hook that gives one attention module a mask of its own."""
    return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": seen[None, None]})


def test_compare_prompts_read_in_part(tmp_path):
    methods = ["block_topk:top_k=2,block_q=32,block_k=32", "window:window=64", "snapkv"]
    result = compare(load_shipped(), methods, ["recall"], [512], [0.5], out=tmp_path, samples=2)
    assert not result.failed()
    assert {row["method"] for row in result.crossings} == {"block_topk", "window"}
    by_method = {row["method"]: row for row in result.rows}
    assert "kept_share" not in by_method["snapkv"] and "kept_share" not in by_method["full"]
    row = by_method["block_topk"]
    assert 0 < row["kept_share"] < 1 and 0 < row["mass_share"] < 1
    assert sum(row[f"{part}_ms"] for part in ("estimate", "attention", "rest")) == pytest.approx(
        row["prefill_ms"], 0.2
    )
    lines = table_rows(result)
    assert [line["method"].split("(")[0] for line in lines] == ["block_topk", "window"]
    again = Result.load(tmp_path)
    assert not only_prompts(again)
    prompts = Result(again.run, [r for r in again.rows if r["method"] != "snapkv"], [], again.crossings)
    assert only_prompts(prompts)
    assert (
        to_markdown(prompts).startswith("At 512 tokens")
        and "bytes held" not in to_markdown(prompts).split("|")[0]
    )
    assert len(again.crossings) == 2 and "512 tokens" in first_token_sentence(again)
    assert "pays from" in to_markdown(again)
    html = (tmp_path / "report.html").read_text()
    assert "Time to the first token over length" in html


def test_crossings_in_words():
    row = {"crossing": 1024, "interval": [724, 1448], "length": 4096}
    assert crossing_text(row) == "1,024 tokens (724 to 1,448)"
    assert crossing_text({**row, "crossing": None}) == "none up to 4,096"
    assert crossing_text(None) == "not measured"


def test_bench_sparse_rows(monkeypatch):
    from regard.bench import operators, sparse

    monkeypatch.setattr(operators, "QUICK_LIMIT", 3600.0)  # a busy machine cuts no case here
    monkeypatch.setattr(sparse, "QUICK", sparse.Sizes(256, 128, 512, 64, 16, 0.5, 2, 16, 1))
    monkeypatch.setattr(sparse, "compiled", lambda sizes: iter(()))
    rows = json.loads(CliRunner().invoke(app, ["bench", "sparse", "--quick", "--json"]).stdout)
    cases = [row["case"] for row in rows]
    assert sum("window of 16" in case for case in cases) >= 2
    assert any(case.startswith("block_topk: power of the length in memory") for case in cases)
    assert all(row["ratio"] > 0 and isinstance(row["holds"], bool) for row in rows)
