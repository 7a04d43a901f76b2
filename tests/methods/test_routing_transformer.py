"""What the battery leaves out: the leak through the choice of members, decoding, the moving centroids, ties."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from regard import catalog
from regard.core.call import Call

PAGE = catalog.get("routing_transformer")
PATHS = (PAGE.reference, PAGE.fast)
CFG = PAGE.configure(clusters=3)


def drawn(n: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    q, k, v, mu = (
        torch.randn(*s, 4, generator=g).double() for s in ((2, 2, n), (2, 2, n), (2, 2, n), (2, 3))
    )
    return (q, k, v), {"centroids": mu}


def test_a_later_token_can_change_an_earlier_output():
    """The leak of the paper's training pass: weights are causal, which tokens meet is not."""
    (q, k, v), params = drawn(24)
    other = q.clone()
    other[:, :, 18:] = torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(9)).double()
    for path in PATHS:
        out, changed = (path(x, k, v, CFG, Call(params=params))[0] for x in (q, other))
        by = (out - changed).abs().amax((0, 1, 3))
        assert (by[:18] > 0.1).any(), "the members are no longer chosen among all tokens: say so on the page"
        # through the choice alone: with one cluster, of all tokens, nothing leaks
        whole = PAGE.configure(clusters=1)
        one = {"centroids": params["centroids"][:, :1]}
        out, changed = (path(x, k, v, whole, Call(params=one))[0] for x in (q, other))
        assert_close(out[:, :, :18], changed[:, :, :18], rtol=0, atol=1e-12)


def test_a_value_reaches_no_earlier_output():
    (q, k, v), params = drawn(24)
    for path in PATHS:
        out = path(q, k, v, CFG, Call(params=params))[0]
        for t in range(24):
            other = v.clone()
            other[:, :, t] += 1
            by = (path(q, k, other, CFG, Call(params=params))[0] - out).abs().amax((0, 1, 3))
            assert not by[:t].any() and not by[t + 1 :][: 23 - t].isnan().any()


def test_token_by_token_members_are_chosen_among_the_tokens_so_far():
    (q, k, v), params = drawn(13)
    for path in PATHS:
        state = None
        for t in range(13):
            row, state, _ = path(
                *(x[:, :, t : t + 1] for x in (q, k, v)), CFG, Call(params=params, initial_state=state)
            )
            prefix = path(*(x[:, :, : t + 1] for x in (q, k, v)), CFG, Call(params=params))[0]
            assert_close(row[:, :, 0], prefix[:, :, t])


@pytest.mark.parametrize("pattern", ["self", "causal_self"])
def test_centroids_move_to_the_mean_of_their_tokens(pattern):
    (q, k, v), params = drawn(20)
    there = torch.ones(2, 1, 20, dtype=torch.bool)
    there[1, :, 15:] = False
    for decay in (0.0, 0.9, 1.0):
        cfg, call = PAGE.configure(clusters=3, decay=decay), Call(pattern, key_mask=there, params=params)
        x = F.layer_norm(q, (4,), eps=1e-6)
        y = x if pattern == "causal_self" else F.layer_norm(k, (4,), eps=1e-6)
        for path in PATHS:
            moved = path(q, k, v, cfg, call)[2]["centroids"]
            for h in range(2):
                mu = params["centroids"][h]
                tokens = torch.cat([t[:, h][there[:, 0]] for t in (x, y)])
                nearest = (tokens @ mu.T).argmax(1)
                for c in range(3):
                    mean = tokens[nearest == c].mean(0) if (nearest == c).any() else mu[c]
                    assert_close(moved[h, c], decay * mu[c] + (1 - decay) * mean)


def test_of_equal_tokens_the_first_are_members():
    """Eight equal tokens and clusters of two: all clusters take the first two, the others are in none."""
    x, v = torch.tensor([1.0, 2.0, 0.0, -3.0]).double().expand(1, 1, 8, 4), torch.arange(1.0, 9.0).double()
    call = Call(params={"centroids": torch.ones(1, 4, 4).double().cumsum(1)})
    for path in PATHS:
        out = path(x, x, v.view(1, 1, 8, 1), PAGE.configure(clusters=4), call)[0].flatten()
        assert_close(out, torch.tensor([1.0, 1.5, 0, 0, 0, 0, 0, 0]).double())


def test_fewer_queries_than_keys_are_refused():
    (q, k, v), params = drawn(5)
    for path in PATHS:
        with pytest.raises(ValueError, match="own text: as many queries as keys"):
            path(q[:, :, :2], k, v, CFG, Call(params=params))
