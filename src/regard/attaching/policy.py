"""A cache policy at work: budgets, what is selected, its own attention, moved positions, and what stays."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.lazy_mask import MaskRule
from regard.attaching.slots import Group
from regard.attaching.views import at_slots, visibility
from regard.core import Method, NeverFired, Unsupported
from regard.core.errors import present
from regard.kinds.cache import CachePage
from regard.ops import Kept, View, gather_rows, keep_best, parse_budget, per_query_head

# what a page may want measured on the model: name -> the function that gives the setting `heads`
CALIBRATORS: dict[str, Callable[[PreTrainedModel], Any]] = {}


class CachePolicy(Actor):
    """A cache page and its settings."""

    needs_cache = True

    def __init__(self, method: Method) -> None:
        self.method, self.name = method, method.name
        self.acted = 0
        page = self.page
        self.needs_rotary = page.shift is not None or page.attention is not None or page.rotates

    @property
    def page(self) -> CachePage:
        return self.method.page

    def check(self, model: PreTrainedModel) -> None:
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))

    def calibrate(self, model: PreTrainedModel) -> None:
        """Measure on the model what the page needs and its settings leave open."""
        if self.page.calibrate and self.method.config.heads is None:
            self.method = self.method.with_settings(heads=CALIBRATORS[self.page.calibrate](model))

    def check_fired(self, forwards: int) -> None:
        if self.acted == 0:
            raise NeverFired(f"{self.name} never saw a cache in {forwards} forwards")

    def check_call(self, call: AttentionCall) -> None:
        if call.layer is None and self._decodes(call):
            raise Unsupported(
                f"{self.name} acts on a cache of its own kind and this forward has none here; call with "
                "use_cache=True, without gradient checkpointing, and with a dynamic cache (not static or quantised)"
            )
        if call.layer is not None and call.own_mask:
            raise Unsupported(
                "a 4-D mask of your own beside a cache method: slots and columns would not agree"
            )
        if call.turn.nth >= call.turn.of:
            raise Unsupported(
                f"{self.name} at {call.where}: it reads the keys that another layer stored, and the model's "
                "configuration does not say so (kv_sharing_modes), so they may be gone"
            )

    def _decodes(self, call: AttentionCall) -> bool:
        """Whether this is self-attention of a decoder."""
        causal = bool(getattr(call.module, "is_causal", True))
        return call.site.tower == "text" and not self.encoder_decoder and causal

    def acts_on(self, call: AttentionCall) -> bool:
        return call.layer is not None

    def select(self, call: AttentionCall, view: View) -> View:
        """Show the page what is stored; the view of what it reads."""
        self.acted += 1
        page, cfg = self.page, self.method.config
        self._prepare(call, view)
        if page.observe is not None and call.turn.of == 1:
            page.observe(view, cfg)
        slots = page.select(asking(call, view), cfg) if page.select is not None else None
        if slots is not None:
            shift = None if page.shift is None else page.shift(view, slots, cfg)
            return view_of_slots(call, view, slots, shift)
        if page.shift is not None:
            rotate_first(view, page.shift(view, None, cfg), call.slots)
        return view

    def _prepare(self, call: AttentionCall, view: View) -> None:
        """Fill in what a page may use beyond the tensors."""
        group, step = call.slots, call.step
        if view.layer == 0 and group is call.ledger.groups[0]:
            step.restart()
        view.shared, view.memory = step.shared, memory_of(call, view)
        view.report_bytes = lambda n: step.reported.__setitem__(view.layer, n)
        if view.seen not in step.budgets:
            step.budgets[view.seen] = self.budget(view, group, call.rule)
        view.budget = step.budgets[view.seen]
        rotary, module = call.rotary, call.module
        if rotary is not None:
            table = rotary.tables.get(id(module))
            needed = self.page.shift is not None or self.page.attention is not None
            if needed or rotary.can_rotate(module, table):
                view.rotate = lambda x, by: rotary.rotate(module, table, x, by)

    def budget(self, view: View, group: Group, rule: MaskRule | None) -> Tensor:
        """[B] tokens that may stay or be read in each row of this step."""
        setting = getattr(self.method.config, "budget", None)
        budget = parse_budget(self.page.budget(self.method.config) if setting is None else setting)
        real = torch.full((view.q.shape[0],), view.seen, device=view.q.device)
        pad = None if rule is None else rule.pad()
        if pad is not None:
            real = pad[:, : view.seen].sum(-1)
        per_slot = (group.keys.shape[-1] + group.values.shape[-1]) * group.keys.element_size()
        return budget.resolve(real, per_slot * view.total_heads * view.q.shape[0])

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        if self.page.attention is None:
            return None
        if call.fed != call.q.shape[2]:
            raise Unsupported(
                f"{self.name} has an attention of its own, and {call.where}, which reads the keys of another layer, "
                "computes the last queries of a prompt alone; call the model with logits_to_keep=0"
            )
        if call.rule is not None and call.rule.narrowings:
            raise Unsupported(
                f"{self.name} has an attention of its own, which would leave an attached mask out"
            )
        return self.page.attention(call.stored, self.method.config)

    def evict(self, call: AttentionCall, view: View) -> None:
        self._count_bytes(call, view)
        page, cfg, whole = self.page, self.method.config, call.stored
        if call.turn.of > 1:
            asked = call.step.asked(call.slots, call.turn, whole)
            if not asked:
                return
            whole = replace(asked[0], readers=tuple(asked[1:]))
            if page.observe is not None:
                page.observe(whole, cfg)
        if page.phase == "prefill" and whole.phase != "prefill":
            return
        kept: Kept | None = None
        if page.keep is not None:
            kept = page.keep(whole, cfg)
        elif page.score is not None and whole.over():
            kept = keep_best(whole, page.score(whole, cfg))
        if kept is not None:
            if kept.merged is not None and kept.merged[0].shape[1] != call.slots.keys.shape[1]:
                raise Unsupported(
                    f"{self.name} at {call.where}: it merges keys, and this layer stores latents that are expanded "
                    "when they are read"
                )
            call.ledger.keep(call.slots, kept)

    def _count_bytes(self, call: AttentionCall, read: View) -> None:
        """Note how many bytes of keys and values this step reads, scoring for a selection included."""
        whole, step = call.stored, call.step
        size = read.k.nbytes + read.v.nbytes
        if read is not whole and whole.cached_scores is not None:
            size += whole.k.nbytes
        before = 0 if call.group is call.ledger.groups[0] else step.bytes_read.get(whole.layer, 0)
        step.bytes_read[whole.layer] = before + step.reported.get(whole.layer, size)


def asking(call: AttentionCall, view: View) -> View:
    """What a page selects by: a layer that reads the keys of another asks with its last query, as it votes."""
    if call.turn.nth == 0 or view.new == 1:
        return view
    last = slice(view.new - 1, view.new)
    return replace(view, q=view.q[:, :, last], visible=lambda rows: view.visible(last))


def memory_of(call: AttentionCall, view: View) -> dict:
    """What the page remembers of this layer, or of this group of its heads where they hold different lengths."""
    layer = call.ledger
    if "first" not in layer.memory:
        pad = None if call.rule is None else call.rule.pad()
        layer.memory["first"] = view.index.new_zeros(1) if pad is None else pad.int().argmax(-1)
    memory, first = layer.memory, {"first": layer.memory["first"]}
    if len(layer.groups) > 1:
        memory = memory.setdefault(call.slots.heads, {**first})
    # a layer that reads the keys of another remembers its own queries
    return memory if call.turn.nth == 0 else memory.setdefault(f"reader {call.turn.nth}", {**first})


def view_of_slots(call: AttentionCall, view: View, slots: Tensor, shift: Tensor | None) -> View:
    """The view restricted to slots [b, h, m]; `shift` moves the chosen keys to other positions."""
    k, v = gather_rows(view.k, slots), gather_rows(view.v, slots)
    if shift is not None:
        k = rotate(view, k, shift)
    chosen = slots.clamp(min=0)
    lead = [max(view.index.shape[i], slots.shape[i]) for i in (0, 1)]
    several = slots.shape[1] > view.index.shape[1] > 1
    spread = per_query_head(view.index, slots.shape[1]) if several else view.index
    index = spread.expand(*lead, -1).gather(-1, chosen.expand(*lead, -1)).masked_fill(slots < 0, -1)
    real = None if view.real is None and bool((slots >= 0).all()) else index >= 0
    if view.real is not None:
        real = present(call.rule, "only a mask rule knows of padding").real(index)
    if view.count is not None:
        raise Unsupported(f"{call.where}: selecting tokens under merged slots")
    bias = None if view.bias is None else at_slots(view.bias, slots, view.q.shape[1])
    visible = visibility(call.mask, view.q, index, real)
    return replace(view, cached_scores=None, k=k, v=v, index=index, real=real, visible=visible, bias=bias)


def rotate_first(view: View, by: Tensor | None, group: Group) -> None:
    """Rotate the first keys of a group in place; the keys as they first were are kept, so errors never add up."""
    if by is None:
        group.restore()
        return
    s = by.shape[-1]
    if group.origin is None:
        group.origin = group.keys[:, :, :s].clone()
    group.keys[:, :, :s] = rotate(view, group.origin, by)
    view.cached_scores = None


def rotate(view: View, keys: Tensor, by: Tensor) -> Tensor:
    return present(view.rotate, "a page that moves keys is given the model's rotation")(keys, by)
