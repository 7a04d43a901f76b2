"""SnapKV against a loop over heads and tokens that shares nothing with the page."""

import torch

from regard import catalog
from regard.kinds.cache import decide
from regard.ops import View, lower_right


def view_of(q: torch.Tensor, k: torch.Tensor, budget: int) -> View:
    """The view of a prompt of one row, causal."""
    n = k.shape[2]
    sees = lower_right(n, n)
    return View(
        q=q, k=k, v=k, index=torch.arange(n)[None, None], real=None, scale=1.0, seen=n,
        budget=torch.tensor([budget]), groups=k.shape[1], visible=lambda rows: sees[rows][None, None],
    )  # fmt: skip


def kept(q: torch.Tensor, k: torch.Tensor, **settings: int) -> list[list[int]]:
    """The slots of each KV head."""
    method = catalog.method("snapkv", **settings)
    return decide(method.page, [view_of(q, k, settings["budget"])], method.config)[0].slots[0].tolist()


def expected(q: torch.Tensor, k: torch.Tensor, budget: int, window: int, pool: int) -> list[list[int]]:
    """Votes of the window for the tokens before it, the best of each neighbourhood among these tokens alone."""
    n, share, result = k.shape[2], q.shape[1] // k.shape[1], []
    before = n - window
    for g in range(k.shape[1]):
        votes = [0.0] * before
        for h in range(g * share, (g + 1) * share):
            for t in range(before, n):
                weights = (k[0, g, : t + 1] @ q[0, h, t]).softmax(0).tolist()
                votes = [vote + w for vote, w in zip(votes, weights, strict=False)]
        reach = pool // 2
        pooled = [max(votes[max(0, j - reach) : j + reach + 1]) for j in range(before)]
        chosen = sorted(range(before), key=lambda j: -pooled[j])[: budget - window]
        result.append(sorted([*chosen, *range(before, n)]))
    return result


def test_what_the_window_gives_to_itself_lifts_nobody():
    """Queries 6 and 7 look at themselves and, less, at key 2: of those before them 2 and its neighbours come first."""
    k = torch.eye(8)[None, None]
    q = torch.zeros(1, 1, 8, 8)
    for t in (6, 7):
        q[0, 0, t, t], q[0, 0, t, 2] = 11.0, 10.0
    assert kept(q, k, budget=4, window=2, pool=3) == [[1, 2, 6, 7]]


def test_grouped_heads_vote_together_and_keep_one_set():
    g = torch.Generator().manual_seed(0)
    for window, pool in ((1, 1), (4, 3), (6, 7)):
        q, k = (torch.randn(1, heads, 24, 8, generator=g) for heads in (4, 2))
        assert kept(q, k, budget=10, window=window, pool=pool) == expected(q, k, 10, window, pool)
