"""FIT: what groups learn of each other, the layers by torch's own, FITAR's masks and shift, ragged and padded texts."""

import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import regard
from regard.core.call import Call
from regard.methods.blocks import fit as page

WIDTH, HEADS = 8, 2
each_path = pytest.mark.parametrize("path", [page.reference, page.fast], ids=["reference", "fast"])


def drawn(cfg, n, seed=0, batch=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = page.init(cfg, {"width": WIDTH, "heads": HEADS})
        params = {name: (p + 0.2 * torch.randn_like(p)).double() for name, p in params.items()}
        return torch.randn(batch, n, WIDTH, dtype=torch.float64), Call("self", params=params)


def moved(path, cfg, n, tokens):
    """[n] how far each token's output moves when these tokens change."""
    x, call = drawn(cfg, n)
    other = x.clone()
    other[:, tokens] += torch.arange(WIDTH) % 3 - 0.5
    return (path(other, cfg, call)[0] - path(x, cfg, call)[0]).abs().amax((0, 2))


@each_path
@pytest.mark.parametrize("causal", [False, True])
def test_groups_are_apart_without_global_layers(path, causal):
    cfg = page.Config(group=4, rounds=2, global_layers=0, causal=causal)
    far = moved(path, cfg, 12, [5])
    assert not far[:4].any() and not far[8:].any()
    assert (far[5:8] > 1e-4).all() and bool(far[4] > 0) != causal


@each_path
def test_with_them_a_token_moves_all_in_one_round(path):
    assert (moved(path, page.Config(group=4, latents=2), 12, [5]) > 1e-6).all()


@each_path
@pytest.mark.parametrize("rounds", [1, 2])
def test_no_token_sees_a_later_one(path, rounds):
    cfg = page.Config(group=3, latents=2, rounds=rounds, global_layers=2, causal=True)
    for token in range(8):
        far = moved(path, cfg, 8, [token])
        assert not far[:token].any(), token
        assert (far[token:] > 1e-7).all(), token


class Sublayers:
    """torch's layers with the weights of the first round."""

    def __init__(self, p, cfg):
        self.p, self.cfg = p, cfg

    def attention(self, name, at):
        p = {n: self.p[f"{name}_{n}"][at] for n in ("qkv", "qkv_bias", "out", "out_bias")}
        layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
        with torch.no_grad():
            layer.in_proj_weight.copy_(p["qkv"].transpose(2, 3).flatten(0, 2))
            layer.in_proj_bias.copy_(p["qkv_bias"].flatten())
            layer.out_proj.weight.copy_(p["out"].flatten(0, 1).mT)
            layer.out_proj.bias.copy_(p["out_bias"])
        return layer

    def norm(self, x, name, at, i):
        p = (self.p[f"{name}_{n}"][at][i] for n in ("norm", "norm_bias"))
        return nn.functional.layer_norm(x, (WIDTH,), *p, self.cfg.eps)

    def layer(self, x, name, at, hidden=None):
        y = self.norm(x, name, at, 0)
        x = x + self.attention(name, at)(y, y, y, attn_mask=hidden, need_weights=False)[0]
        up, up_bias, down, down_bias = (
            self.p[f"{name}_{n}"][at] for n in ("up", "up_bias", "down", "down_bias")
        )
        return x + nn.functional.gelu(self.norm(x, name, at, 1) @ up + up_bias) @ down + down_bias

    def exchange(self, x, source, name, at):
        y, asked = self.norm(x, name, at, 0), self.norm(source, name, at, 1)
        return x + self.attention(name, at)(y, asked, asked, need_weights=False)[0]


def by_torch(x, p, cfg):
    """Groups as rows of a batch, latents of all groups as one text."""
    batch, n, _ = x.shape
    count, m, layers = n // cfg.group, cfg.latents, Sublayers(p, cfg)
    x = x.reshape(batch * count, cfg.group, WIDTH)
    z = (p["latents"] + page.code(torch.arange(count), WIDTH)[:, None]).repeat(batch, 1, 1)
    of = torch.arange(count).repeat_interleave(m)
    later = of > of[:, None] if cfg.causal else None
    ahead = torch.ones(cfg.group, cfg.group, dtype=torch.bool).triu(1) if cfg.causal else None
    for r in range(cfg.rounds):
        for i in range(cfg.local_layers):
            x = layers.layer(x, "local", (r, i), ahead)
        z = layers.exchange(z, x, "read", (r,)).reshape(batch, count * m, WIDTH)
        for i in range(cfg.global_layers):
            z = layers.layer(z, "global", (r, i), later)
        z = z.reshape(batch, count, m, WIDTH)
        told = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1) if cfg.causal else z
        x, z = layers.exchange(x, told.flatten(0, 1), "write", (r,)), z.flatten(0, 1)
    return x.reshape(batch, n, WIDTH)


