"""Sparse prefill: a mechanism that chooses blocks of keys, on a model's prompts; decoding is the model's or a policy's.

It acts on calls of more than one token, in full-attention layers from `dense_layers` on. Layers with a window of their
own keep it, and their attention: they are sparse already. What it left alone, and why, stands in `selection()`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.attaching.actors import AttentionCall
from regard.attaching.converted import Converted
from regard.attaching.replacement import MechanismOnKeys, refuse
from regard.attaching.selected import Selected
from regard.core import Method, NeverFired, Unsupported
from regard.kinds.mechanism import run
from regard.ops import View, join_sinks
from regard.ops.blocks import Blocks, BlockSettings

LEFT = {
    "mask": "a mask of its own (a window, chunks, packed texts)",
    "layer": "to be dense by `dense_layers`",
    "short": "a text that is dense by `dense_below`",
}


def is_sparse(method: Method) -> bool:
    """Whether it is a mechanism for prompts: one that chooses blocks of keys, or says that it is."""
    if method.page.kind != "mechanism":
        return False
    return isinstance(method.config, BlockSettings) or method.page.prefills


class SparsePrefill(MechanismOnKeys):
    """A mechanism that chooses blocks, on prompts."""

    needs_cache = False

    def __init__(self, converted: Converted) -> None:
        super().__init__(converted, prefill=True)
        self.selected = Selected()
        self.needs_input = self.method.page.reads_x(self.method.config)

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
        if call.options.get("sliding_window") is not None or (
            call.rule is not None and not call.rule.model_causal
        ):
            return LEFT["mask"]
        return None

    def acts_on(self, call: AttentionCall) -> bool:
        if call.fed == 1:
            return False
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
        q, mask = call.scaled(), token_mask(self.name, call, view)
        x = call.x if self.method.page.reads_x(self.method.config) else None
        out, _, aux = run(
            self.method_at(call.site.layer), q, view.k, view.v, mask=mask, params=self.params_of(call), x=x
        )
        sinks = call.options.get("s_aux")
        if sinks is not None:
            out = with_sinks(self.name, call, out, aux, sinks)
        blocks = aux.get("blocks")
        lists = () if blocks is None else (blocks,) if isinstance(blocks, Blocks) else blocks
        self.selected.read(call, q, view.k, lists, aux.get("lse"), mask)
        return out


def without(call: AttentionCall, name: str) -> AttentionCall:
    return replace(call, options={**call.options, name: None})


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
