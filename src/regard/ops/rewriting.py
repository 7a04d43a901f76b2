"""What a method that changes what it keeps starts from: which tokens stay, and what stands for them so far."""

import torch
from torch import Tensor

from regard.core import Unsupported
from regard.ops.kept import Kept
from regard.ops.softmax import at_least_float32
from regard.ops.topk import gather_rows
from regard.ops.view import View


def staying(view: View, kept: Kept) -> Tensor:
    """[B, G, n] bool: the real tokens that stay.

    >>> view = View(*torch.zeros(3, 1, 1, 4, 1), index=torch.arange(4)[None, None], real=None, scale=1.0, seen=4,
    ...             budget=torch.tensor([2]), groups=1)
    >>> staying(view, Kept(torch.tensor([[[0, 3]]])))
    tensor([[[ True, False, False,  True]]])
    """
    slots = kept.slots.expand(len(view.q), view.groups, -1)
    marks = torch.zeros(*slots.shape[:2], view.stored + 1, dtype=torch.bool, device=slots.device)
    return marks.scatter(-1, slots.masked_fill(slots < 0, view.stored), True)[..., :-1] & view.hold()


def standing(view: View, kept: Kept) -> tuple[Tensor, Tensor]:
    """Keys [B, G, m, D] and values [B, G, m, E] of the slots that stay, float32 at least; of empty ones anything."""
    if view.k.shape[1] != view.groups:
        raise Unsupported(
            f"layer {view.layer} stores latents that are expanded when they are read: no key or value of what it keeps "
            "can be changed"
        )
    stored = kept.rewritten or tuple(gather_rows(x, kept.slots) for x in (view.k, view.v))
    return at_least_float32(stored[0]), at_least_float32(stored[1])