@each_path
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_torchs_layers_by_turns(path, causal):
    cfg = page.Config(
        group=4, latents=3, rounds=2, local_layers=2, global_layers=2, causal=causal, expand=2, eps=1e-3
    )
    x, call = drawn(cfg, 12)
    assert_close(path(x, cfg, call)[0], by_torch(x, call.params, cfg), rtol=1e-9, atol=1e-9)


@each_path
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_tokens_count_for_no_group(path, causal):
    """Groups are of the tokens that are there, row by row, and groups of none say nothing."""
    cfg = page.Config(group=3, latents=2, causal=causal)
    x, call = drawn(cfg, 10)
    there = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0, 0], [1] * 10], dtype=torch.bool)
    filled = x.masked_fill(~there[..., None], torch.nan)
    out = path(filled, cfg, call.with_(key_mask=there[:, None]))[0]
    assert_close(out[0, there[0]], path(x[:1, there[0]], cfg, call)[0][0], rtol=1e-9, atol=1e-9)
    assert_close(out[1:], path(x[1:], cfg, call)[0], rtol=1e-9, atol=1e-9)


@each_path
def test_latents_know_the_number_of_their_group(path):
    """Two groups that change places do more than that: what the third is told is of first and second."""
    cfg = page.Config(group=4, latents=2)
    x, call = drawn(cfg, 12)
    other = x.view(2, 3, 4, WIDTH)[:, [1, 0, 2]].reshape(2, 12, WIDTH)
    out, moved = (path(t, cfg, call)[0].view(2, 3, 4, WIDTH) for t in (x, other))
    assert (out[:, 2] - moved[:, 2]).abs().max() > 1e-5
    wanted = [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]
    for width in (4, 3):
        assert page.code(torch.tensor(3), width).tolist() == pytest.approx(wanted[:width])


class Scores(TorchFunctionMode):
    """Counts scores of a head that are asked of torch's attention."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            q, k = args[:2]
            self.count += q.shape[0] * q.shape[2] * k.shape[2]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "cfg",
    [
        page.Config(group=4, latents=2, rounds=2, local_layers=2, global_layers=3),
        page.Config(group=4, global_layers=0),
    ],
)
def test_the_scores_are_as_many_as_are_said(cfg):
    x, call = drawn(cfg, 16, batch=1)
    with Scores() as counted:
        page.fast(x, cfg, call)
    assert counted.count == page.pairs(cfg, 16)


def test_it_is_a_layer_of_an_image_classifier():
    model = regard.nn.VisionBackbone(
        mechanism="fit:group=4", image_size=8, patch_size=2, num_channels=1, hidden_sizes=[8], depths=[2],
        num_attention_heads=[2], num_labels=3,
    )  # fmt: skip
    out = model(torch.randn(2, 1, 8, 8), labels=torch.tensor([0, 2]))
    out.loss.backward()
    assert out.logits.shape == (2, 3)
    grads = [p.grad.abs().max() for name, p in model.named_parameters() if "params" in name]
    assert len(grads) > 40 and all(g > 0 for g in grads)


def test_settings_without_a_meaning_are_refused():
    for wrong in ({"group": 0}, {"latents": 0}, {"rounds": 0}, {"local_layers": -1}):
        with pytest.raises(ValueError, match=r"at least 1|0 layers or more"):
            page.Config(**wrong)
    with pytest.raises(ValueError, match="multiple of the heads"):
        page.init(page.Config(), {"width": 6, "heads": 4})
