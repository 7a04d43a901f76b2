"""CMAI: a token that is generated sees what it would see if all rows were there at once."""

import torch

from regard.methods.steering import cmai
from regard.ops.steered import Steered


def at(notes: dict, first: int, rows: int, image: torch.Tensor) -> Steered:
    n = first + rows
    return Steered(
        0, 1, "decode", rows=torch.arange(first, n)[None], role=lambda name: image[:, :n],
        row_role=lambda name: image[:, first:n], notes=notes,
    )  # fmt: skip


def test_token_by_token_is_all_at_once():
    g = torch.Generator().manual_seed(0)
    image = torch.tensor([[False, True, True, True, True, False, False, False]])
    s = torch.randn(1, 2, 8, 8, generator=g).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    cfg = cmai.Config()
    whole = cmai.scores(at({}, 0, 8, image), s, cfg)
    notes: dict = {}
    parts = [cmai.scores(at(notes, 0, 6, image), s[:, :, :6, :6], cfg)]
    parts += [cmai.scores(at(notes, i, 1, image), s[:, :, i : i + 1, : i + 1], cfg) for i in (6, 7)]
    for part, (first, last) in zip(parts, ((0, 6), (6, 7), (7, 8)), strict=True):
        assert torch.equal(part, whole[:, :, first:last, :last])
    assert (whole[0, :, 5:, 1:5] == -torch.inf).sum(-1).tolist() == [[2] * 3] * 2
    assert torch.equal(whole[:, :, :5], s[:, :, :5])
