"""The attention of each row's newest queries, query by query: what a policy measures that wants more than its sum."""

import torch
from torch import Tensor

from regard.core.errors import require
from regard.ops.softmax import per_query_head
from regard.ops.view import View


def observed(view: View, newest: int) -> tuple[Tensor, Tensor]:
    """(weights [B, H, newest, n] of the last queries, zero where a row has none; which are there [B, newest] bool).

    The last of each row stands last, whatever padding lies between. Of what a sliding layer stores no longer nothing
    is said; layers that read these slots too are left out.
    """
    require(newest >= 1, "newest >= 1", newest=newest)
    whole, at = (view, None) if view.asked is None else view.asked
    asking = whole.asking()
    if asking is None:
        count = min(newest, whole.new)
        weights = whole.weights(slice(whole.new - count, None))
        there = torch.ones(1, count, dtype=torch.bool, device=weights.device)
    else:
        back = asking.flip(-1).cumsum(-1).flip(-1)  # 1 for the last query of a row
        first = int((asking & (back <= newest)).any(0).int().argmax())
        place = (newest - back).masked_fill(~asking | (back > newest), newest)[:, first:]  # [B, r]
        part = whole.weights(slice(first, None))
        weights = part.new_zeros(*part.shape[:2], newest + 1, part.shape[-1])
        where = place[:, None, :, None].expand_as(part)
        weights = weights.scatter(2, where, part)[:, :, :newest]
        there = torch.arange(newest, device=place.device) >= newest - asking.sum(-1, keepdim=True)
    if at is not None:
        slots = by_query_head(view, at).expand(*weights.shape[:3], -1)
        weights = weights.gather(-1, slots.clamp(min=0)) * (slots >= 0)
    return weights, there


def by_query_head(view: View, x: Tensor) -> Tensor:
    """[1|B, 1|H, 1, m] of what is said of slots [1|B, 1|G, m] of each cache head."""
    return per_query_head(x[:, :, None], view.q.shape[1])
