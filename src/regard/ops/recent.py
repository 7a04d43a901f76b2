"""Queries of a text's last tokens, held over the steps of decoding, and what they give to the tokens stored now.

`remember` is called at every step, as a page's `observe`. `recent_scores` and `recent_weights` ask with what it holds,
newest last. The weights are those over what is stored at the time of asking: tokens that are gone take no part.
"""

from dataclasses import replace

import torch
from torch import Tensor

from regard.ops.softmax import per_query_head
from regard.ops.view import View


def remember(view: View, window: int) -> None:
    """Add this step's queries to the last `window` of each row that the layer's memory holds.

    Each row ends with its newest token: what padding asks, and what is missing of a short text, stands before.
    """
    memory, asking, rows = view.memory, view.asking(), len(view.q)
    old, queries = remembered(view), view.q
    count = memory.get("asked", view.budget.new_zeros(rows))  # [B] how many are of real tokens
    held = old.shape[2]
    if asking is None:
        queries = queries[:, :, -window:]
        asking = torch.ones(rows, queries.shape[2], dtype=torch.bool, device=queries.device)
    queries = torch.cat([old, queries], 2)
    there = torch.arange(held, device=queries.device) >= held - count[:, None]
    order = torch.cat([there, asking], 1).to(torch.uint8).argsort(dim=-1, stable=True)[:, -window:]
    memory["of"] = order.new_tensor([heads_of(view)])
    memory["queries"] = queries.take_along_dim(order[:, None, :, None], 2)  # [B, H, w, D]
    memory["asked"] = (count + asking.sum(-1)).clamp(max=window)


def heads_of(view: View) -> list[int]:
    return list(view.heads or range(view.groups))


def remembered(view: View) -> Tensor:
    """[B, H, m, D] what is held of these heads, which may have parted from others since."""
    memory, heads = view.memory, heads_of(view)
    if "queries" not in memory:
        return view.q[:, :, :0]
    before = memory["of"][0].tolist()
    if before == heads:
        return memory["queries"]
    by_head = memory["queries"].unflatten(1, (len(before), -1))
    return by_head[:, [before.index(head) for head in heads]].flatten(1, 2)


def asking_again(view: View) -> tuple[View, Tensor]:
    """The view as the remembered queries see it, and which of them [1|B, w] are of real tokens."""
    q, width = view.memory["queries"], view.memory["queries"].shape[2]
    age = torch.arange(width - 1, -1, -1, device=q.device)  # [w] of the queries' tokens
    asks = age < view.memory["asked"][:, None]
    seen = view.hold()[:, :, None] & (view.age()[:, :, None] >= age[:, None]) & asks[:, None, :, None]
    seen = per_query_head(seen, q.shape[1])
    # a bias that depends on distance differs from row to row by what a softmax does not see
    bias = None if view.bias is None else view.bias[..., -1:, :]
    return replace(
        view, q=q, bias=bias, fed=None, cached_scores=None, visible=lambda rows: seen[:, :, rows]
    ), asks


def recent_scores(view: View) -> tuple[Tensor, Tensor]:
    """[B, H, w, n] scores of the remembered queries, -inf where one does not see a token, and which [1|B, w] ask."""
    again, asks = asking_again(view)
    return again.visible_scores(), asks


def recent_weights(view: View) -> tuple[Tensor, Tensor]:
    """[B, H, w, n] attention weights of the remembered queries, zero where none is, and which [1|B, w] ask."""
    again, asks = asking_again(view)
    return again.weights(), asks
