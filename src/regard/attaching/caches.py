"""The cache in use: ledger layers instead of dynamic ones, and which of them was written last."""

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from regard.attaching.actors import Actor
from regard.attaching.hybrid_layer import beside_states, holds_no_keys
from regard.attaching.ledger import NO_TARGET, LedgerLayer, Pending, as_ledger
from regard.attaching.sharing import ALONE, Lent, Turn, readers_of
from regard.attaching.state_layer import StateLayer
from regard.attaching.step import Step
from regard.core import Unsupported
from regard.core.errors import present

# the kinds of layers that a ledger layer can stand for: all that they hold is keys, values and states
KINDS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

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
        self.pending = Pending()
        self.drafting = False  # whether the model is generating candidates for another, which verifies them
        self.readers = readers_of(model.config.get_text_config(decoder=True))
        self.lent = Lent()
        self._adopted: WeakSet[LedgerLayer] = WeakSet()

    def written(self) -> LedgerLayer | None:
        """The ledger layer that the current attention module has just written, if any."""
        layer = self.pending[-1] if self.pending else None
        self.pending.clear()
        return layer

    def layer_of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[LedgerLayer | None, Turn]:
        """The ledger layer whose keys these are, and who else reads them in this step."""
        written = self.written()
        if not self.readers or self.cache is None:
            return written, ALONE if written is None else Turn(number=self.layers.index(written))
        loan = self.lent.read(k, v) if written is None else self.lent.add(q, k, v, written)
        if loan is None:
            return written, ALONE
        number, nth = self.layers.index(loan.layer), loan.reads
        readers = self.readers.get(self.cache.layers.index(loan.layer), ())
        if 0 < nth <= len(readers):
            number = len(self.layers) + sorted(sum(self.readers.values(), ())).index(readers[nth - 1])
        return loan.layer, Turn(nth, 1 + len(readers), number, loan.fed)

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
            fill(cache, DynamicCache(config=self.model.config).layers)
        windows = self._windows(len(cache.layers))
        for i, (layer, window) in enumerate(zip(cache.layers, windows, strict=True)):
            if type(layer) in KINDS:
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
                return beside_states(layer, old)
        return beside_states(as_ledger(old, getattr(old, "sliding_window", window)), old)

    def _check(self, layer: Any, window: int | None) -> None:
        keeps_state = any(actor.keeps_state for actor in self.actors)
        if isinstance(layer, LedgerLayer) and isinstance(layer, StateLayer) != keeps_state:
            raise Unsupported(
                "a cache goes on under the kind of attachment that began it: keys under a cache method, the "
                "state of a mechanism under that mechanism"
            )
        if isinstance(layer, LedgerLayer) and layer.window is None and window is not None:
            layer.slide(window)
            layer.forget()
        names = [actor.name for actor in self.actors if actor.needs_cache]
        if names and not isinstance(layer, LedgerLayer) and not holds_no_keys(layer):
            own = isinstance(layer, DynamicLayer) or layer.__module__ != Cache.__module__
            why = ", which holds more than keys and values" if own else "; use a dynamic cache"
            raise Unsupported(f"{names[0]} cannot act on a {type(layer).__name__}{why}")

    def bytes_read(self) -> int:
        """Bytes of keys and values that a step reads where every layer reads all: once for each that reads them."""
        layers = [] if self.cache is None else self.cache.layers
        return sum(
            layer.bytes_stored() * (1 + len(self.readers.get(i, ())))
            for i, layer in enumerate(layers)
            if isinstance(layer, LedgerLayer)
        )

    def release(self) -> None:
        """Leave nothing behind in caches that outlive the attachment."""
        for layer in self._adopted:
            layer.pending = None


def fill(cache: Cache, kinds: Sequence[Any]) -> None:
    """Make the layers that would come into being one by one, so that all are counted from the first step on.

    `kinds` are the layers that the model's configuration asks for; where they hold no keys, nothing is ever stored.
    """
    make = present(cache.layer_class_to_replicate, "the cache makes its layers one by one")
    cache.layers.extend(DummyLayer() if holds_no_keys(kind) else make() for kind in kinds)
    if hasattr(cache, "set_linear_cache"):
        # MiniMax keeps states in a list beside the layers, and asks for those of every layer that is there
        for i, kind in enumerate(kinds):
            if holds_no_keys(kind):
                cache.set_linear_cache(i, None)


def ledgers(cache: Cache) -> list[LedgerLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LedgerLayer)]
