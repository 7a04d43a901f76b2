"""A mask beside the model's own: a query sees what both show, at the true indices of the tokens, evicted or not.

A mask whose point it is that tokens see later ones says itself what is causal: in layers that are plain causal it takes
causality's place. A token sees what was fed with it or before it: what a later call would have had to show to earlier
tokens is an error.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import and_

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.attaching.actors import Actor, AttentionCall, refuse_encoder_decoder
from regard.attaching.lazy_mask import LazyMask, Narrowing
from regard.attaching.selected import Selected
from regard.attaching.step import Step
from regard.attaching.views import is_causal
from regard.core import Method, NeverFired, Unsupported, require
from regard.core.errors import present
from regard.core.mask import Coordinates, Mask, causal
from regard.core.roles import Roles
from regard.kinds.mask import looks_ahead
from regard.ops import View, at_index, join_sinks, per_query_head, softmax_attention
from regard.ops.blocks import Blocks, block_attention, blocks_of

SHORT = 256  # stored tokens below which a mask is a dense one; changes the speed, never the result


class AttachedMask(Actor):
    """A core Mask, or that of a mask page. A query that is left with nothing gives zeros."""

    reads_roles = True

    def __init__(
        self, mask: Mask, method: Method | None = None, by_layer: Mapping[int, Mask] | None = None
    ) -> None:
        self.mask, self.method, self.by_layer = mask, method, dict(by_layer or {})
        self.name = repr(mask) if method is None else method.label
        self.ahead = method is not None and looks_ahead(method)
        self.acted = 0
        self.selected = Selected()
        # (tokens before, tokens so far) of this step, once no earlier token was found to see a later one
        self.checked: tuple[int, int] | None = None
        # (mask, queries, keys) of this step -> the blocks that are read, None where that is most of them
        self.lists: dict[tuple[Mask, int, int], Blocks | Tensor | None] = {}

    def check(self, model: PreTrainedModel) -> None:
        refuse_encoder_decoder(f"the mask {self.name}", model)

    def check_fired(self, forwards: int) -> None:
        if self.acted == 0:
            raise NeverFired(f"the mask {self.name} was never asked in {forwards} forwards")

    def check_call(self, call: AttentionCall) -> None:
        if call.rule is None:
            other = (
                "a 4-D mask of your own; join them by &" if call.own_mask else "attention without a mask rule"
            )
            raise Unsupported(f"the mask {self.name} at {call.where} beside {other}")
        if self.ahead and is_causal(call) and not call.rule.model_causal:
            raise Unsupported(
                f"the mask {self.name} at {call.where} shows later tokens, and this layer has a mask of its own (a "
                "window, chunks, packed texts, images) that says otherwise"
            )
        heads = call.q.shape[1]
        mask = self.at(call)
        require(mask.heads in (None, heads), "the heads of the mask are the heads of the layer",
                mask=mask.heads, layer=heads)  # fmt: skip
        for role in mask.needs:
            if role not in call.labels:
                known = ", ".join(call.labels) or "none"
                raise KeyError(f"{self.name} needs the role {role!r}; roles here: {known}")

    def at(self, call: AttentionCall) -> Mask:
        """The mask of this layer."""
        return self.by_layer.get(call.site.layer, self.mask)

    def acts_on(self, call: AttentionCall) -> bool:
        return True

    def begin(self, step: Step) -> None:
        self.lists, self.checked = {}, None

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        """Over the blocks that all attached masks and causality leave, where that says the whole of what is seen."""
        masks = [actor for actor in call.acting if isinstance(actor, AttachedMask)]
        if masks[0] is not self or not says_all(call, view):
            return None
        whole = reduce(and_, [m.at(call) for m in masks])
        whole = whole if any(m.ahead for m in masks) else causal() & whole
        size = call.q.shape[2], view.k.shape[2]
        if (whole, *size) not in self.lists:
            self.lists[whole, *size] = None if size[1] < SHORT else self.listed(call, whole, *size)
        found = self.lists[whole, *size]
        if isinstance(found, Tensor):
            k, v = (t.index_select(2, found) for t in (view.k, view.v))
            return softmax_attention(call.q, k, v, scale=view.scale, sinks=view.sinks)
        return None if found is None else self.over(found, call, view)

    def listed(self, call: AttentionCall, whole: Mask, n: int, m: int) -> Blocks | Tensor | None:
        """What n queries read of m keys: blocks, or of a single query the keys, where rows and heads read alike."""
        roles = Roles(**{name: call.labels[name][:, :m] for name in whole.needs}) if whole.needs else None
        heads, device = call.q.shape[1], call.q.device
        if n > 1:
            return blocks_of(whole, n, m, roles=roles, device=device, heads=heads)
        seen = whole.dense(1, m, roles=roles, heads=heads, device=device)
        same = seen.shape[:2] == (1, 1) or bool((seen == seen[:1, :1]).all())
        return seen[0, 0, 0].nonzero()[:, 0] if same and bool(seen.any()) else None

    def over(self, blocks: Blocks, call: AttentionCall, view: View) -> Tensor:
        n, m = call.q.shape[2], view.k.shape[2]
        if n == m and blocks.same(blocks_of(causal(), n, m, device=call.q.device)):
            # nothing is hidden beside what causality hides
            return softmax_attention(call.q, view.k, view.v, scale=view.scale, causal=True, sinks=view.sinks)
        out, lse = block_attention(call.q, view.k, view.v, blocks, scale=view.scale)
        if not self.ahead:  # its shares are those of causal attention
            self.selected.read(call, call.scaled(), view.k, (blocks,), lse)
        return out if view.sinks is None else join_sinks(out, lse, view.sinks)

    def narrow(self, call: AttentionCall) -> AttentionCall:
        self.acted += 1
        rule = present(call.rule, "the call's mask has a rule")
        narrowing = self._narrowing(call)
        if self.ahead and is_causal(call):
            self.check_earlier(call, narrowing)
        both = replace(
            rule,
            narrowings=(*rule.narrowings, narrowing),
            ahead=rule.ahead or (self.ahead and is_causal(call)),
        )
        return replace(call, mask=LazyMask.of(both))

    def check_earlier(self, call: AttentionCall, narrowing: Narrowing) -> None:
        """An error where tokens of earlier calls would have had to see tokens of this one."""
        seen = call.k.shape[2] if call.layer is None else call.layer.seen
        before, rule = seen - call.fed, present(call.rule, "the call's mask has a rule")
        if before <= 0 or self.checked == (before, seen):
            return
        device = call.q.device
        new = torch.arange(before, seen, device=device)[None, None]
        old = torch.arange(before, device=device)[None, None, :, None]
        shown = narrowing(rule.real(new)[:, :, None].expand(-1, -1, before, -1), old, new)
        pad = rule.pad()
        if pad is not None:
            shown = shown & pad[:, None, :before, None]
        if bool(shown.any()):
            raise Unsupported(
                f"the mask {self.name} at {call.where} lets tokens that were fed before see those of this call, which "
                f"they could not: feed the text in one call (fed before: {before}, now: {call.fed})"
            )
        self.checked = (before, seen)

    def _narrowing(self, call: AttentionCall) -> Narrowing:
        mask = self.at(call)
        roles, order = {name: call.labels[name] for name in mask.needs}, call.order
        device, query_heads = call.q.device, call.q.shape[1]
        batch = call.q.shape[0] if mask.needs else 1
        b = torch.arange(batch, device=device)[:, None, None, None]
        heads = range(query_heads) if call.heads is None else call.heads
        h = torch.tensor(heads if mask.heads else [0], device=device)[None, :, None, None]
        known = Roles(**(roles if order is None else {name: in_order(t, order) for name, t in roles.items()}))

        def narrow(seen: Tensor, q: Tensor, index: Tensor) -> Tensor:
            if mask.heads:
                seen, index = per_query_head(seen, query_heads), per_query_head(index, query_heads)
            if mask.needs:
                top = int(index.max()) if index.numel() else -1
                require(top < known.length, "every token has its labels: index < labelled",
                        index=top, labelled=known.length)  # fmt: skip
            key = index.clamp(min=0)[:, :, None]
            if order is not None:  # places among the tokens of each text, not among its padding
                q, key = (
                    order[:, q.flatten()].clamp(min=0)[:, None, :, None],
                    at_index(order, index)[:, :, None],
                )
            return seen & mask(Coordinates(b, h, q, key.clamp(min=0), (known, known)))

        return narrow


def says_all(call: AttentionCall, view: View) -> bool:
    """Whether causality and the attached masks say all that these queries see: no padding, window, eviction or bias."""
    plain = view is call.view and call.heads is None and call.order is None and call.rule is not None
    plain = plain and call.rule.model_causal and not call.own_mask  # type: ignore[union-attr]
    stored = call.group is None or (call.group.index is None and call.group.start == 0)
    return plain and stored and view.bias is None and view.softcap is None and view.k.shape[2] == view.seen


def in_order(label: Tensor, order: Tensor) -> Tensor:
    """Labels [B, seen] by place among the real tokens, of labels by index in the padded text."""
    real = order.diff(dim=-1, prepend=order.new_full((len(order), 1), -1)) > 0
    label, room = label[:, : order.shape[1]], order.shape[1]
    # padding goes to a column of its own
    at = order.masked_fill(~real, room)
    return label.new_zeros(len(order), room + 1).scatter(1, at, label.expand(len(order), -1))[:, :-1]
