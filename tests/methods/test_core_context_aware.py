"""What the battery leaves out: which tokens are single and which are in a core, where each group ends."""

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core.call import Call

PAGE = catalog.get("core_context_aware")
PATHS = (PAGE.reference, PAGE.fast)


@pytest.mark.parametrize(("group", "local"), [(4, 1), (4, 8), (3, 7), (5, 2), (1, 3), (50, 2), (16, 64)])
def test_cores_and_tokens_leave_no_gap_and_do_not_overlap(group, local):
    """All scores 0: a core and a token weigh the same, so weights count what is read."""
    n = 45
    zero, unit = torch.zeros(1, 1, n, 2).double(), torch.eye(n).double()[None, None]
    for path in PATHS:
        weights = path(zero, zero, unit, PAGE.configure(group=group, local=local), Call())[0][0, 0]
        for i in range(n):
            cores = max(0, (i + 1 - local) // group)
            single = i + 1 - group * cores
            assert cores == 0 or local <= single < local + group
            wanted = torch.zeros(n).double()
            wanted[: group * cores] = 1 / (cores + single) / group
            wanted[group * cores : i + 1] = 1 / (cores + single)
            assert_close(weights[i], wanted, rtol=1e-12, atol=1e-12)


def test_a_core_is_asked_by_the_last_query_of_its_group():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8, 4, generator=g).double() for _ in range(3))
    cfg = PAGE.configure(group=4, local=1)
    for path in PATHS:
        out = path(q, k, v, cfg, Call())[0][0, 0]
        for t, moves in ((2, False), (3, True)):
            other = q.clone()
            other[:, :, t] += 1
            assert torch.equal(path(other, k, v, cfg, Call())[0][0, 0, 6], out[6]) is not moves


def test_fewer_queries_than_keys_are_refused():
    q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    for path in PATHS:
        with pytest.raises(ValueError, match="own text: as many queries as keys"):
            path(q, k, v, PAGE.configure(), Call())
    with pytest.raises(ValueError, match="local >= 1"):
        PAGE.configure(local=0)
