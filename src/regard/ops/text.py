"""Stored tokens in the order of the text: what is said of slots, said of places, and back."""

from torch import Tensor

from regard.ops.view import View


def places(view: View, like: Tensor) -> tuple[Tensor, int]:
    """(each slot's place in the text, shaped like `like` [B, G, n]; the longest row). Of no token: one behind it."""
    length = int(view.length().max())
    return view.rank().masked_fill(~view.hold(), length).expand_as(like), length


def in_text(view: View, x: Tensor, empty: float = 0.0) -> Tensor:
    """[B, G, length] what x [B, G, n] says of each token of the text; `empty` where it is stored no more.

    >>> import torch
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
