"""Stored tokens in the order of their text, whatever the order of the slots and the padding between them."""

import torch
from torch import Tensor


def slots_by_place(place: Tensor, there: Tensor, count: int) -> Tensor:
    """[b, g, count] the slot that holds the token of each place 0 … count - 1; -1: none does.

    place  [b, g, n] of every slot, counted from any token on
    there  [b, g, n] bool: slots that hold a token; what lies beyond the counted places is left out

    >>> slots_by_place(torch.tensor([[[2, 0, -1, 1, 3]]]), torch.tensor([[[True, True, True, False, True]]]), 3)
    tensor([[[ 1, -1,  0]]])
    """
    place, there = torch.broadcast_tensors(place, there)
    place = torch.where(there & (place >= 0) & (place < count), place, count)
    slots = torch.arange(place.shape[-1], device=place.device).expand_as(place)
    return slots.new_full((*place.shape[:-1], count + 1), -1).scatter(-1, place, slots)[..., :-1]


def at_places(x: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """[b, g, n] the entries of x [b, g, count] at each slot's place; 0 where `there` is not."""
    lead = [max(x.shape[i], place.shape[i], there.shape[i]) for i in (0, 1)]
    place, there = (t.expand(*lead, -1) for t in (place, there))
    inside = there & (place >= 0) & (place < x.shape[-1])
    found = x.expand(*lead, -1).gather(-1, torch.where(inside, place, 0))
    return torch.where(inside, found, 0)
