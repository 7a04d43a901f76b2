"""What the battery leaves out: Aaren does not read the token's query; its prefixes are softmaxes, at any score."""

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core import PATTERNS
from regard.core.call import Call

PAGE = catalog.get("aaren")
PATHS = (PAGE.reference, PAGE.fast)


def drawn(n: int):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=g).double() for _ in range(3))
    return q, k, v, {"query": torch.randn(3, 4, generator=g).double()}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_query_of_the_token_is_not_used(pattern):
    q, k, v, params = drawn(9)
    for path in PATHS:
        outs = [path(x, k, v, PAGE.config(), Call(pattern, params=params))[0] for x in (q, q + 1)]
        assert torch.equal(*outs)


@pytest.mark.parametrize("wide", [1.0, 1e4])
@pytest.mark.parametrize("chunk", [2, 3, 64])
def test_each_prefix_is_a_softmax_over_it(chunk, wide):
    q, k, v, params = drawn(150)
    s = wide * torch.einsum("bhnd,hd->bhn", k, params["query"]) / 2
    sees = torch.ones(150, 150, dtype=torch.bool).tril()
    wanted = s[:, :, None].masked_fill(~sees, -torch.inf).softmax(-1) @ v
    for path in PATHS:
        out, _ = path(q, wide * k, v, PAGE.configure(chunk=chunk), Call(params=params))
        assert_close(out, wanted, rtol=1e-9, atol=1e-9)
