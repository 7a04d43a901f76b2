"""Sparse prefill: a mechanism that chooses blocks of keys, on a model's prompts; decoding is the model's or a policy's.

It acts on calls of more than one token, in full-attention layers from `dense_layers` on. Layers with a window of their
own keep it, and their attention: they are sparse already. What it left alone, and why, stands in `selection()`.

A page that decides once for a text (`later`) has its decision in the memory of the layer's cache: parts of a prompt
after the first go by it, and so do single tokens where no policy decodes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.attaching import views
from regard.attaching.actors import AttentionCall
from regard.attaching.converted import Converted
from regard.attaching.replacement import MechanismOnKeys, has_own_mask, refuse, without
from regard.attaching.selected import Selected
from regard.attaching.unrotated import unrotated
from regard.core import Method, NeverFired, Unsupported
from regard.core.errors import present
from regard.kinds.mechanism import run
from regard.ops import View, join_sinks
from regard.ops.blocks import Blocks, BlockSettings

LEFT = {
    "mask": "a mask of its own (a window, chunks, packed texts)",
    "layer": "to be dense by `dense_layers`",
    "short": "a text that is dense by `dense_below`",
    "router": "a router that says to read all",
}


def is_sparse(method: Method) -> bool:
    """Whether it is a mechanism for prompts: one that chooses blocks of keys, or says that it is."""
    if method.page.kind != "mechanism":
        return False
    return isinstance(method.config, BlockSettings) or method.page.prefills


class SparsePrefill(MechanismOnKeys):
    """A mechanism that chooses blocks, on prompts."""

    needs_cache = False

    def __init__(self, converted: Converted, decodes: bool = True) -> None:
        super().__init__(converted, prefill=True)
        self.decodes = decodes and self.method.page.later is not None
        self.selected = Selected()
        self.needs_input = self.method.page.reads_x(self.method.config)
        self.needs_rotary = self.method.page.needs_unrotated

    def check_fired(self, forwards: int) -> None:
        if self.acted == 0:
            why = {row["dense"] for row in self.selected.rows.values() if "dense" in row}
            text = (
                f": every layer has {' or '.join(sorted(why))}"
                if why
                else ": no prompt of several tokens came"
            )
            raise NeverFired(f"{self.name} was never asked in {forwards} forwards{text}")

    def reason(self, call: AttentionCall) -> str | None:
        """Why it leaves this call to the model; None: it acts."""
        if call.site.layer < getattr(self.method.config, "dense_layers", 0):
            return LEFT["layer"]
        if call.k.shape[2] <= getattr(self.method.config, "dense_below", 0):
            return LEFT["short"]
        if has_own_mask(call):
            return LEFT["mask"]
        return None

    def acts_on(self, call: AttentionCall) -> bool:
        if call.fed == 1:
            return self.decodes and self.decided(call) is not None
        reason = self.reason(call)
        if reason is not None:
            self.selected.left(call, reason)
        return reason is None

    def check_call(self, call: AttentionCall) -> None:
        if call.fed == 1 or self.reason(call) is not None:
            return
        sinks = call.options.get("s_aux")
        refuse(self.name, call if sinks is None else without(call, "s_aux"))
        if call.layer is not None and len(call.layer.groups) > 1:
            raise Unsupported(f"{self.name} at {call.where}: a cache whose heads hold different lengths")

    def method_at(self, layer: int) -> Method:
        """The method with the settings that this layer has of its own."""
        own = self.converted.by_layer.get(layer)
        return self.method.with_settings(**own) if own else self.method

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        if view.bias is not None or view.count is not None:
            raise Unsupported(f"{self.name} at {call.where}: merged slots, whose weights would be left out")
        if call.rule is not None and call.rule.narrowings:
            raise Unsupported(
                f"{self.name} at {call.where}: an attached mask beside blocks that the data chooses"
            )
        self.acted += 1
        if call.fed == 1:
            return self.read_later(call, view)
        q, mask = call.scaled(), token_mask(self.name, call, view)
        method, params = self.method_at(call.site.layer), self.params_of(call)
        x = call.x if method.page.reads_x(method.config) else None
        raw = unrotated(self.name, call, view.k, view.index) if method.page.needs_unrotated else None
        k, v, state = view.k, view.v, None
        if method.page.decide is not None:
            raw = present(raw, "a page that decides reads unrotated queries")
            decided = self.decision(call, raw[0], mask, method)
            if bool(decided.all()):
                self.selected.left(call, LEFT["router"])
                return None
            # the state of a text that goes on, from its first token where this is the first call
            cut = k.shape[2] - q.shape[2]
            state, k, v = (k[:, :, :cut], v[:, :, :cut], decided), k[:, :, cut:], v[:, :, cut:]
            raw = (raw[0], raw[1][:, :, cut:])
        out, _, aux = run(method, q, k, v, mask=mask, initial_state=state, params=params, x=x, unrotated=raw)
        sinks = call.options.get("s_aux")
        if sinks is not None:
            out = with_sinks(self.name, call, out, aux, sinks)
        blocks = aux.get("blocks")
        lists = () if blocks is None else (blocks,) if isinstance(blocks, Blocks) else blocks
        self.selected.read(call, q, view.k, lists, aux.get("lse"), mask)
        return out

    def decided(self, call: AttentionCall) -> Tensor | None:
        """[B] what was decided for the texts of this cache."""
        return None if call.layer is None else call.layer.memory.get(self.name)

    def decision(self, call: AttentionCall, q: Tensor, mask: Tensor | None, method: Method) -> Tensor:
        """[B] the same, decided now where this is their first call."""
        decided = self.decided(call)
        if decided is None:
            real = None if mask is None else mask[:, 0, 0, -q.shape[2] :].expand(len(q), -1)
            decided = method.page.decide(q, real, method.config, self.params_of(call))
            if call.layer is not None:
                call.layer.memory[self.name] = decided
        return decided

    def read_later(self, call: AttentionCall, view: View) -> Tensor | None:
        """[B, H, 1, E] of a single token after the prompt; None where it reads all."""
        page, newest = self.method.page, view.length()[:, None] - 1
        seen = page.later(
            self.decided(call), view.rank()[:, 0], newest, self.method_at(call.site.layer).config
        )
        return None if bool(seen.all()) else views.run(only(view, seen))


def only(view: View, seen: Tensor) -> View:
    """The view of the slots that are seen [1|B, n]; of a single row what is not read is not touched."""
    if len(seen) > 1:
        also = lambda rows: both(view.visible(rows), seen[:, None, None])  # noqa: E731
        return replace(view, visible=also)
    at = seen[0].nonzero()[:, 0]
    cut = lambda x, axis=-1: None if x is None else x.index_select(axis, at)  # noqa: E731
    return replace(
        view, k=cut(view.k, 2), v=cut(view.v, 2), index=cut(view.index), real=cut(view.real), bias=cut(view.bias),
        count=cut(view.count), visible=lambda rows: cut(view.visible(rows)), cached_scores=None,
    )  # fmt: skip


def both(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def token_mask(name: str, call: AttentionCall, view: View) -> Tensor | None:
    """[B, 1, 1, n] bool: stored tokens that are there, in the order of the text, this call's last; None: all are."""
    if view.k.shape[2] < view.new:
        raise Unsupported(f"{name} at {call.where}: {view.new} queries on {view.k.shape[2]} keys")
    index = view.index
    real = view.real
    there = index >= 0 if real is None else real & (index >= 0)
    place = torch.where(there, index, -1).cummax(-1).values
    if not bool(((place == index) | ~there).all()):
        raise Unsupported(f"{name} at {call.where}: stored keys that are not in the order of their tokens")
    if bool(there.all()):
        return None
    if there.shape[1] > 1 and not bool((there == there[:, :1]).all()):
        raise Unsupported(
            f"{name} at {call.where}: a cache whose heads hold different tokens of a padded batch"
        )
    return there[:, :1, None]


def with_sinks(name: str, call: AttentionCall, out: Tensor, aux: Mapping[str, Any], sinks: Tensor) -> Tensor:
    """The output when the model's learned sinks join the sum: e^lse of e^lse + e^sink is left."""
    if "lse" not in aux:
        raise Unsupported(
            f"{name} at {call.where}: this model's attention has attention sinks, which would be left out"
        )
    return join_sinks(out, aux["lse"], sinks)
