"""TOVA where heads hold different tokens: a token's votes are added up by its place in the text, not by its slot."""

import torch

from regard.methods.caches.tova import Config, score
from regard.ops import View


def test_votes_of_heads_meet_by_token():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 3, 4, generator=generator)
    index = torch.tensor([[[0, 2, 4], [4, 0, 3]]])
    view = View(
        q=q[:, :, -1:],
        k=k,
        v=v,
        index=index,
        real=None,
        scale=1.0,
        seen=5,
        budget=torch.tensor([2]),
        groups=2,
    )
    weights, expected = (k @ q[:, :, -1:].mT).softmax(2)[..., 0], torch.zeros(1, 2, 3)
    for g in range(2):
        for slot, token in enumerate(index[0, g].tolist()):
            expected[0, g, slot] = sum(weights[0, h, index[0, h] == token].sum() for h in range(2)) / 2
    torch.testing.assert_close(score(view, Config()), expected)
