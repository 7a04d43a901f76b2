"""GAM's own laws: how far a token reaches, padding anywhere, segments, and the bank that no text changes."""

import pytest
import torch
from torch import Tensor

from regard import catalog
from regard.core.call import Call

PAGE = catalog.get("gam")
WIDTH = 6
CONFIGS = [PAGE.configure(**settings) for settings in PAGE.test_settings]
PATHS = (PAGE.reference, PAGE.fast)


def inputs(cfg, n: int = 9, batch: int = 2, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        params = {
            name: (p + 0.1 * torch.randn_like(p)).double()
            for name, p in PAGE.init(cfg, {"width": WIDTH, "heads": 1}).items()
        }
        return torch.randn(batch, n, WIDTH, dtype=torch.float64), params


def near(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
def test_fast_is_the_reference(cfg):
    for n in (1, 7, 65):
        results, mask = [], torch.arange(n)[None].expand(2, -1) % 5 != 1
        for path in PATHS:
            x, params = inputs(cfg, n)
            leaves = {"x": x, **params}
            for leaf in leaves.values():
                leaf.requires_grad_()
            out, state = path(x, cfg, Call(key_mask=mask[:, None], params=params))
            # what comes out where nothing is means nothing
            out = out[mask]
            total = out.cos().sum() + state.sin().sum()
            results.append(
                (out, state, *torch.autograd.grad(total, list(leaves.values()), allow_unused=True))
            )
        for a, b in zip(*results, strict=True):
            if a is not None:
                near(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
def test_a_token_reaches_the_next_kernel_less_one(cfg, path):
    x, params = inputs(cfg)
    base = path(x, cfg, Call(params=params))[0]
    for j in range(9):
        changed = x.clone()
        changed[:, j] += torch.arange(WIDTH)
        moved = (path(changed, cfg, Call(params=params))[0] - base).abs().amax((0, 2)) > 1e-12
        assert moved.nonzero()[:, 0].tolist() == list(range(j, min(9, j + cfg.kernel)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
def test_segments_and_decoding_are_the_whole(cfg, path):
    x, params = inputs(cfg)
    whole, end = path(x, cfg, Call(params=params))
    for sizes in ((4, 1, 4), (1,) * 9):
        state, rows = None, []
        for part in x.split(sizes, dim=1):
            out, state = path(part, cfg, Call(params=params, initial_state=state))
            rows.append(out)
        near(torch.cat(rows, dim=1), whole)
        near(state, end)
    assert end.numel() == 2 * PAGE.state_size(cfg, {"width": WIDTH}, 9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
def test_padding_is_as_if_not_there(cfg, path):
    x, params = inputs(cfg, n=7)
    wanted, end = path(x, cfg, Call(params=params))
    positions = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [0, 1, 4, 5, 6, 9, 11]])  # before; between and after
    wide = torch.full((2, 12, WIDTH), 1e3, dtype=torch.float64)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    wide.scatter_(1, positions[..., None].expand(-1, -1, WIDTH), x)
    mask.scatter_(1, positions, True)
    out, state = path(wide, cfg, Call(key_mask=mask[:, None], params=params))
    near(out.gather(1, positions[..., None].expand(-1, -1, WIDTH)), wanted)
    near(state, end)
    _, state = path(wide[:, :6], cfg, Call(key_mask=mask[:, None, :6], params=params))
    out, state = path(wide[:, 6:], cfg, Call(key_mask=mask[:, None, 6:], params=params, initial_state=state))
    near(out[0, :4], wanted[0, 3:])
    near(state, end)


@pytest.mark.parametrize("path", PATHS)
def test_low_precision(path):
    cfg = CONFIGS[0]
    x, params = inputs(cfg, n=33)
    x, params = x.bfloat16(), {name: p.bfloat16() for name, p in params.items()}
    out, state = path(x, cfg, Call(params=params))
    exact = Call(params={name: p.double() for name, p in params.items()})
    wanted = PAGE.reference(x.double(), cfg, exact)[0]
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (out.double() - wanted).norm() <= 0.02 * wanted.norm()


def test_compiles_in_one_graph():
    cfg = CONFIGS[0]
    x, params = inputs(cfg)
    torch._dynamo.reset()
    traced = torch.compile(lambda x, p: PAGE.fast(x, cfg, Call(params=p))[0], backend="eager", fullgraph=True)
    near(traced(x, params), PAGE.fast(x, cfg, Call(params=params))[0])
    torch._dynamo.reset()
