"""One forward of the whole model: what its layers share, and the labels of its tokens by role."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.attaching.ledger import LedgerLayer
from regard.attaching.places import Places
from regard.core import require

RoleRule = Callable[[Tensor], Tensor]  # input ids [B, N] -> bool or int labels [B, N]
Labels = dict[str, Tensor]  # role -> labels of tokens


@dataclass
class Step:
    """One forward. `number` counts from 0 within the attachment; -1 before the first.

    labels      of the tokens that this forward adds to the text
    ids_labels  of the latest input ids, which an encoder and attention without a cache read
    budgets     tokens seen -> [B] tokens that may stay or be read; the same in all layers, so computed once
    limits      tokens seen -> [B] tokens that may stay by a budget in bytes, all that is held counted
    places      answers that depend on places in the text alone, for the layers whose tokens stand alike
    shared      what the layers of a page hand on to those above, by a name of the page
    reported    layer -> bytes that a page with an attention of its own says it read
    bytes_read  layer -> bytes of keys and values that were read
    calls       slots that several layers read -> the calls of those that have read them so far
    """

    number: int = -1
    stream: str = "main"  # or the name of a pass beside the model's own, which observers do not write down
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what the model was called with
    caching: bool = False  # whether this forward has a cache
    output_attentions: bool = False
    labels: Labels = field(default_factory=dict)
    ids_labels: Labels = field(default_factory=dict)
    budgets: dict[int, Tensor] = field(default_factory=dict)
    limits: dict[int, Tensor] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    shared: dict[str, Tensor] = field(default_factory=dict)
    reported: dict[int, int] = field(default_factory=dict)
    bytes_read: dict[int, int] = field(default_factory=dict)
    calls: dict[tuple, list[Any]] = field(default_factory=dict)
    waiting: list[tuple[Any, Any]] = field(default_factory=list)  # calls of one layer, decided together
    later: list[tuple[Any, Any]] = field(default_factory=list)  # calls of all layers, decided after the last

    def asked(self, call: Any) -> list[Any]:
        """The calls of all layers that read the slots of this one, once the last of them has; before that none."""
        key = id(call.layer), call.slots.heads
        calls = [*(self.calls.pop(key) if call.turn.nth else ()), call]
        if call.turn.last:
            return calls
        self.calls[key] = calls
        return []

    def restart(self) -> None:
        """The first layer begins. A base model that is called by itself begins no new step: nothing old may stay."""
        self.budgets.clear()
        self.limits.clear()
        self.places.clear()
        self.shared.clear()
        self.reported.clear()
        self.waiting.clear()
        self.later.clear()

    def next(self, inputs: dict, roles: Mapping[str, RoleRule]) -> "Step":
        """The step of a forward that was called with these inputs."""
        ids, answer = inputs.get("input_ids"), inputs.get("decoder_input_ids")
        text = ids if answer is None else answer
        return Step(
            number=self.number + 1,
            inputs=inputs,
            output_attentions=bool(inputs.get("output_attentions")),
            labels={} if text is None else labelled(roles, text),
            ids_labels=self.ids_labels if ids is None else labelled(roles, ids),
        )


def named(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a forward by name, those that were given by place too."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs} if args else kwargs


def labelled(roles: Mapping[str, RoleRule], ids: Tensor) -> Labels:
    """The labels [B, N] that each rule gives these tokens."""
    labels = {name: torch.as_tensor(rule(ids), device=ids.device) for name, rule in roles.items()}
    for label in labels.values():
        require(label.shape == ids.shape, "a role gives one label per token", ids=ids, label=label)
    return labels


def has_role(label: Tensor) -> Tensor:
    """Which tokens have a role: of numbered labels those above zero."""
    return label if label.dtype == torch.bool else label > 0


def text_labels(layer: LedgerLayer | None, step: Step, roles: Mapping[str, RoleRule], new: int) -> Labels:
    """Role -> [B, seen] labels of the text of this layer; they live with the layer, as its keys do."""
    if layer is None or not roles:
        return step.ids_labels
    for name in roles:
        label, old = step.labels.get(name), layer.labels.get(name)
        labelled_before = 0 if old is None else old.shape[1]
        if labelled_before == layer.seen:
            continue
        if label is None:
            label = torch.zeros(layer.groups[0].keys.shape[0], new, dtype=torch.bool, device=layer.device)
        require(
            label.shape[1] == new, "a role labels every token of the forward", role=name, label=label, new=new
        )
        if old is not None and old.shape[0] == 1:  # one row stands for all that were made of it
            old = old.expand(label.shape[0], -1)
        # what was fed before the role was known
        before = label.new_zeros(label.shape[0], layer.seen - new - labelled_before)
        layer.labels[name] = torch.cat([x for x in (old, before, label) if x is not None], 1)
    return layer.labels
