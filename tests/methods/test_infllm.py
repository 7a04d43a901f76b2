"""InfLLM's key of a block is the sum of those tokens alone that represent it."""

import torch

from regard.methods.caches import infllm
from regard.ops import View


def test_a_block_of_fewer_tokens_than_may_represent_it_has_their_keys_alone():
    k = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])[None, None, :, None]
    r = torch.tensor([[[5.0, 4.0, 1.0, 3.0, 2.0]]])
    slots = torch.tensor([[[1, 2, 3, 4, -1, -1]]])  # a whole block of three tokens, and one that has begun
    view = View(k[:, :, :1], k, k, torch.arange(5)[None, None], None, 1.0, 5, torch.tensor([5]), 1)
    for representatives, wanted in ((1, [10, 10000]), (2, [1010, 10000]), (9, [1110, 10000])):
        cfg = infllm.Config(block=3, representatives=representatives)
        assert infllm.keys(view, cfg, r, slots)[0, 0, :, 0].tolist() == wanted
