"""Choosing blocks by a score: the best so many, or as many as hold a share of the mass. Ties go to the lower block."""

import torch
from torch import Tensor

from regard.ops.blocks.placed import Placed


def top_blocks(score: Tensor, allowed: Tensor, count: Tensor | int) -> Tensor:
    """[B, H, I, J] bool: the `count` highest of score [B, H, I, J] among the blocks that are allowed.

    `count` is a number, or broadcasts to [B, H, I, 1].
    """
    order = score.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    taken = (torch.arange(score.shape[-1], device=score.device) < count).expand(order.shape)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, taken) & allowed


def top_mass(
    mass: Tensor, allowed: Tensor, share: Tensor | float, first: Tensor | None = None, least: int = 0
) -> Tensor:
    """[B, H, I, J] bool: the fewest blocks, largest first, that hold at least `share` of the mass [B, H, I, J] >= 0.

    `share` broadcasts to [B, H, I, 1]; 1 or more takes every block that is allowed. The blocks of `first` are taken
    before all others, and `least` blocks at least.

    >>> top_mass(torch.tensor([0.1, 0.6, 0.3]), torch.tensor(True), 0.7)
    tensor([False,  True,  True])
    """
    mass = mass.masked_fill(~allowed, 0.0)
    rank = mass.masked_fill(~allowed, -1.0)
    rank = rank if first is None else rank.masked_fill(first & allowed, torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    sorted_mass = mass.gather(-1, order)
    before = sorted_mass.cumsum(-1) - sorted_mass
    share = torch.as_tensor(share, dtype=mass.dtype, device=mass.device)
    wanted = (before < share * mass.sum(-1, keepdim=True)) | (share >= 1)
    wanted = wanted | (torch.arange(mass.shape[-1], device=mass.device) < least)
    taken = torch.zeros_like(wanted).scatter(-1, order, wanted)
    return (taken if first is None else taken | first) & allowed


def both_ends(at: Placed, sinks: int, local: int, block_q: int, block_k: int) -> Tensor:
    """[B, 1, I, J] bool: the first `sinks` keys and `local` up to the last query of a block, in whole blocks."""
    key = torch.arange(at.columns(block_k), device=at.q.device) * block_k
    before = at.first(block_q) + block_q - block_k - key  # from the last key of a block to the last query
    return (key < sinks) | (before < local)


def causal_softmax(score: Tensor, allowed: Tensor) -> Tensor:
    """[B, H, I, J] softmax over the blocks that are allowed; a row without any is zero."""
    return score.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


def diagonal(allowed: Tensor, first: Tensor, block_q: int, block_k: int, local: int = 1) -> Tensor:
    """[B, 1, I, J] bool: the blocks that hold the queries' own keys, and `local` - 1 blocks before these."""
    at = torch.arange(allowed.shape[-1], device=allowed.device)
    low, high = first // block_k - (local - 1), (first + block_q - 1) // block_k
    return (at >= low) & (at <= high) & allowed
