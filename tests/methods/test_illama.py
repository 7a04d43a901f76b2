"""The soft mask acts after the softmax: what is hidden still counts in the sum."""

import pytest
import torch
from torch.testing import assert_close

from regard.core.call import Call
from regard.methods.mechanisms.dense import illama


@pytest.mark.parametrize("path", [illama.reference, illama.fast])
def test_at_zero_the_first_row_is_its_own_value_times_its_share_of_the_whole_sum(path):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    out = path(q, k, v, illama.Config(alpha=0.0), Call("self"))[0]
    share = torch.einsum("bhnd,bhmd->bhnm", q, k).mul(0.5).softmax(-1)[:, :, 0, :1]
    assert_close(out[:, :, 0], share * v[:, :, 0])
    assert share.max() < 0.9


def test_the_schedule_goes_from_one_to_zero_and_stays_there():
    linear = [illama.schedule(step, 100) for step in range(101)]
    assert linear[0] == 1.0
    assert linear[50:] == [0.0] * 51
    assert linear == sorted(linear, reverse=True)
    constant = [illama.schedule(step, 100, cutoff=0.25, shape="constant") for step in range(101)]
    assert constant == [1.0] * 25 + [0.0] * 76


def test_blocks_of_rows_give_the_numbers_of_the_whole(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 23, 4, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 23, 23, generator=g) < 0.7
    monkeypatch.setattr("regard.ops.softmax.BLOCK", 4 * 23 * 5)  # five rows at a time
    for pairs in (None, mask):
        call, cfg = Call("self", pair_mask=pairs), illama.Config(alpha=0.3)
        assert_close(illama.fast(q, k, v, cfg, call)[0], illama.reference(q, k, v, cfg, call)[0])
