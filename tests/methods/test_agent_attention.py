"""What the battery leaves out: the grid against torch's own pooling, interpolation and convolution; who moves whom."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from regard import catalog
from regard.core import Unsupported
from regard.core.call import Call

PAGE = catalog.get("agent_attention")
DIMS = {"heads": 2, "kv_heads": 2, "key": 4, "value": 3, "width": 8}


def drawn(n: int, m: int, **settings):
    torch.manual_seed(0)
    cfg = PAGE.configure(**settings)
    q, k = torch.randn(2, 2, n, 4).double(), torch.randn(2, 2, m, 4).double()
    params = {name: torch.randn_like(p).double() for name, p in PAGE.init(cfg, DIMS).items()}
    return q, k, torch.randn(2, 2, m, 3).double(), cfg, params


def test_a_grid_is_pooled_stretched_and_convolved_as_images_are():
    high, wide = 6, 10
    q, k, v, cfg, params = drawn(60, 60, agents=9, grid=(high, wide), table=4, conv=3)

    def bias(table):
        block, rows, columns = table.split([16, high, wide], dim=-1)
        block = F.interpolate(block.unflatten(-1, (4, 4)), (high, wide), mode="bilinear", align_corners=False)
        return (block + rows[..., None] + columns[..., None, :]).flatten(-2)

    agents = F.adaptive_avg_pool2d(q.mT.flatten(0, 1).unflatten(-1, (high, wide)), 3).flatten(-2).mT
    agents = agents.unflatten(0, (2, 2))
    gathered = (agents @ k.mT / 2 + bias(params["bias_1"])).softmax(-1) @ v
    wanted = (q @ agents.mT / 2 + bias(params["bias_2"]).mT).softmax(-1) @ gathered
    image = v.mT.flatten(1, 2).unflatten(-1, (high, wide))
    near = F.conv2d(image, params["conv"].flatten(0, 1)[:, None], padding=1, groups=6)
    wanted = wanted + near.flatten(-2).unflatten(1, (2, 3)).mT
    for path in (PAGE.reference, PAGE.fast):
        assert_close(path(q, k, v, cfg, Call("self", params=params))[0], wanted, rtol=1e-10, atol=1e-10)


def test_a_line_is_pooled_and_stretched_as_torch_does():
    q, k, v, cfg, params = drawn(23, 23, agents=5, table=4, conv=0)

    def bias(table):
        return F.interpolate(table, 23, mode="linear", align_corners=False)

    agents = F.adaptive_avg_pool1d(q.mT.flatten(0, 1), 5).mT.unflatten(0, (2, 2))
    gathered = (agents @ k.mT / 2 + bias(params["bias_1"])).softmax(-1) @ v
    wanted = (q @ agents.mT / 2 + bias(params["bias_2"]).mT).softmax(-1) @ gathered
    for path in (PAGE.reference, PAGE.fast):
        assert_close(path(q, k, v, cfg, Call("self", params=params))[0], wanted, rtol=1e-10, atol=1e-10)


def test_hidden_places_of_a_grid_are_in_no_average():
    q, k, v, cfg, params = drawn(16, 16, agents=4, grid=(4, 4), table=2, conv=3)
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    mask[..., [0, 1, 4, 5, 15]] = False  # all of the first agent's cell, and one more place
    results = []
    for junk in (1e3, -1e3):
        filled = (torch.where(mask[:, :, 0, :, None], t, junk) for t in (q, k, v))
        q_j, k_j, v_j = filled
        pair = [
            path(q_j, k_j, v_j, cfg, Call("self", mask[:, :, 0], params=params))[0]
            for path in (PAGE.reference, PAGE.fast)
        ]
        assert_close(*pair, rtol=1e-10, atol=1e-10)
        assert not pair[0][:, :, [0, 1, 4, 5, 15]].any()
        results.append(pair[0])
    assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", ["self", "cross"])
def test_a_query_moves_its_own_output_and_through_its_agents_those_of_others(pattern):
    q, k, v, cfg, params = drawn(12, 12 if pattern == "self" else 9, agents=3, table=2, conv=0)
    for path in (PAGE.reference, PAGE.fast):
        before = path(q, k, v, cfg, Call(pattern, params=params))[0]
        for j in range(12):
            other = q.clone()
            other[:, :, j] += 1
            moved = (path(other, k, v, cfg, Call(pattern, params=params))[0] - before).abs().amax(
                (0, 1, 3)
            ) > 1e-9
            assert moved.all()


def test_what_has_no_meaning_is_refused():
    q, k, v, cfg, params = drawn(9, 9, agents=4, grid=(3, 3))
    with pytest.raises(Unsupported, match="grid"):
        PAGE.fast(q, k, v, cfg, Call("cross", params=params))
    with pytest.raises(ValueError, match="place"):
        PAGE.fast(q[:, :, :8], k[:, :, :8], v[:, :, :8], cfg, Call("self", params=params))
    with pytest.raises(ValueError, match="square"):
        PAGE.configure(agents=5, grid=(3, 3))
