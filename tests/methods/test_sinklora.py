"""SF-Attn: LongLoRA's groups by rolling tokens as its code does, the heads that return, sinks, and no look ahead."""

import pytest
import torch

from regard.core.mask import causal
from regard.methods.masks import sinklora as page


def rolled(n, group, shifted):
    """[n, n]: same group after a roll by half a group, causal, without the group that joins start and end."""
    at = torch.arange(n)
    if shifted:
        at = at.roll(-group // 2)  # at[r]: the token in place r
    seen = torch.zeros(n, n, dtype=torch.bool)
    for tokens in at.split(group):
        seen[tokens[:, None], tokens] = True
    half = group // 2
    if shifted and n > group:
        seen[:half, -half:] = seen[-half:, :half] = False
    return seen & causal().dense(n)[0, 0]


@pytest.mark.parametrize("group", [4, 8])
def test_without_returned_heads_and_sinks_it_is_longlora(group):
    seen = page.build(page.Config(heads=4, group=group, returned=0.0, sinks=0)).dense(24)[0]
    for head in range(4):
        assert torch.equal(seen[head], rolled(24, group, head >= 2))


@pytest.mark.parametrize(
    ("heads", "returned", "shifted"),
    [(8, 0.0, 4), (8, 0.25, 3), (8, 0.5, 2), (8, 1.0, 0), (5, 0.5, 2), (1, 0.0, 1)],
)
def test_a_share_of_the_shifted_heads_returns(heads, returned, shifted):
    cfg = page.Config(heads=heads, group=4, returned=returned, sinks=0)
    assert cfg.shifted == shifted
    seen = page.build(cfg).dense(16)[0]
    plain, moved = rolled(16, 4, False), rolled(16, 4, True)
    assert all(torch.equal(seen[h], moved if h >= heads - shifted else plain) for h in range(heads))


def test_every_token_sees_the_sinks_and_none_a_later_token():
    seen = page.build(page.Config(heads=4, group=6, returned=0.5, sinks=3)).dense(40)
    later = ~causal().dense(40)
    assert bool(seen[..., 3:, :3].all()) and not bool((seen & later).any())
    assert int(seen.sum(-1).max()) == 6 + 3
