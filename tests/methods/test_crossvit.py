"""CrossViT's own laws: patches bit for bit, who moves whom, replacement, and torch's own attention as the oracle."""

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

PAGE = catalog.get("crossvit")
PATHS = (PAGE.reference, PAGE.fast)
WIDTH, HEADS = 8, 2
CFG = PAGE.configure(patches=(5, 3))
CLS = (0, 1 + CFG.patches[0])
PATCHES = [i for i in range(2 + sum(CFG.patches)) if i not in CLS]


def drawn(cfg=CFG, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in PAGE.init(cfg, {"width": WIDTH, "heads": HEADS}).items()}
    params = {name: torch.randn(s, generator=g).to(dtype) for name, s in shapes.items()}
    return torch.randn(2, 2 + sum(cfg.patches), WIDTH, generator=g).to(dtype), params


def answer(path, x, params, cfg=CFG):
    return path(x, cfg, make_call(PAGE, cfg, x, params))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_patches_are_what_they_were_bit_for_bit(path, dtype):
    x, params = drawn(dtype=dtype)
    out = answer(path, x, params)[0]
    assert out.shape == x.shape and out.dtype == dtype
    assert torch.equal(out[:, PATCHES], x[:, PATCHES])
    assert (out[:, CLS] != x[:, CLS]).any(-1).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_class_token_reads_itself_and_the_patches_of_the_other_branch(path):
    x, params = drawn()
    out, a, b = answer(path, x, params)[0], range(1, CLS[1]), range(CLS[1] + 1, x.shape[1])
    for i in range(x.shape[1]):
        changed = x.clone()
        changed[:, i, 0] += 1
        moved = (answer(path, changed, params)[0] != out).any(-1).any(0).nonzero().flatten().tolist()
        wanted = [i] if i in CLS else [i, CLS[1]] if i in a else [CLS[0], i]
        assert (i in a) + (i in b) + (i in CLS) == 1 and sorted(moved) == sorted(wanted), i


@pytest.mark.parametrize("path", PATHS)
def test_scores_of_a_head_are_as_many_as_the_other_branch_has_patches_and_one(path):
    x, params = drawn()
    w_a, w_b = answer(path, x, params)[2]["weights"]
    assert w_a.shape == (2, HEADS, 1, 1 + CFG.patches[1]) and w_b.shape == (2, HEADS, 1, 1 + CFG.patches[0])
    for w in (w_a, w_b):
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))


@pytest.mark.parametrize("path", PATHS)
def test_what_comes_back_replaces_the_class_token(path):
    x, params = drawn()
    params["back"].zero_()
    out = answer(path, x, params)[0]
    torch.testing.assert_close(out[:, CLS], params["back_bias"].expand(2, 2, WIDTH))


def of_torch(x, params, side, eps):
    """The new class token of one side, by torch's own modules."""

    def norm(t, i):
        return F.layer_norm(t, (WIDTH,), params["norm"][side, i], params["norm_bias"][side, i], eps)

    cls_a, patches_a, cls_b, patches_b = x.split([1, CFG.patches[0], 1, CFG.patches[1]], dim=1)
    cls, patches = ((cls_a, patches_b), (cls_b, patches_a))[side]
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=x.dtype)
    qkv = params["qkv"][side].permute(0, 1, 3, 2).reshape(3 * WIDTH, WIDTH)
    named = {"in_proj_weight": qkv, "in_proj_bias": params["qkv_bias"][side].flatten()}
    named |= {
        "out_proj.weight": params["out"][side].flatten(0, 1).T,
        "out_proj.bias": params["out_bias"][side],
    }
    attention.load_state_dict(named)
    c = F.gelu(norm(cls, 0)) @ params["into"][side] + params["into_bias"][side]
    keys = norm(torch.cat([c, patches], dim=1), 1)
    c = c + attention(keys[:, :1], keys, keys, need_weights=False)[0]
    return F.gelu(norm(c, 2)) @ params["back"][side] + params["back_bias"][side]


@pytest.mark.parametrize("path", PATHS)
def test_class_tokens_are_those_of_torch_s_own_attention(path):
    cfg = PAGE.configure(patches=CFG.patches, eps=1e-2)
    x, params = drawn(cfg)
    out = answer(path, x, params, cfg)[0]
    for side, at in enumerate(CLS):
        torch.testing.assert_close(out[:, at, None], of_torch(x, params, side, cfg.eps))


def test_numbers_of_tokens_states_and_masks_that_it_cannot_be_asked_are_refused():
    x, params = drawn()
    with pytest.raises(
        ValueError, match=r"as many tokens as the settings say \(tokens=9, settings=Config\(patches=\(5, 3\)"
    ):
        answer(PAGE.fast, x[:, 1:], params)
    with pytest.raises(ValueError, match=r"two class tokens, and the patches of two branches \(tokens=1\)"):
        answer(PAGE.fast, x[:, :1], params)
    with pytest.raises(Unsupported, match="a mask beside a fixed number of tokens"):
        make_call(PAGE, CFG, x, params, key_mask=torch.ones(1, 1, x.shape[1], dtype=torch.bool))
    with pytest.raises(Unsupported, match="only causal_self carries a state"):
        make_call(PAGE, CFG, x, params, initial_state=x)
    for patches in ((5,), (5, -1), (1, 2, 3)):
        with pytest.raises(ValueError, match="two numbers of patches, 0 or more"):
            PAGE.config(patches=patches)


def test_branches_without_patches_and_laws_at_every_length():
    cfg = PAGE.configure(patches=(0, 0))
    x, params = drawn(cfg)
    torch.testing.assert_close(
        answer(PAGE.fast, x, params, cfg)[0], answer(PAGE.reference, x, params, cfg)[0]
    )
    case = BlockCase(PAGE, CFG, PAGE.pattern)
    assert [case.inputs(n).q.shape[2] for n in (0, 1, 2, 7, 10)] == [0, 2, 2, 7, 10]
    assert case.at(10).cfg == CFG and case.at(7).cfg.patches == (3, 2)


def test_it_is_a_layer_of_an_encoder_and_of_no_decoder():
    sizes = dict(
        vocab_size=11,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        settings={"crossvit": {"patches": (5, 3)}},
    )
    model = RegardForMaskedLM(RegardConfig(mechanisms=["crossvit", "softmax"], **sizes)).eval()
    ids = torch.arange(10)[None]
    model(ids, labels=ids).loss.backward()
    layer = model.model.layers[0]
    assert all(p.grad is not None for p in layer.parameters())
    x = model.embed(ids)
    out = layer(x, None, None)[0]
    assert torch.equal(out[:, PATCHES], x[:, PATCHES])
    wanted = PAGE.reference(x, CFG, Call("self", params=layer.params.tensors()))[0]
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert catalog.get("crossvit").patterns == ("self",)
