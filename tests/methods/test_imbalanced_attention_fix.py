"""The uniform control adds as much weight over all heads as gains by head do, before rows are renormalised."""

import torch

from regard.methods.steering import imbalanced_attention_fix as page


def test_the_control_adds_as_much():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(2, 4, 1, 9, generator=g, dtype=torch.float64).softmax(-1)
    image, gain = torch.zeros(2, 9).bool(), torch.zeros(2, 9).double()
    image[:, 2:7], gain[:, 3], gain[:, 5] = True, 0.7, 0.3
    added = []
    for weighted in (True, False):
        changed = page.amplified(w, gain, image, weighted)
        assert torch.allclose(changed.sum(-1), w.sum(-1), atol=1e-12)
        scale = w[..., :1] / changed[..., :1]  # an unmarked key shows by how much the row was shrunk
        added.append(((changed * scale).sum(-1) - 1).sum(1))
    assert torch.allclose(*added, atol=1e-12)
