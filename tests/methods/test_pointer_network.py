"""Pointer network: the scores of a slow loop; weights that follow the inputs; what may not be named twice."""

import math

import torch

from regard import attend
from regard.catalog import method
from regard.ops import softmax


def inputs(n=3, m=6, heads=2, width=4):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, t, width, generator=g, dtype=torch.float64) for t in (n, m, m))
    torch.manual_seed(0)
    dims = {"heads": heads, "kv_heads": heads, "key": width, "value": width, "width": width}
    page = method("pointer_network").page
    params = {name: p.double() for name, p in page.init(page.config(width=5), dims).items()}
    return q, k, v, params


def point(q, k, v, params, **options):
    return attend(q, k, v, "pointer_network", "cross", params=params, width=5, **options)


def test_against_a_loop_in_plain_python():
    q, k, v, params = inputs()
    weights = point(q, k, v, params).aux["weights"]
    for b in range(2):
        for h in range(2):
            for i in range(3):
                scores = []
                for e in k[b, h].tolist():
                    total = 0.0
                    for a in range(5):
                        w_1, w_2 = params["key"][h, a].tolist(), params["query"][h, a].tolist()
                        inner = sum(w * x for w, x in zip(w_1, e, strict=True))
                        inner += sum(w * x for w, x in zip(w_2, q[b, h, i].tolist(), strict=True))
                        total += params["score"][h, a].item() * math.tanh(inner)
                    scores.append(math.exp(total))
                wanted = torch.tensor(scores, dtype=torch.float64) / sum(scores)
                torch.testing.assert_close(weights[b, h, i], wanted)


def test_weights_are_a_distribution_and_the_output_of_one_hot_values():
    q, k, _, params = inputs()
    positions = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    for impl in ("reference", "fast"):
        got = point(q, k, positions, params, impl=impl)
        torch.testing.assert_close(got.out, got.aux["weights"])
        torch.testing.assert_close(got.out.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64))


def test_the_dictionary_is_the_input():
    """In another order the same inputs are pointed at; among more inputs their odds stay."""
    q, k, v, params = inputs()
    weights = point(q, k, v, params).aux["weights"]
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    moved = point(q, k[:, :, order], v, params).aux["weights"]
    torch.testing.assert_close(moved, weights[..., order])
    more = torch.cat([k, k.flip(2) + 1], dim=2)
    longer = point(q, more, torch.cat([v, v], dim=2), params).aux["weights"]
    torch.testing.assert_close(longer[..., 1:6] / longer[..., :1], weights[..., 1:] / weights[..., :1])


def test_what_is_named_once_is_hidden_from_later_queries():
    q, k, v, params = inputs()
    free = torch.ones(3, 6, dtype=torch.bool)
    free[1:, 2], free[2:, 4] = False, False
    for impl in ("reference", "fast"):
        weights = point(q, k, v, params, mask=free, impl=impl).aux["weights"]
        assert (weights.masked_select(~free) == 0).all()
        assert (weights.masked_select(free) > 0).all()
        torch.testing.assert_close(weights[:, :, 0], point(q, k, v, params).aux["weights"][:, :, 0])


def test_blocks_of_queries_are_the_whole(monkeypatch):
    q, k, v, params = inputs(n=7)
    seen = torch.rand(2, 1, 7, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    wanted = point(q, k, v, params, mask=seen, impl="reference")
    monkeypatch.setattr(softmax, "BLOCK", 2 * 2 * 6 * 5 * 3)
    found = point(q, k, v, params, mask=seen, impl="fast")
    torch.testing.assert_close(found.out, wanted.out)
    torch.testing.assert_close(found.aux["weights"], wanted.aux["weights"])
