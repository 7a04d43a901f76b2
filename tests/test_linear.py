"""Linear attention: the fast form against the definition and against a loop over tokens; gradients, strong gates."""

import itertools
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core import PATTERNS, Unsupported
from regard.core.mask import causal, window
from regard.kinds.mechanism import make_call
from regard.ops.chunk import chunked, tiles
from regard.ops.chunk.channels import Channels
from regard.ops.chunk.operators import scan_tiles
from regard.ops.linear import dense_linear, linear

B, H, D, E = 2, 3, 4, 6
KINDS = ("none", "fixed", "token", "channel")


def inputs(n: int, kind: str, ones: bool = False, seed: int = 0, dtype=torch.float64) -> dict:
    draw = torch.Generator().manual_seed(1000 * seed + n)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    q, k, v = randn(B, H, n, D), randn(B, H, n, D), randn(B, H, n, E)
    q, k = (q.abs(), k.abs()) if ones else (q, k)
    shape = {"fixed": (H,), "token": (B, H, n), "channel": (B, H, n, D)}.get(kind)
    g = None if shape is None else -randn(*shape).abs()
    state = randn(B, H, D, E + ones).abs()
    low = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    return {**low, "log_decay": g, "state": state}


def strong(tensors: dict, value: float = -50.0) -> dict:
    """A tenth of the gates nearly close, or close."""
    g = tensors["log_decay"]
    shut = torch.rand(g.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    return {**tensors, "log_decay": g.masked_fill(shut, value)}


def by_token(q, k, v, log_decay, state, normalise=False):
    if normalise:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    rows = []
    for t in range(q.shape[2]):
        g = log_decay
        if g is not None:
            g = g[:, None, None] if g.dim() == 1 else g[:, :, t].reshape(*g.shape[:2], -1, 1)
            state = g.clamp(min=-60).exp() * state
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        rows.append(q[:, :, t, None] @ state)
    out = torch.cat(rows, dim=2)
    return (out[..., :-1] / (out[..., -1:] + 1e-6) if normalise else out), state


def waves(t: torch.Tensor) -> torch.Tensor:
    return t.sin().sum()


def slopes(t: torch.Tensor) -> torch.Tensor:
    """A sum with a weight each, whose gradient does not know rounded outputs."""
    return (t * torch.arange(t.numel()).view(t.shape).sin().to(t.dtype)).sum().double()


def graded(path, tensors: dict, loss=waves) -> dict:
    """Outputs, state and every gradient, by name."""
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    out, state = path(**leaves)
    (loss(out) + (0 if state is None else loss(state))).backward()
    grads = {f"gradient of {name}": t.grad for name, t in leaves.items() if t is not None}
    return {"out": out, "state": state, **grads}


def same(actual: dict, wanted: dict, tol: float = 1e-9) -> None:
    for name, t in wanted.items():
        if t is not None:
            bar = tol * max(1.0, t.abs().max().item())
            assert_close(
                actual[name].to(t.dtype),
                t,
                rtol=0,
                atol=bar,
                msg=lambda message, name=name: f"{name}: {message}",
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7, 64, 65, 300])
def test_scan_is_the_definition_and_the_loop(n, kind):
    for ones in (False, True):
        tensors = inputs(n, kind, ones)
        wanted = graded(lambda **kwargs: by_token(**kwargs, normalise=ones), tensors)  # noqa: B023
        same(graded(lambda **kwargs: dense_linear(**kwargs, normalise=ones), tensors), wanted)  # noqa: B023
        for size in (5, 64, 100):
            same(graded(lambda **kwargs: linear(**kwargs, normalise=ones, chunk=size), tensors), wanted)  # noqa: B023


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_kind(kind, ones):
    """Forward mode, backward twice, and the Hessian that torch.func makes of both."""
    tensors = {name: t if t is None or t.dim() == 1 else t[:1] for name, t in inputs(18, kind, ones).items()}
    names = [name for name, t in tensors.items() if t is not None]

    def scan(*given):
        return linear(**{**tensors, **dict(zip(names, given, strict=True))}, normalise=ones)

    given = [tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(scan, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(scan, given, fast_mode=True)

    def energy(q):
        return scan(q, *(t.detach() for t in given[1:]))[0].square().sum()

    q = tensors["q"]
    assert_close(torch.func.hessian(energy)(q), torch.autograd.functional.hessian(energy, q))
    rows = torch.stack([q, 2 * q])
    wanted = torch.stack([torch.func.grad(energy)(row) for row in rows])
    assert_close(torch.func.vmap(torch.func.grad(energy))(rows), wanted)


def test_a_third_derivative():
    tensors = inputs(5, "token")
    tensors = {name: None if t is None else t[:1] for name, t in tensors.items()}

    def out(by, path):
        return path(**{name: t * (1 + by * (i + 1)) for i, (name, t) in enumerate(tensors.items())})[0].sum()

    found = []
    for path in (linear, by_token):
        by = torch.zeros((), dtype=torch.float64, requires_grad=True)
        slope = out(by, path)
        for _ in range(3):
            (slope,) = torch.autograd.grad(slope, by, create_graph=True)
        found.append(slope)
    assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tiles(kind, monkeypatch):
    """Several tiles to a row, and several rows to a tile, give what one gives."""
    monkeypatch.setattr(tiles, "CHANNELS", 16)
    tensors = inputs(150, kind)
    wanted = graded(by_token, tensors)
    for size in (1, 400, 4000):
        monkeypatch.setattr(tiles, "TILE", {8: size})
        same(graded(lambda **kwargs: linear(**kwargs, chunk=16), tensors), wanted)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("value", [-50.0, -torch.inf])
def test_strong_gates(kind, value):
    """Differences of sums stay exact where a product of e^G and e^-G would overflow."""
    for n in (65, 300):
        tensors = strong(inputs(n, kind), value)
        if value == -torch.inf and kind == "fixed":
            tensors["log_decay"][0] = value
        same(graded(linear, tensors), graded(by_token, tensors), tol=1e-7)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("value", [-0.1, -8.0, -15.0, "mixed"])
def test_strong_gates_keep_the_digits_of_float32(kind, value):
    """Outputs and gradients, those of gates too, which are small where gates are strong, as near as a plain loop's."""
    tensors = inputs(130, kind)
    g = tensors["log_decay"]
    weak = torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    g = torch.where(weak, 0.1 * g, 40 * g) if value == "mixed" else 0.2 * g + value
    tensors["log_decay"] = g
    wanted = graded(by_token, tensors, slopes)
    actual = graded(linear, {name: t.float() for name, t in tensors.items()}, slopes)
    for name, t in wanted.items():
        error = ((actual[name].double() - t).abs().max() / t.abs().max()).item()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("pattern", ["cross", "causal_self", "self"])
def test_100000_tokens_keep_the_digits_of_float32(kind, pattern):
    """Decays of a long text are not differences of two sums over all of it."""
    n, draw = 100_000, torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 1, n, 2, generator=draw, dtype=torch.float64) for _ in range(3))
    g = -torch.rand({"fixed": (1,), "token": (1, 1, n)}.get(kind, (1, 1, n, 2)), generator=draw).double()
    exact = linear(q, k, v, g, pattern=pattern)[0]
    found = linear(*(t.float() for t in (q, k, v, g)), pattern=pattern)[0]
    assert ((found - exact).abs().max() / exact.abs().max()).item() < 2e-6


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_a_closed_gate_forgets(kind):
    """What stood before a gate of -inf has no say: as if the text began there."""
    tensors = inputs(90, kind)
    tensors["log_decay"][:, :, 70] = -torch.inf
    tail = {name: t[:, :, 70:] for name, t in tensors.items() if name != "state"}
    assert_close(linear(**tensors)[0][:, :, 70:], linear(**tail)[0], rtol=0, atol=1e-12)


