"""The cache in use: ledger layers instead of dynamic ones, and which of them was written last."""

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from regard.attaching.actors import Actor
from regard.attaching.ledger import NO_TARGET, LedgerLayer, as_ledger
from regard.attaching.state_layer import StateLayer
from regard.attaching.step import Step
from regard.core import Unsupported

# settings of generate() under which tokens are proposed that may have to be taken back
PROPOSES = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class Caches:
    """The caches that a model is given while something is attached to it.

    `update` of a ledger layer puts itself on `pending`; the attention function that is called next takes it from there.
    """

    def __init__(self, model: PreTrainedModel, actors: Sequence[Actor]) -> None:
        self.model, self.actors = model, actors
        self.cache: Cache | None = None
        self.layers: list[LedgerLayer] = []
        self.pending: list[LedgerLayer] = []
        self.drafting = False  # whether the model is generating candidates for another, which verifies them
        self._adopted: WeakSet[LedgerLayer] = WeakSet()

    def written(self) -> LedgerLayer | None:
        """The ledger layer that the current attention module has just written, if any."""
        layer = self.pending[-1] if self.pending else None
        self.pending.clear()
        return layer

    def adopt(self, cache: Any, step: Step) -> None:
        """Replace dynamic layers by ledger layers; refuse the kinds an actor cannot work on."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        step.caching = step.caching or isinstance(cache, Cache)
        if not isinstance(cache, Cache) or (cache is self.cache and len(self.layers) == len(ledgers(cache))):
            return
        # by identity: two empty lists are equal
        users = [getattr(layer, "pending", None) for layer in cache.layers]
        if any(user is not None and user is not self.pending for user in users):
            raise Unsupported("this cache is in use by another attachment")
        if cache.layer_class_to_replicate is not None and not cache.layers:
            count = getattr(self.model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(count))
        windows = self._windows(len(cache.layers))
        for i, (layer, window) in enumerate(zip(cache.layers, windows, strict=True)):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                cache.layers[i] = self._as_ledger(layer, window)
            else:
                self._check(layer, window)
        self.cache, self.layers = cache, ledgers(cache)
        for layer in self.layers:
            layer.pending, layer.draft = self.pending, layer.draft or self.drafting
            self._adopted.add(layer)

    def noting_drafts(self, generate: Callable) -> Callable:
        """The model's `generate`, which knows a cache that drafts for another model, and refuses to be drafted for."""

        @functools.wraps(generate)
        def noted(*args: Any, **kwargs: Any) -> Any:
            before, config = self.drafting, kwargs.get("generation_config") or self.model.generation_config
            self.drafting = bool(getattr(config, "is_assistant", False))
            asked = [kwargs.get(name, getattr(config, name, None)) for name in PROPOSES]
            if any(asked) and not self.drafting:
                raise Unsupported(NO_TARGET)
            try:
                return generate(*args, **kwargs)
            finally:
                self.drafting = before

        return noted

    def _windows(self, layers: int) -> list[int | None]:
        """The windows of the model's own cache, which hold a policy to what they reach in full layers too."""
        if not any(actor.evicts for actor in self.actors):
            return [None] * layers
        own = DynamicCache(config=self.model.config.get_text_config(decoder=True)).layers
        windows = [getattr(layer, "sliding_window", None) for layer in own]
        return windows if len(windows) == layers else [None] * layers

    def _as_ledger(self, old: DynamicLayer, window: int | None) -> LedgerLayer:
        for actor in self.actors:
            layer = actor.cache_layer(old)
            if layer is not None:
                return layer
        return as_ledger(old, getattr(old, "sliding_window", window))

    def _check(self, layer: Any, window: int | None) -> None:
        keeps_state = any(actor.keeps_state for actor in self.actors)
        if isinstance(layer, LedgerLayer) and isinstance(layer, StateLayer) != keeps_state:
            raise Unsupported(
                "a cache goes on under the kind of attachment that began it: keys under a cache method, the "
                "state of a mechanism under that mechanism"
            )
        if isinstance(layer, LedgerLayer) and layer.window is None and window is not None:
            layer.slide(window)
        names = [actor.name for actor in self.actors if actor.needs_cache]
        if names and not isinstance(layer, LedgerLayer) and "Linear" not in type(layer).__name__:
            raise Unsupported(f"{names[0]} cannot act on a {type(layer).__name__}; use a dynamic cache")

    def release(self) -> None:
        """Leave nothing behind in caches that outlive the attachment."""
        for layer in self._adopted:
            layer.pending = None


def ledgers(cache: Cache) -> list[LedgerLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LedgerLayer)]
