"""LongHeads against a loop over layers, heads and queries that shares nothing with the page."""

import pytest
import torch

import regard
from regard.testing import zoo

W, K = 8, 4


def rope(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """x [n, D] rotated to its positions, base 10000, the two halves paired."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int, most: int) -> torch.Tensor:
    """One head of one row: q, k, v [n, D] as projected, not rotated."""
    scale, near, keys = q.shape[-1] ** -0.5, torch.arange(w), []
    for c in range(len(k) // w):
        chunk = slice(c * w, c * w + w)
        qc, kc = rope(q[chunk], near), rope(k[chunk], near)
        mean = ((qc @ kc.T * scale).softmax(-1) @ v[chunk]).mean(0)
        keys.append((kc @ mean * scale).softmax(0) @ kc)
    rows = []
    for i in range(len(q)):
        t = i // w
        if t < most:
            chunks = list(range(t + 1))
        else:
            score = {c: float(q[i] @ keys[c]) for c in range(1, t - 1)}
            chunks = sorted([0, t - 1, t, *sorted(score, key=lambda c: -score[c])[: most - 3]])
        slots = torch.tensor([j for c in chunks for j in range(c * w, c * w + w) if j <= i])
        at = rope(k[slots], torch.arange(len(slots)))  # only the last chunk can be cut short
        me = rope(q[i : i + 1], torch.tensor([len(slots) - 1]))
        rows.append((me @ at.T * scale).softmax(-1) @ v[slots])
    return torch.cat(rows)


@torch.no_grad()
def oracle(model, ids: torch.Tensor, w: int, most: int) -> torch.Tensor:
    """[n, vocabulary] logits of one row of ids [n] under LongHeads."""
    config, x = model.config, model.model.embed_tokens(ids)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    for layer in model.model.layers:
        h, a = layer.input_layernorm(x), layer.self_attn
        q, k, v = (p(h).view(len(ids), -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
        kv_head = [i * groups // heads for i in range(heads)]
        z = [head(q[:, i], k[:, g], v[:, g], w, most) for i, g in enumerate(kv_head)]
        x = x + a.o_proj(torch.cat(z, dim=-1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@pytest.fixture(scope="module")
def model():
    return zoo.build("llama")[0]


@torch.no_grad()
@pytest.mark.parametrize("prompt", [5, 31, 64, 71])
def test_prompt_and_decoding_are_the_definition(model, prompt):
    ids = zoo.ids(2, 83)
    expected = torch.stack([oracle(model, row, W, K) for row in ids])
    with regard.attach(model, "longheads", chunk=W, chunks=K):
        out = model(ids[:, :prompt])
        logits = [out.logits]
        for i in range(prompt, ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=2e-4)


@torch.no_grad()
def test_a_prompt_in_pieces_is_the_same(model):
    ids, logits, cache = zoo.ids(2, 83), [], None
    expected = torch.stack([oracle(model, row, W, K) for row in ids])
    with regard.attach(model, "longheads", chunk=W, chunks=K):
        for piece in ids.split([3, 29, 20, 31], dim=1):
            out = model(piece, past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("budget", [32, 0.4])
def test_left_padding_is_not_text(model, budget):
    long, short = zoo.ids(1, 80), zoo.ids(1, 67)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 13, dtype=torch.long), short], 1)])
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings |= {"output_scores": True, "return_dict_in_generate": True}

    def scores(tokens, mask):
        with regard.attach(model, "longheads", budget=budget, chunk=W, chunks=K):
            return torch.stack(model.generate(tokens, attention_mask=mask, **settings).scores, 1)

    both = scores(ids, (ids > 0).long())
    for row, alone in zip(both, (long, short), strict=True):
        torch.testing.assert_close(row, scores(alone, torch.ones_like(alone))[0], rtol=0, atol=2e-4)


@torch.no_grad()
def test_within_the_trained_length_nothing_changes(model):
    ids = zoo.ids(2, 64)
    with regard.attach(model, "longheads", chunk=W, chunks=8):
        inside = model(ids).logits
    torch.testing.assert_close(inside, model(ids).logits, rtol=0, atol=1e-5)
