"""Scores of either sign rise, and hidden keys stay hidden."""

import torch

from regard.methods.steering import pai as page


def test_scores_rise_and_hidden_keys_stay_hidden():
    s = torch.tensor([[[[-2.0, 0.0, 3.0, -torch.inf]]]])
    up = page.raised(s, torch.tensor([[True, True, True, True]]), 0.5)
    assert up.flatten().tolist() == [-1.0, 0.0, 4.5, -torch.inf]
