"""The view of one attention call: its tensors, and who sees what at the true indices of what is stored."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from regard.attaching.actors import AttentionCall
from regard.attaching.lazy_mask import LazyMask
from regard.core import Unsupported
from regard.core.errors import present
from regard.ops import View, mix, per_query_head, row_blocks, softmax_attention


def make_view(call: AttentionCall) -> View:
    """All that is stored, as the model itself would attend to it under the call's mask."""
    index = slot_index(call)
    real, bias = real_slots(call, index), slot_bias(call)
    mask, q, scaling = call.mask, call.q, call.options.get("scaling")
    if isinstance(mask, Tensor) and not isinstance(mask, LazyMask) and mask.dtype != torch.bool:
        bias, visible = mask if bias is None else bias + mask, lambda rows: None
    else:
        visible = visibility(mask, q, index, real, causal=is_causal(call))
    first = call.layer is None or call.layer.seen == call.fed
    group, rule = call.group, call.rule
    view = View(
        q=q, k=call.k, v=call.v, index=index, real=real, visible=visible, bias=bias,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        seen=call.k.shape[2] if call.layer is None else call.layer.seen,
        budget=index.new_full((q.shape[0],), call.k.shape[2]),
        groups=call.k.shape[1] if group is None else group.keys.shape[1],
        phase="prefill" if first or call.fed > 1 else "decode", fed=call.fed,
        order=call.order, positions=None if call.layer is None else call.layer.positions,
        causal_order=rule is not None and rule.causal and (group is None or group.index is None),
        softcap=call.options.get("softcap"), sinks=call.options.get("s_aux"),
        count=None if group is None or group.count is None else group.count[..., : call.k.shape[2]],
    )  # fmt: skip
    if call.layer is not None and group is not None:
        view.layer, view.layers = call.turn.number, len(call.layers)
        view.heads, view.notes = group.heads, group.note
        view.total_heads = sum(len(g.heads) for g in call.layer.groups) * len(call.layers)
    return view


def slot_index(call: AttentionCall) -> Tensor:
    """[1|B, 1|G, n] true index of every stored token."""
    if call.group is not None:
        return call.group.table()
    # a static sliding cache begins at its own offset
    return torch.arange(call.k.shape[2], device=call.k.device)[None, None] + (
        0 if call.rule is None else call.rule.kv_offset
    )


def real_slots(call: AttentionCall, index: Tensor) -> Tensor | None:
    if call.rule is not None and call.rule.pad() is not None:
        return call.rule.real(index)
    if call.group is not None and call.group.index is not None and bool((index < 0).any()):
        return index >= 0
    return None


def slot_bias(call: AttentionCall) -> Tensor | None:
    """What is added to the scores: the model's position bias, or the weight of merged slots."""
    bias, group = call.options.get("position_bias"), call.group
    count = None if group is None else group.count
    if bias is not None and count is not None:
        raise Unsupported(
            f"{call.where}: merged slots in a layer with a learned position bias, since they stand nowhere"
        )
    if count is not None:
        return per_query_head(count[..., : call.k.shape[2]].log()[:, :, None], call.q.shape[1])
    if bias is None or group is None or call.layer is None or call.layer.plain:
        return bias
    # the model's bias is that of every token seen, in a sliding layer of those that its window reaches
    bias = bias if call.heads is None or bias.shape[1] == 1 else bias[:, list(call.heads)]
    first = call.layer.reach(call.layer.seen - call.fed)
    return at_slots(bias, group.table() - first, call.q.shape[1])


def at_slots(x: Tensor, slots: Tensor, heads: int) -> Tensor:
    """x [.., .., N, m] in the columns [b, h, n] -> [.., .., N, n]; where a column is -1 any is taken."""
    slots = per_query_head(slots.clamp(min=0), heads)[:, :, None]
    lead = [max(x.shape[i], slots.shape[i]) for i in (0, 1)]
    rows, columns = x.shape[2], slots.shape[-1]
    return x.expand(*lead, -1, -1).gather(-1, slots.expand(*lead, rows, columns))


def is_causal(call: AttentionCall, unless_said: bool = False) -> bool:
    """Whether the call is causal by its options or else by its module; `unless_said` where neither says."""
    causal = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", unless_said) if causal is None else causal)


def visibility(
    mask: Tensor | None, q: Tensor, index: Tensor, real: Tensor | None, causal: bool = False
) -> Callable[[slice], Tensor | None]:
    """A function rows -> [B, 1|H, rows, n] bool, or None where every query of the step sees every slot."""
    new, heads = q.shape[2], q.shape[1]

    def visible(rows: slice) -> Tensor | None:
        if isinstance(mask, LazyMask):
            rule = mask.rule
            if rule.causal and new == 1 and real is None:
                return None
            return per_query_head(rule.at(rows, index), heads)
        if mask is not None:
            return mask[..., rows, : index.shape[-1]]
        if causal and new > 1:
            start, stop, _ = rows.indices(new)
            last = index.shape[-1] - new
            return index[:, :, None] <= torch.arange(start, stop, device=q.device)[:, None] + last
        return None if real is None else per_query_head(real[:, :, None], heads)

    return visible


def run(view: View) -> Tensor:
    """[B, H, N, E]: attention over what the view holds, in blocks of rows when the mask would be large."""
    if view.cached_scores is not None:
        return mix(view.weights(), view.v)
    parts = []
    for rows in row_blocks(view.new, 4 * view.q.shape[0] * view.k.shape[2]):
        bias = view.bias if view.bias is None or view.bias.shape[-2] == 1 else view.bias[..., rows, :]
        parts.append(
            softmax_attention(
                view.q[:, :, rows], view.k, view.v, scale=view.scale, mask=view.visible(rows),
                softcap=view.softcap, bias=bias, sinks=view.sinks,
            )
        )  # fmt: skip
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def padding_first(view: View) -> tuple[View, Tensor | None]:
    """The view of a whole cache with each row's padding before its tokens, and the order [B, N] of its queries.

    None: the padding is there already.
    """
    real = view.hold()[:, 0]  # [B, n]
    if view.order is None or bool((real[:, 1:] >= real[:, :-1]).all()):
        return view, None
    asking = present(view.asking(), "a view with padding knows what asks")
    at, asked = (x.to(torch.uint8).argsort(dim=-1, stable=True) for x in (real, asking))
    q = view.q.take_along_dim(asked[:, None, :, None], 2)
    k, v = (x.take_along_dim(at[:, None, :, None], 2) for x in (view.k, view.v))
    index = view.index.expand(len(at), 1, -1).gather(-1, at[:, None])

    def visible(rows: slice) -> Tensor | None:
        seen = view.visible(slice(None))
        if seen is None:
            return None
        seen = seen.take_along_dim(asked[:, None, :, None], 2)[:, :, rows]
        return seen.take_along_dim(at[:, None, None], 3)

    return replace(view, q=q, k=k, v=v, index=index, real=real.gather(1, at)[:, None], visible=visible), asked
