"""Attention measured by an equal share: a query that sees c tokens gives 1 to each where it attends to all alike."""

import torch
from torch import Tensor

from regard.ops.view import View


def relative_votes(view: View, newest: int) -> Tensor:
    """[B, G, n] Σ_t c_t w_tj over each row's last `newest` queries of this step, whose weights w are computed at once.

    As View.received: padding asks nothing, and layers that read these slots too vote with their last query.
    """
    votes = sum(relative_votes(other, 1) for other in view.readers)
    if view.asked is not None:  # what has left the window since had its share of the attention
        before, at = view.asked
        received = relative_votes(before, newest)
        return votes + received.gather(-1, at.clamp(min=0).expand(*received.shape[:2], -1)) * (at >= 0)
    asking = view.asking()
    if asking is None:
        asking = torch.ones(1, view.new, dtype=torch.bool, device=view.q.device)
    asking = asking & (asking.flip(-1).cumsum(-1).flip(-1) <= newest)
    rows = slice(int(asking.any(0).int().argmax()), view.new)
    weights, seen = view.weights(rows), view.visible(rows)
    share = weights * (view.stored if seen is None else seen.sum(-1, keepdim=True))
    return view.by_cache_head((share * asking[:, None, rows, None]).sum(2)) + votes
