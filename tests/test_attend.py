"""attend: what it returns, and what it says of wrong input."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

import regard
from regard import catalog
from regard.api import attend
from regard.core import Card, Method, Unsupported
from regard.core.mask import causal, predicate, window
from regard.core.roles import Roles
from regard.kinds.mechanism import Mechanism
from regard.nn import Attention


def draw(n=5, m=5, heads=4, groups=2, d=8, e=6, **options):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, h, length, w, generator=g, **options)
        for h, length, w in ((heads, n, d), (groups, m, d), (groups, m, e))
    ]


@dataclass(frozen=True)
class Config:
    pass


def mean(q, k, v, cfg, call):
    return v.mean(2, keepdim=True).expand(-1, -1, q.shape[2], -1), None, {"seen": v.shape[2]}


MEAN = Mechanism(
    config=Config,
    reference=mean,
    patterns=("self",),
    unsupported={"cross": "a mean asks nobody"},
    card=Card("Mean", "none", 2024, "the mean of the values"),
)
METHOD = Method("mean", MEAN, Config())


def test_result():
    q, k, v = draw()
    out, state, aux = attend(q, k, v, "softmax")
    result = attend(q, k, v, "softmax", impl="reference")
    torch.testing.assert_close(out, result.out)
    assert out.shape == (2, 4, 5, 6)
    assert torch.equal(state[0], k)
    assert torch.equal(result.final_state[1], v)
    assert aux == {}


def test_state_carries_on():
    q, k, v = draw()
    whole = attend(q, k, v, "softmax").out
    state = attend(q[:, :, :3], k[:, :, :3], v[:, :, :3], "softmax").final_state
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)  # of all keys, those of the state first
    rest = attend(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], "softmax", initial_state=state, mask=mask).out
    torch.testing.assert_close(rest, whole[:, :, 3:])


def test_masks():
    q, k, v = draw()
    lazy = attend(q, k, v, "softmax", "self", mask=causal() & window(2)).out
    dense = attend(q, k, v, "softmax", "self", mask=(causal() & window(2)).dense(5)).out
    torch.testing.assert_close(lazy, dense)


def test_roles_reach_the_mask():
    @predicate("document")
    def own_document(at):
        return at.q_role("document") == at.k_role("document")

    q, k, v = draw()
    whole = attend(q, k, v, "softmax", "self", mask=own_document(), roles=Roles(document=[0, 0, 1, 1, 1])).out
    part = attend(*(t[:, :, 2:] for t in (q, k, v)), "softmax", "self").out
    torch.testing.assert_close(whole[:, :, 2:], part)


def test_settings_and_configured_methods():
    q, k, v = draw()
    by_name = attend(q, k, v, "softmax", scale=0.3, softcap=2.0).out
    by_method = attend(q, k, v, catalog.method("softmax", scale=0.3), softcap=2.0).out
    assert torch.equal(by_name, by_method)
    sinks = attend(q, k, v, "softmax", sinks=True, params={"sinks": torch.full((4,), 60.0)}).out
    assert sinks.abs().max() < 1e-6


def test_aux():
    assert attend(*draw(), METHOD, "self").aux == {"seen": 5}


def test_it_compiles():
    q, k, v = draw()
    torch._dynamo.reset()
    method = catalog.method("softmax")  # by name, the catalogue's cache would be traced
    traced = torch.compile(lambda *qkv: attend(*qkv, method).out, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(q, k, v), attend(q, k, v, "softmax").out)
    torch._dynamo.reset()


def broken(letter, index, value):
    qkv = dict(zip("qkv", draw(), strict=True))
    qkv[letter][index] = value
    return list(qkv.values())


q, k, v = draw()
WRONG = {
    "near names": (q, k, v, "softmx", {}, KeyError, r"no method is called 'softmx'; near names: softmax"),
    "kind": (
        q,
        k,
        v,
        "window",
        {},
        Unsupported,
        r"window is a mask page, attend takes mechanisms: .*softmax",
    ),
    "setting": (q, k, v, "softmax", {"softcp": 1.0}, ValueError, r"no setting 'softcp'; near names: softcap"),
    "setting value": (q, k, v, "softmax", {"softcap": -1.0}, ValueError, r"softcap > 0 \(softcap=-1.0\)"),
    "rank": (q[0], k, v, "softmax", {}, ValueError, r"softmax: must hold: q is \[B, H, N, D\]"),
    "rank of v": (q, k, v[0], "softmax", {}, ValueError, r"v is \[B, G, M, E\]"),
    "no tensor": (q.tolist(), k, v, "softmax", {}, ValueError, r"q, k and v are tensors"),
    "integers": (q.long(), k.long(), v.long(), "softmax", {}, ValueError, r"floating point \(q=int64"),
    "dtypes": (q, k.double(), v, "softmax", {}, ValueError, r"one dtype \(q=torch.float32, k=torch.float64"),
    "devices": (q, k.to("meta"), v, "softmax", {}, ValueError, r"one device \(q=device.*meta"),
    "batch": (q[:1], k, v, "softmax", {}, ValueError, r"same batch rows \(q=1, k=2, v=2\)"),
    "head counts": (q, k, v[:, :1], "softmax", {}, ValueError, r"same heads \(k=2, v=1\)"),
    "groups": (q[:, :3], k, v, "softmax", {}, ValueError, r"multiple of KV heads \(H=3, G=2\)"),
    "lengths": (q, k, v[:, :, :4], "softmax", {}, ValueError, r"as many values as keys \(keys=5, values=4\)"),
    "width": (q, k[..., :4], v, "softmax", {}, ValueError, r"same width \(q=8, k=4\)"),
    "no keys": (
        q,
        k[:, :, :0],
        v[:, :, :0],
        "softmax",
        {},
        ValueError,
        r"no more queries than keys \(queries=5, keys=0",
    ),
    "self": (q[:, :, :3], k, v, "softmax", {"pattern": "self"}, ValueError, r"queries=3, keys=5"),
    "causal": (q, *draw(m=4)[1:], "softmax", {}, ValueError, r"no more queries than keys"),
    "nan": (
        *broken("k", (1, 0, 2, 3), torch.nan),
        "softmax",
        {},
        ValueError,
        r"k holds nan, first at \[1, 0, 2, 3\]",
    ),
    "inf": (
        *broken("v", (0, 1, 4, 0), -torch.inf),
        "softmax",
        {},
        ValueError,
        r"v holds -inf, first at \[0, 1, 4, 0\]",
    ),
    "pattern": (
        q,
        k,
        v,
        "softmax",
        {"pattern": "causl_self"},
        KeyError,
        r"no pattern .* near names: causal_self",
    ),
    "refused": (
        q,
        k,
        v,
        METHOD,
        {"pattern": "cross"},
        Unsupported,
        r"mean: Mean does not do cross: a mean asks",
    ),
    "unable": (q, k, v, METHOD, {"pattern": "causal_self"}, Unsupported, r"it can do self"),
    "impl": (q, k, v, "softmax", {"impl": "cuda"}, ValueError, r"impl is one of .*'cuda'"),
    "no fast": (q, k, v, METHOD, {"pattern": "self", "impl": "fast"}, Unsupported, r"mean: .* no fast path"),
    "mask dtype": (q, k, v, "softmax", {"mask": torch.ones(5, 5)}, ValueError, r"a mask is bool"),
    "mask shape": (
        q,
        k,
        v,
        "softmax",
        {"mask": torch.ones(4, 5) > 0},
        ValueError,
        r"mask=bool\[4, 5\], B=2, H=4",
    ),
    "mask name": (
        q,
        k,
        v,
        "softmax",
        {"mask": "windw"},
        KeyError,
        r"no method is called 'windw'; near names: window",
    ),
    "mask kind": (q, k, v, "softmax", {"mask": "h2o"}, ValueError, r"a mask is a mask page.*page='h2o'"),
    "params": (
        q,
        k,
        v,
        "softmax",
        {"params": {"sink": q}},
        ValueError,
        r"no parameter 'sink' .*learns nothing",
    ),
    "input": (q, k, v, "softmax", {"x": torch.ones(2, 5, 8)}, ValueError, r"this one does not"),
    "input's shape": (
        q,
        k,
        v,
        "ssd",
        {"x": torch.ones(2, 4, 8)},
        ValueError,
        r"x \[B, M, C\] stands beside the keys",
    ),
    "params' shape": (
        q,
        k,
        v,
        "softmax",
        {"sinks": True, "params": {"sinks": torch.ones(3)}},
        ValueError,
        r"params\['sinks'\] has the shape \(4,\)",
    ),
    "pairs": (
        q,
        k,
        v,
        "linear_attention",
        {"mask": torch.ones(5, 5).tril(1) > 0},
        Unsupported,
        r"a mask of pairs",
    ),
    "state": (
        q,
        k,
        v,
        "softmax",
        {"pattern": "cross", "initial_state": (k, v)},
        ValueError,
        r"only causal_self carries",
    ),
    "sinks": (
        q,
        k,
        v,
        "softmax",
        {"sinks": True},
        ValueError,
        r"params holds sinks, as init gives them \(missing=\['sinks'\]",
    ),
    "x": (
        q,
        k,
        v,
        Method("mean", replace(MEAN, needs_x=True), Config()),
        {"pattern": "self"},
        ValueError,
        r"x=\[B, N, C\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    *qkv, name, options, kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as raised:
        attend(*qkv, name, **options)
    text = str(raised.value)
    if case not in ("near names", "kind", "setting", "setting value"):
        assert len(re.findall(r"(?:\n  |; )q \S.*, k \S.*, v \S", text)) == 1, "the shapes are said once"
        assert f"pattern {options.get('pattern', 'causal_self')!r}" in text


def test_a_mask_page_is_a_mask():
    wanted = attend(q, k, v, "softmax", mask=window(3)).out
    assert torch.equal(attend(q, k, v, "softmax", mask=catalog.method("window", window=3)).out, wanted)
    assert torch.equal(attend(q, k, v, "softmax", mask="causal").out, attend(q, k, v, "softmax").out)
    assert not torch.allclose(wanted, attend(q, k, v, "softmax").out)


def test_old_names_work_and_say_so():
    with pytest.warns(DeprecationWarning, match="initial_state="):
        out = attend(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], "softmax", state=(k[:, :, :3], v[:, :, :3]))
    with pytest.warns(DeprecationWarning, match="final_state"):
        assert out.state[0].shape[2] == 5
    with pytest.raises(ValueError, match="not both"):
        attend(q, k, v, "softmax", state=(k, v), initial_state=(k, v))
    with pytest.warns(DeprecationWarning, match="list_methods"):
        assert regard.find(kind="mask") == regard.list_methods(kind="mask")


def test_every_way_to_ask_gives_one_answer():
    """attend, nn.Attention and the page itself build the same call, and refuse the same things."""
    layer = Attention(8, 4, "gla", kv_heads=2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
        by_head = [t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in parts]
        out = attend(*by_head, "gla", params=dict(layer.params), x=x).out
        wanted = layer.o_proj(layer.norm(out).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x)[0], wanted)
    with pytest.raises(ValueError, match="impl is one of"):
        Attention(8, 4, "softmax", impl="nonsense")
    with pytest.raises(ValueError, match="impl is one of"):
        attend(q, k, v, "softmax", impl="nonsense")
