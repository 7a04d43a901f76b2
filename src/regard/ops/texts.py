"""Stored tokens in the order of their text, whatever the order of the slots and the padding between them."""

import torch
from torch import Tensor

from regard.ops.view import View


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


def places(view: View, like: Tensor) -> tuple[Tensor, int]:
    """(each slot's place in the text, shaped like `like` [B, G, n]; the longest row). Of no token: one behind it."""
    length = int(view.length().max())
    return view.rank().masked_fill(~view.hold(), length).expand_as(like), length


def in_text(view: View, x: Tensor, empty: float = 0.0) -> Tensor:
    """[B, G, length] what x [B, G, n] says of each token of the text; `empty` where it is stored no more.

    >>> view = View(*torch.zeros(3, 1, 1, 2, 1), index=torch.tensor([[[3, 1]]]), real=None, scale=1.0, seen=4,
    ...             budget=torch.tensor([2]), groups=1)
    >>> in_text(view, torch.tensor([[[0.5, 0.7]]]))
    tensor([[[0.0000, 0.7000, 0.0000, 0.5000]]])
    """
    place, length = places(view, x)
    return x.new_full((*x.shape[:2], length + 1), empty).scatter(-1, place, x)[..., :-1]


def as_stored(view: View, text: Tensor) -> Tensor:
    """[B, G, n] what is said of each token of the text [B, 1|G, length], for every slot; of empty ones anything."""
    text = text.expand(-1, view.groups, -1)
    place, length = places(view, text.new_empty(()).expand(*text.shape[:2], view.stored))
    return text.gather(-1, place.clamp(max=length - 1))
