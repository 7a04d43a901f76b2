"""A mechanism instead of a model's attention: what it refuses, how a layer runs it, and its state in the cache.

While it is attached alone each layer calls the page's function and its cache layer holds the state that came back,
nothing else: for linear attention that is the same number of bytes at any length. A mechanism whose state stores keys
can also act on the keys of the ledger, beside a cache policy, masks, edits and observers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from regard.attaching.actors import Actor, AttentionCall, refuse_encoder_decoder
from regard.attaching.converted import Converted
from regard.attaching.ledger import LedgerLayer
from regard.attaching.state_layer import StateLayer
from regard.attaching.views import is_causal
from regard.core import Method, NeverFired, Unsupported
from regard.core.trees import tree_map
from regard.kinds.mechanism import Mechanism, run, stores_keys
from regard.ops import View

REFUSED = {"softcap": "a softcap", "s_aux": "attention sinks", "position_bias": "a learned position bias"}


class Replacement(Actor, ABC):
    """What runs instead of a model's attention while it is attached."""

    needs_cache = True
    needs_input = True
    changed_weights: Mapping[str, Tensor] = {}  # by the name of a parameter: what replaces it
    layer: type[LedgerLayer]  # what cache layers become

    def __init__(self) -> None:
        self.acted = 0

    @abstractmethod
    def compute(self, call: AttentionCall) -> Tensor:
        """[B, H, N, E]: the attention of one call."""

    def check(self, model: PreTrainedModel) -> None:
        refuse_encoder_decoder(self.name, model)

    def check_fired(self, forwards: int) -> None:
        if self.acted == 0:
            raise NeverFired(f"{self.name} was never asked in {forwards} forwards")

    def check_call(self, call: AttentionCall) -> None:
        refuse(self.name, call)
        if call.k.shape[2] != call.q.shape[2] and isinstance(call.layer, StateLayer | None):
            raise Unsupported(
                f"{self.name} at {call.where}: {call.q.shape[2]} queries on {call.k.shape[2]} keys"
            )

    def acts_on(self, call: AttentionCall) -> bool:
        return True

    def replace(self, call: AttentionCall) -> Tensor | None:
        self.acted += 1
        return self.compute(call)

    def cache_layer(self, old: DynamicLayer) -> LedgerLayer | None:
        if old.is_initialized and old.get_seq_length():
            raise Unsupported(
                f"{self.name} cannot go on with a cache that the model's own attention filled; start a new text"
            )
        return self.layer()


def refuse(what: str, call: AttentionCall) -> None:
    """Raise, by the name of the module, for what a mechanism cannot take over."""
    options, where = call.options, f"{what} at {call.where}"
    for name, feature in REFUSED.items():
        if options.get(name) is not None:
            raise Unsupported(f"{where}: this model's attention has {feature}, which would be left out")
    if has_own_mask(call):
        raise Unsupported(
            f"{where}: its mask is not plain causal (a sliding window, chunks, packed texts, images)"
        )
    if call.own_mask:
        raise Unsupported(f"{where}: a 4-D mask of your own; give a 2-D attention_mask")
    if not is_causal(call, unless_said=True):
        raise Unsupported(f"{where}: attention that is not causal")
    if options.get("output_attentions"):
        raise Unsupported(f"{where}: output_attentions, as no weights are built")
    if options.get("dropout") and call.module.training:
        raise Unsupported(f"{where}: attention dropout; call model.eval()")
    reads_state = call.turn.nth > 0 and isinstance(call.layer, StateLayer)
    if reads_state or (call.layer is None and call.step.caching):
        raise Unsupported(f"{where}: it reads the keys that another layer stored")


def without(call: AttentionCall, name: str) -> AttentionCall:
    """The call as if the model's attention had not this feature."""
    return replace(call, options={**call.options, name: None})


def has_own_mask(call: AttentionCall) -> bool:
    """Whether this layer's mask is not plain causal: a sliding window, chunks, packed texts, images."""
    rule = call.rule
    return call.options.get("sliding_window") is not None or (rule is not None and not rule.model_causal)


class MechanismReplacement(Replacement):
    """A mechanism at work, alone: its state is the cache."""

    layer = StateLayer
    keeps_state = True

    def __init__(self, converted: Converted) -> None:
        super().__init__()
        self.converted, self.changed_weights = converted, converted.weights
        self.method, self.name = converted.method, converted.method.name
        page = self.method.page
        if "causal_self" not in page.patterns:
            raise Unsupported(f"{self.name} has no causal form, which a language model needs")
        if page.roles:
            raise Unsupported(
                f"{self.name} reads the roles {page.roles} of tokens, which a model does not give"
            )

    def check(self, model: PreTrainedModel) -> None:
        super().check(model)
        if not self.converted.params and has_params(self.method, sizes(model)):
            raise Unsupported(
                f"{self.name} has learned parts and none were given: "
                "convert first, and attach what regard.train.convert.convert(model, tokenizer, "
                f"{self.name!r}) gives"
            )
        self.stores = stores_keys(self.method.page, self.method.config)

    def compute(self, call: AttentionCall) -> Tensor:
        layer = state_layer(call)
        out, state = run_mechanism(
            self.method, call, call.k, call.v, mask=call.token_mask(self.stores), params=self.params_of(call),
            state=None if layer is None else layer.state,
        )  # fmt: skip
        if layer is not None:
            layer.state = tree_map(compact, state)
        return out

    def params_of(self, call: AttentionCall) -> dict[str, Tensor] | None:
        if not self.converted.params:
            return None
        if call.name not in self.converted.params:
            raise Unsupported(f"{self.name} was not converted for {call.name}")
        return {n: p.to(call.q.device) for n, p in self.converted.params[call.name].items()}


