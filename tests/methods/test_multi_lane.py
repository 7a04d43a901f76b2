"""MULTI-LANE's own laws: lanes that do not meet, who reads whom, dropped summaries, and torch's attention as oracle."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regard import catalog
from regard.core import Unsupported
from regard.core.call import Call
from regard.kinds.block import make_call
from regard.nn import RegardConfig, RegardForMaskedLM
from regard.testing.block import BlockCase

PAGE = catalog.get("multi_lane")
PATHS = (PAGE.reference, PAGE.fast)
WIDTH, HEADS, IMAGE = 8, 2, 5
SMALL = {"lanes": 3, "selectors": 2, "prompts": 3, "expand": 2}
CFG = PAGE.configure(**SMALL)
KINDS = ("dropped", "kept", "none")


def drawn(cfg=CFG, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in PAGE.init(cfg, {"width": WIDTH, "heads": HEADS}).items()}
    params = {name: 0.5 * torch.randn(s, generator=g).to(dtype) for name, s in shapes.items()}
    return torch.randn(2, cfg.own + IMAGE, WIDTH, generator=g).to(dtype), params


def answer(path, x, params, cfg=CFG):
    return path(x, cfg, make_call(PAGE, cfg, x, params))[0]


def lane(t, cfg=CFG):
    return range(t * (1 + cfg.selectors), (t + 1) * (1 + cfg.selectors))


def moved(a, b):
    return {*(a != b).any(-1).any(0).nonzero().flatten().tolist()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_who_moves_whom(path, kind):
    cfg = PAGE.configure(**SMALL, summaries=kind)
    x, params = drawn(cfg)
    out, image, classes = answer(path, x, params, cfg), range(cfg.own, x.shape[1]), {0, 3, 6}
    readers = {"dropped": classes, "kept": {*range(cfg.own)}, "none": set()}[kind]
    for i in range(x.shape[1]):
        changed = x.clone()
        changed[:, i, 0] += 1
        mine = next(({*lane(t)} for t in range(cfg.lanes) if i in lane(t)), set())
        # where nothing but the class token is asked for, a selector is read by it and else goes on alone
        wanted = mine if kind != "dropped" else {i, min(mine, default=i)}
        assert moved(answer(path, changed, params, cfg), out) == (
            {*image} | readers if i in image else wanted
        ), i


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_prompts_of_a_lane_move_that_lane_and_no_bit_of_another(path, dtype, kind):
    cfg = PAGE.configure(**SMALL, summaries=kind)
    x, params = drawn(cfg, dtype)
    other = params["prompts"].clone()
    other[:, 1] += 1
    found = moved(answer(path, x, params | {"prompts": other}, cfg), answer(path, x, params, cfg))
    assert found == ({3} if kind == "dropped" else {*lane(1)})


@pytest.mark.parametrize("path", PATHS)
def test_lanes_that_come_later_change_nothing_but_rounding(path):
    x, params = drawn()
    out = answer(path, x, params)
    first = PAGE.configure(**SMALL | {"lanes": 1})
    alone = [*lane(0), *range(CFG.own, x.shape[1])]
    found = answer(path, x[:, alone], params | {"prompts": params["prompts"][:, :1]}, first)
    torch.testing.assert_close(found, out[:, alone], rtol=1e-12, atol=1e-12)


def of_torch(params, u, asking, prompts=None):
    """Attention of `asking` to u and the prompts of keys and values, by torch's own function."""
    (q, k, v) = (
        F.linear(t, w.flatten(0, 1), b.flatten()).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for t, w, b in zip((asking, u, u), params["qkv"], params["qkv_bias"], strict=True)
    )
    if prompts is not None:
        k, v = (torch.cat([p.expand(2, *p.shape), t], dim=2) for p, t in zip(prompts, (k, v), strict=True))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(out, params["out"], params["out_bias"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_it_is_torch_s_own_attention_over_summaries(path, kind):
    cfg = PAGE.configure(**SMALL, summaries=kind, eps=1e-2)
    x, p = drawn(cfg)
    y = F.layer_norm(x, (WIDTH,), p["ln_1"], p["ln_1_bias"], cfg.eps)
    image, parts = y[:, cfg.own :], []
    for t in range(cfg.lanes):
        u = y[:, lane(t)]
        if kind != "none":
            read = nn.functional.scaled_dot_product_attention(u[:, 1:], image, image)
            u = torch.cat([u[:, :1], read], dim=1)
        asked = of_torch(p, u, u, p["prompts"][:, t])
        parts.append(torch.cat([asked[:, :1], y[:, lane(t)][:, 1:]], dim=1) if kind == "dropped" else asked)
    x2 = x + torch.cat([*parts, of_torch(p, image, image)], dim=1)
    middle = F.layer_norm(x2, (WIDTH,), p["ln_2"], p["ln_2_bias"], cfg.eps)
    middle = F.gelu(F.linear(middle, p["up"], p["up_bias"]))
    torch.testing.assert_close(answer(path, x, p, cfg), x2 + F.linear(middle, p["down"], p["down_bias"]))


def test_numbers_of_tokens_and_settings_that_have_no_meaning_are_refused():
    x, params = drawn()
    with pytest.raises(ValueError, match="as many tokens as the settings say"):
        answer(PAGE.fast, x[:, : CFG.own], params)
    with pytest.raises(ValueError, match="a class token, a selector, and a token of the image"):
        answer(PAGE.fast, x[:, :2], params)
    with pytest.raises(Unsupported, match="a mask beside a fixed number of tokens"):
        make_call(PAGE, CFG, x, params, key_mask=torch.ones(1, 1, x.shape[1], dtype=torch.bool))
    for wrong in ({"lanes": 0}, {"selectors": 0}, {"prompts": -1}, {"summaries": "all"}, {"expand": 0}):
        with pytest.raises(ValueError, match=r"must hold|summaries is"):
            PAGE.configure(**wrong)
    case = BlockCase(PAGE, CFG, PAGE.pattern)
    assert [case.inputs(n).q.shape[2] for n in (0, 1, 3, 9, 40)] == [0, 3, 3, 9, 40]
    assert case.at(40).cfg == CFG and (case.at(9).cfg.lanes, case.at(9).cfg.selectors) == (2, 1)


def test_it_is_a_layer_of_an_encoder():
    sizes = {"vocab_size": 11, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    model = RegardForMaskedLM(
        RegardConfig(mechanisms=["multi_lane", "softmax"], settings={"multi_lane": SMALL}, **sizes)
    )
    ids = torch.arange(CFG.own + 2)[None] % 11
    model.eval()(ids, labels=ids).loss.backward()
    layer = model.model.layers[0]
    assert all(p.grad is not None for p in layer.parameters())
    x = model.embed(ids)
    wanted = PAGE.reference(x, CFG, Call("self", params=layer.params.tensors()))[0]
    torch.testing.assert_close(layer(x, None, None)[0], wanted, rtol=1e-4, atol=1e-5)