def test_sub_blocks_follow_the_gates():
    """Weak gates: one block of 64. Gates of -50: blocks in which they do not add up to more than 60."""
    work = tiles.Workspace(*(torch.zeros(1, 64, 1) for _ in range(3)), torch.zeros(1, 64, 1), 1, 64, False)
    for gate, block in ((-0.5, 64), (-1.5, 32), (-50.0, 2), (-60.0, 2)):
        total = torch.full((1, 64, 1), gate).cumsum(1)
        assert Channels(work, total).block == block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["self", "cross", "causal_cross"])
def test_other_patterns(kind, pattern):
    for ones in (False, True):
        tensors = inputs(70, kind, ones)
        tensors["state"] = None
        settings = {"pattern": pattern, "normalise": ones}
        wanted = graded(lambda **tensors: dense_linear(**tensors, **settings), tensors)  # noqa: B023
        same(graded(lambda **tensors: linear(**tensors, **settings), tensors), wanted)  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_keys(kind):
    """Fewer queries than keys: the last query stands at the last key."""
    for ones in (False, True):
        whole = inputs(70, kind, ones)
        for last in (1, 20):
            some = {**whole, "q": whole["q"][:, :, -last:]}
            wanted = linear(**whole, normalise=ones)
            assert_close(
                linear(**some, normalise=ones), (wanted[0][:, :, -last:], wanted[1]), rtol=0, atol=1e-9
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_keys_are_as_if_not_there(kind, pattern):
    """Outputs of the rest, and the state, are those of a text without them; nothing reaches them backward."""
    key_mask = torch.arange(70) % 3 != 1
    for ones in (False, True):
        whole = inputs(70, kind, ones)
        whole["state"] = whole["state"] if pattern == "causal_self" else None
        tokens = ("q", "k", "v", "log_decay") if kind in ("token", "channel") else ("q", "k", "v")
        rest = {**whole, **{name: whole[name][:, :, key_mask] for name in tokens}}
        settings = {"pattern": pattern, "normalise": ones}
        for path in (linear, dense_linear):
            masked = graded(partial(path, **settings, key_mask=key_mask[None, None]), whole)
            out, state = path(**rest, **settings)
            assert_close(masked["out"][:, :, key_mask], out, rtol=0, atol=1e-9)
            assert_close(masked["state"], state, rtol=0, atol=1e-9)
            for name in tokens[1:]:
                assert not masked[f"gradient of {name}"][:, :, ~key_mask].any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_key_masks_of_rows_and_heads(kind):
    """Each row of the batch, and each query head of a group, hides its own keys."""
    whole = inputs(40, kind)
    whole["k"], whole["v"] = whole["k"][:, :1], whole["v"][:, :1]
    masks = torch.rand(B, H, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    for path in (linear, dense_linear):
        out, end = path(**whole, key_mask=masks)
        for b, h in itertools.product(range(B), range(H)):
            rows, heads = slice(b, b + 1), slice(h, h + 1)
            one = {name: None if t is None else t[rows] for name, t in whole.items()}
            one["q"], one["state"] = whole["q"][rows, heads], whole["state"][rows, heads]
            if kind != "none":
                one["log_decay"] = whole["log_decay"][heads if kind == "fixed" else (rows, heads)]
            alone = path(**one, key_mask=masks[rows, heads])
            assert_close(alone, (out[rows, heads], end[rows, heads]), rtol=0, atol=1e-9)


def test_what_linear_attention_cannot_is_refused():
    """By make_call, before a page is reached: a mask of pairs, a state where none carries on, an unknown pattern."""
    method, (q, k, v) = catalog.method("linear_attention"), (torch.randn(2, 3, 5, 4) for _ in range(3))
    for mask in (causal() & window(2), torch.rand(5, 5) < 0.5, torch.ones(5, 5, dtype=torch.bool).tril()):
        with pytest.raises(Unsupported, match="a mask of pairs"):
            make_call(method, q, k, v, pattern="self", mask=mask)
    alike = torch.tensor([True, False, True, True, False]).expand(2, 1, 5, 5)
    call = make_call(method, q, k, v, pattern="self", mask=alike)
    assert call.pair_mask is None
    assert torch.equal(call.key_mask, alike[:, :, 0])
    with pytest.raises(ValueError, match="only causal_self carries a state"):
        make_call(method, q, k, v, pattern="self", initial_state=torch.zeros(2, 3, 4, 5))
    with pytest.raises(KeyError, match="causal_sel"):
        make_call(method, q, k, v, pattern="causal_sel")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(kind, dtype):
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}[dtype]
    for ones in (False, True):
        tensors = inputs(300, kind, ones, dtype=dtype)
        exact = {name: None if t is None else t.double() for name, t in tensors.items()}
        tensors = {n: t if t is None or n in "qkv" else t.float() for n, t in tensors.items()}
        actual = graded(lambda **kwargs: linear(**kwargs, normalise=ones), tensors, slopes)  # noqa: B023
        wanted = graded(lambda **kwargs: linear(**kwargs, normalise=ones), exact, slopes)  # noqa: B023
        assert actual["out"].dtype == dtype
        assert actual["state"].dtype == torch.float32
        for name, t in wanted.items():
            error = (actual[name].double() - t).norm() / t.norm()
            assert error < bound, (name, kind, error.item())


def test_only_what_is_asked_has_a_gradient():
    tensors = inputs(70, "channel")
    tensors["k"].requires_grad_()
    out, _ = linear(**tensors)
    out.sum().backward()
    assert tensors["k"].grad is not None
    assert all(tensors[name].grad is None for name in ("q", "v", "log_decay", "state"))
    with torch.no_grad():
        assert not linear(**tensors)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layouts(dtype):
    """Heads that stand inside tokens, and a gradient that is one number everywhere."""
    tensors = {n: None if t is None else t for n, t in inputs(140, "token", dtype=dtype).items()}
    inside = dict(tensors)
    for name in "qkv":
        inside[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    actual, wanted = (linear(**arguments)[0] for arguments in (inside, tensors))
    assert torch.equal(actual, wanted)
    for arguments in (inside, tensors):
        arguments["q"] = arguments["q"].detach().requires_grad_()
        linear(**arguments)[0].sum().backward()
    assert_close(inside["q"].grad, tensors["q"].grad, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_with_gradients(kind):
    tensors = inputs(70, kind)
    traced = torch.compile(linear, backend="aot_eager", fullgraph=True)
    same(graded(traced, tensors), graded(linear, tensors))
    torch._dynamo.reset()


def test_operators_say_what_they_return():
    """Shapes and dtypes told to torch.compile are those that come, and nothing is changed in place."""
    q, k, v = (torch.randn(4, 70, 5, requires_grad=True) for _ in range(3))
    g, state = -torch.rand(4, 70), torch.randn(4, 5, 6)
    tests = ("test_schema", "test_faketensor")
    for ones in (False, True):
        arguments = (q, k, v, g, state if ones else None, 2, 16, ones, 1e-6, False, True)
        torch.library.opcheck(scan_tiles, arguments, test_utils=tests)


def test_memory_does_not_grow_with_the_text():
    """Forward and backward keep scratch of some tiles and a state per tile, not per chunk."""
    sizes = {}
    for n in (4096, 16384):
        q, k, v = (torch.randn(1, 1, n, 16) for _ in range(3))
        inputs = (t[0] for t in (q, k, v))
        _, _, starts, total = scan_tiles(*inputs, None, None, 1, 64, False, 0.0, False, True)
        sizes[n] = starts.numel() / n
        assert total.numel() == 0
    assert sizes[16384] <= sizes[4096] <= 1.0


def test_state_of_a_step_is_that_of_a_scan():
    for kind in KINDS:
        tensors = inputs(1, kind)
        arguments = {**tensors, "g": tensors["log_decay"]}
        arguments.pop("log_decay")
        assert_close(linear(**tensors), chunked(**arguments, chunk=64), rtol=0, atol=1e-12)