class MechanismOnKeys(MechanismReplacement):
    """A mechanism that acts on the keys of the ledger, beside other actors; `prefill` alone where a policy decodes."""

    layer = LedgerLayer
    keeps_state = False

    def __init__(self, converted: Converted, prefill: bool) -> None:
        super().__init__(converted)
        self.prefill = prefill

    def cache_layer(self, old: DynamicLayer) -> LedgerLayer | None:
        return None

    def acts_on(self, call: AttentionCall) -> bool:
        return call.phase == "prefill" or not self.prefill

    def check_call(self, call: AttentionCall) -> None:
        refuse(self.name, call)
        if call.layer is not None and len(call.layer.groups) > 1 and self.acts_on(call):
            raise Unsupported(f"{self.name} at {call.where}: a cache whose heads hold different lengths")

    def replace(self, call: AttentionCall) -> Tensor | None:
        return None

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        if view.bias is not None or view.count is not None:
            raise Unsupported(f"{self.name} at {call.where}: merged slots, whose weights would be left out")
        self.acted += 1
        pattern, mask = pattern_and_mask(call, view)
        return run_mechanism(
            self.method, call, view.k, view.v, pattern=pattern, mask=mask, params=self.params_of(call)
        )[0]

    def weights(self, call: AttentionCall, view: View, rows: slice, heads: list[int] | None) -> Tensor | None:
        raise Unsupported(
            f"{self.name} at {call.where} builds no attention weights: no edit or observer of scores or weights "
            'acts there (z does, and phase="decode" where a cache policy decodes)'
        )


def pattern_and_mask(call: AttentionCall, view: View) -> tuple[str, Tensor | None]:
    """The pattern, and the mask beside it, that say what the queries of a view see."""
    in_order = view is call.view and (call.group is None or call.group.index is None)
    in_order = in_order and call.k.shape[2] == view.seen
    if in_order and call.rule is not None and not call.rule.narrowings:
        return "causal_self", None if view.real is None else view.real[:, :, None]
    return ("causal_self" if in_order else "cross"), view.visible(slice(None))


def run_mechanism(
    method: Method,
    call: AttentionCall,
    k: Tensor,
    v: Tensor,
    *,
    pattern: str = "causal_self",
    mask: Tensor | None = None,
    params: dict[str, Tensor] | None = None,
    state: Any = None,
) -> tuple[Tensor, Any]:
    """(out [B, H, N, E], state) of the page's function for the queries of a call."""
    x = call.x if method.page.reads_x(method.config) else None
    return run(
        method, call.scaled(), k, v, pattern=pattern, mask=mask, initial_state=state, params=params, x=x
    )[:2]


def state_layer(call: AttentionCall) -> StateLayer | None:
    """The cache layer of a mechanism that is attached alone."""
    if call.layer is None or isinstance(call.layer, StateLayer):
        return call.layer
    raise TypeError(f"{call.where}: a {type(call.layer).__name__} holds no state")


def compact(t: Tensor) -> Tensor:
    """The tensor, or a copy where it is a part of a larger one that it would keep in memory."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """The sizes that a page's init asks for, from the model's configuration."""
    config = model.config.get_text_config(decoder=True)
    heads, width = config.num_attention_heads, config.hidden_size
    key = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return {"heads": heads, "kv_heads": kv_heads, "key": key, "value": key, "width": width}


def has_params(method: Method, dims: dict[str, int]) -> bool:
    """Whether the page learns anything at these sizes."""
    page: Mechanism = method.page
    return page.init is not None and bool(page.init(method.config, dims))


def acts_on_keys(method: Method) -> bool:
    """Whether the ledger's keys are all that the mechanism goes on from: its state stores keys, and no inputs."""
    return stores_keys(method.page, method.config) and not method.page.reads_x(method.config)


def state_bytes(model: PreTrainedModel, converted: Converted, tokens: int, bytes_each: int = 4) -> int:
    """Bytes that one row of the batch holds after so many tokens."""
    count = converted.method.page.state_size(converted.method.config, sizes(model), tokens)
    return count * bytes_each * len(converted.params)
