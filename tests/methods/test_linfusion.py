"""LinFusion's correction after W_q and W_k is the paper's before them, and its means do not count tokens."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from regard import catalog
from regard.core import Method
from regard.kinds.mechanism import run

PAGE = catalog.get("linfusion")
PATHS = ("reference", "fast")


def ask(path, qkv, cfg, **call):
    return run(Method("linfusion", PAGE, cfg), *qkv, impl=path, **call)[0]


def drawn(n: int):
    g = torch.Generator().manual_seed(0)
    w_q, w_k, w_v, last = (torch.randn(8, 8, generator=g).double() for _ in range(4))
    cfg = PAGE.config()
    params = PAGE.init(cfg, {"heads": 2, "kv_heads": 2, "key": 4, "value": 4, "width": 8})
    params = {name: torch.randn(p.shape, generator=g).double() for name, p in params.items()}
    return torch.randn(1, n, 8, generator=g).double(), w_q, w_k, w_v, last, params, cfg


def heads(t):
    return t.unflatten(-1, (2, 4)).transpose(1, 2)


def test_a_correction_of_the_input_is_one_of_queries_and_keys():
    x, w_q, w_k, w_v, last, params, cfg = drawn(11)

    def f(name):
        inner = F.linear(x, params[f"{name}_in"], params[f"{name}_in_bias"])
        inner = F.layer_norm(inner, (8,), params[f"{name}_norm"], params[f"{name}_norm_bias"])
        return F.linear(F.leaky_relu(inner), last)

    q, k = (F.elu(heads(F.linear(x + f(name), w))) + 1 for name, w in (("q", w_q), ("k", w_k)))
    v = heads(F.linear(x, w_v))
    wanted = q @ (k.mT @ v / 11) / (q @ k.mean(2)[..., None] + 1e-4)
    for name, w in (("q", w_q), ("k", w_k)):
        params[f"{name}_out"], params[f"{name}_out_bias"] = w @ last, torch.zeros(8).double()
    for path in PATHS:
        qkv = heads(F.linear(x, w_q)), heads(F.linear(x, w_k)), v
        out = ask(path, qkv, cfg, pattern="self", params=params, x=x)
        assert_close(out, wanted, rtol=1e-9, atol=1e-9)


def test_tokens_that_come_twice_change_nothing():
    x, w_q, w_k, w_v, _, params, cfg = drawn(7)
    qkv = [heads(F.linear(x, w)) for w in (w_q, w_k, w_v)]
    twice = [t.repeat_interleave(2, dim=2) for t in qkv]
    for path in PATHS:
        once = ask(path, qkv, cfg, pattern="self", params=params, x=x)
        often = ask(path, twice, cfg, pattern="self", params=params, x=x.repeat_interleave(2, dim=1))
        assert_close(often, once.repeat_interleave(2, dim=2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4])
def test_the_last_queries_alone_are_corrected_by_their_own_inputs(n):
    x, w_q, w_k, w_v, _, params, cfg = drawn(9)
    q, k, v = (heads(F.linear(x, w)) for w in (w_q, w_k, w_v))
    for path in PATHS:
        every = ask(path, (q, k, v), cfg, params=params, x=x)
        last = ask(path, (q[:, :, -n:], k, v), cfg, params=params, x=x)
        assert_close(last, every[:, :, -n:], rtol=1e-12, atol=1e-12)


def test_without_correction_no_input_of_the_layer_is_read():
    x, w_q, w_k, w_v, _, _, _ = drawn(5)
    qkv = [heads(F.linear(x, w)) for w in (w_q, w_k, w_v)]
    plain = PAGE.config(correct=False)
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in qkv[:2])
    weights = (q @ k.mT).tril()
    wanted = weights @ qkv[2] / (weights.sum(-1, keepdim=True) + 1e-4 * torch.arange(1, 6)[:, None])
    for path in PATHS:
        assert_close(ask(path, qkv, plain), wanted, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="this one does not"):
            ask(path, qkv, plain, x=x)
        with pytest.raises(ValueError, match="reads the layer's input"):
            ask(path, qkv, PAGE.config())
