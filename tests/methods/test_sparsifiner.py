"""Sparsifiner's own laws: which keys are read, what is cut off on the way, what learns, and for how many tokens."""

import math
import pickle
from dataclasses import replace

import pytest
import torch

from regard import attend, catalog
from regard.core import Unsupported
from regard.core.call import Call
from regard.methods.mechanisms.sparse.sparsifiner import guess
from regard.nn import Attention
from regard.testing.case import Case

PAGE = catalog.get("sparsifiner")
PATHS = (PAGE.reference, PAGE.fast)
N, D, HEADS = 12, 4, 2
CFG = PAGE.configure(tokens=N, n_down=3, coefficients=2, basis=0.1)


def drawn(cfg=CFG, seed=0):
    """q, k and params, the matrices of entries of both signs on both sides of the threshold."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, HEADS, cfg.tokens, D, generator=g, dtype=torch.float64)
    shapes = {name: p.shape for name, p in PAGE.init(cfg, {"key": D}).items()}
    return q, k, {name: torch.randn(s, generator=g, dtype=torch.float64) / 4 for name, s in shapes.items()}


def read(path, q, k, params, cfg=CFG):
    """[B, H, N, N] the weights of keys: what comes out for values that are unit vectors."""
    v = torch.eye(cfg.tokens, dtype=q.dtype).expand(len(q), q.shape[1], -1, -1)
    return path(q, k, v, cfg, Call("self", params=params))[0]


def connectivity(q, k, p, cfg=CFG):
    """S, written with loops over images, heads and queries."""
    back = torch.where(p["back"].abs() > cfg.basis, p["back"].abs(), torch.zeros(()).double())
    rows = []
    for q_i, k_i in zip(q.flatten(0, 1), k.flatten(0, 1)):
        mixed = p["down"].T @ (k_i @ p["w_k"] + p["b_k"])
        for query in q_i @ p["w_q"] + p["b_q"]:
            c = (mixed @ query / math.sqrt(len(query))).softmax(0)
            if cfg.coefficients is not None:
                c = torch.where(c >= c.sort(descending=True).values[: cfg.coefficients][-1], c, 0 * c)
            rows.append(torch.where(c > cfg.coefficient, c, 0 * c) @ back.T)
    return torch.stack(rows).view(*q.shape[:3], -1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"coefficients": None},
        {"coefficients": None, "coefficient": 0.35},
        {"basis": 0.3},
        {"keep": 0.6},
        {"dense": 3},
    ],
    ids=repr,
)
def test_a_query_reads_the_keys_of_the_largest_entries_and_there_it_is_softmax(path, changes):
    cfg = replace(CFG, **changes)
    q, k, params = drawn(cfg)
    w, s = read(path, q, k, params, cfg), connectivity(q, k, params, cfg)
    keys = s.sort(dim=-1, descending=True, stable=True).indices[..., : cfg.budget]
    mask = torch.zeros_like(s, dtype=torch.bool).scatter(-1, keys, True)
    mask[:, :, : cfg.dense] = True
    wanted = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(w, wanted, rtol=0, atol=1e-12)
    assert set((w > 0).sum(-1)[:, :, cfg.dense :].flatten().tolist()) == {math.ceil(cfg.keep * N)}


@pytest.mark.parametrize("path", PATHS)
def test_the_class_token_reads_all_and_is_read_only_where_it_is_among_the_largest(path):
    q, k, params = drawn()
    for entry, share in ((0.0, 0), (50.0, 1)):
        params["back"][0] = entry
        w = read(path, q, k, params)
        assert (w[:, :, 0] > 0).all()
        assert ((w[:, :, 1:, 0] > 0) == bool(share)).all()


@pytest.mark.parametrize("path", PATHS)
def test_equal_entries_go_to_the_first_keys(path):
    q, k, params = drawn()
    w = read(path, q, k, {**params, "back": torch.zeros_like(params["back"])})
    assert (w[:, :, 1:, : CFG.budget] > 0).all() and not w[:, :, 1:, CFG.budget :].any()


@pytest.mark.parametrize("path", PATHS)
def test_the_sign_of_an_entry_counts_for_the_guess_and_not_for_the_choice(path):
    q, k, params = drawn()
    other = {**params, "back": -params["back"]}
    assert torch.equal(read(path, q, k, other), read(path, q, k, params))
    torch.testing.assert_close(guess(q, k, other), -guess(q, k, params))


def test_the_guess_is_the_product_before_anything_is_cut_off_and_learns_every_parameter():
    q, k, params = drawn()
    params["back"] = params["back"].abs()
    whole = replace(CFG, coefficients=None, coefficient=0.0, basis=0.0)
    torch.testing.assert_close(guess(q, k, params), connectivity(q, k, params, whole))
    params = {name: p.requires_grad_() for name, p in params.items()}
    guess(q, k, params).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in params.values())


@pytest.mark.parametrize("path", PATHS)
def test_the_choice_has_no_gradient(path):
    q, k, params = drawn()
    params = {name: p.requires_grad_() for name, p in params.items()}
    q, k = q.requires_grad_(), k.requires_grad_()
    grads = torch.autograd.grad(
        read(path, q, k, params).sin().sum(), (q, k, *params.values()), allow_unused=True
    )
    assert all(g.abs().max() > 0 for g in grads[:2]) and grads[2:] == (None,) * len(params)


def test_numbers_of_the_paper_and_its_released_runs():
    cfg = PAGE.config()
    assert (cfg.tokens, cfg.budget, cfg.rank) == (197, 50, 32)
    shapes = {name: tuple(p.shape) for name, p in PAGE.init(cfg, {"key": 64}).items()}
    assert shapes["down"] == shapes["back"] == (197, 32) and shapes["w_q"] == shapes["w_k"] == (64, 32)
    assert PAGE.configure(tokens=6).rank == 1 and PAGE.configure(tokens=6, n_down=4).rank == 4
    assert PAGE.configure(tokens=3).rank == 1 and PAGE.configure(tokens=65).budget == 17


def test_another_number_of_tokens_is_refused_with_the_rule_and_the_number_and_so_is_a_mask():
    q, k, params = drawn()
    given = {"pattern": "self", "params": params}
    method = catalog.method("sparsifiner", **vars(CFG))
    assert attend(q, k, q, method, **given).out.shape == q.shape
    with pytest.raises(
        ValueError, match=r"as many tokens as the settings say \(tokens=11, settings=Config\(tokens=12"
    ):
        attend(q[:, :, 1:], k[:, :, 1:], q[:, :, 1:], method, **given)
    with pytest.raises(Unsupported, match="a mask beside a fixed number of tokens"):
        attend(q, k, q, method, mask=torch.ones(N, dtype=torch.bool), **given)


def test_a_layer_of_its_number_of_tokens_learns_is_copied_and_compiles_to_one_graph():
    layer = Attention(8, HEADS, "sparsifiner", "self", tokens=N, keep=0.5)
    x = torch.randn(2, N, 8, generator=torch.Generator().manual_seed(0))
    out = layer(x)[0]
    out.square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is None} == {
        f"params.{name}" for name in ("w_q", "w_k", "b_q", "b_k", "down", "back")
    }
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x)[0], out)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x)[0], out)
    with pytest.raises(ValueError, match="as many tokens as the settings say"):
        layer(x[:, 1:])


def test_laws_are_asked_at_every_length():
    case = Case(PAGE, CFG, "self")
    for n in (1, 7, 65):
        inputs = case.inputs(n)
        assert inputs.q.shape[2] == len(inputs.params["down"]) == n
        assert case.run(PAGE.fast, inputs, keep=1.0)[0].shape[2] == n


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"tokens": 0}, "tokens >= 1"),
        ({"dense": -1}, "dense >= 0"),
        ({"keep": 0.0}, "keep and width are shares"),
        ({"keep": 1.5}, "keep and width are shares"),
        ({"width": 0.0}, "keep and width are shares"),
        ({"n_down": 0}, "n_down is a number of 1 or more, or a share"),
        ({"n_down": 1.0}, "n_down is a number of 1 or more, or a share"),
        ({"basis": -0.1}, "thresholds are 0 or more"),
        ({"coefficient": -0.1}, "thresholds are 0 or more"),
        ({"coefficients": 0}, "coefficients >= 1, or None"),
    ],
)
def test_settings_out_of_range_are_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        PAGE.configure(**settings)
