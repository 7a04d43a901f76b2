"""Cache layers of hybrid models: keys, and beside them the states of a recurrence or a convolution.

A layer that is attention and Mamba at once (Falcon-H1, Zamba, Zaya) keeps both in one cache layer. What an attachment
does with the keys leaves the states alone; rows of the batch are chosen and reset in both.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from regard.attaching.ledger import LedgerLayer
from regard.attaching.state_layer import StateLayer

# what a layer with states holds of them, by the names that transformers gives
STATES = (
    "number_of_states",
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
    "record_past",
)


class WithStates:
    """Keys in a ledger or a mechanism's state, and a recurrence's states beside them."""

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        LinearAttentionLayer.reset(self)  # type: ignore[arg-type]

    def crop(self, tokens_to_remove: int) -> None:
        # raises, as it does without an attachment, where the states cannot go back
        LinearAttentionLayer.crop(self, tokens_to_remove)  # type: ignore[arg-type]
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def _rows(self, rows: Tensor) -> None:
        super()._rows(rows)  # type: ignore[misc]
        LinearAttentionLayer.reorder_cache(self, rows)  # type: ignore[arg-type]


class HybridLedgerLayer(WithStates, LedgerLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A ledger layer with states beside its keys."""


class HybridStateLayer(WithStates, StateLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A mechanism's state in the place of keys, with the states of the model's own recurrence beside it."""


HYBRID: dict[type, type[LedgerLayer]] = {LedgerLayer: HybridLedgerLayer, StateLayer: HybridStateLayer}


def beside_states(layer: LedgerLayer, old: Any) -> LedgerLayer:
    """The layer that takes the place of `old`, with the states that old holds, if it is of a kind that holds any."""
    if not has_states(old):
        return layer
    hybrid = HYBRID[type(layer)]()
    vars(hybrid).update(vars(layer))
    vars(hybrid).update({name: getattr(old, name) for name in STATES if hasattr(old, name)})
    hybrid.device, hybrid.dtype = old.device, old.dtype
    return hybrid


def has_states(layer: Any) -> bool:
    """Whether a layer holds the states of a recurrence or a convolution, alone or beside keys."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def holds_no_keys(layer: Any) -> bool:
    """A layer of states alone, or one that stands for a module without a cache or with the keys of another."""
    return (has_states(layer) and not isinstance(layer, CacheLayerMixin)) or isinstance(layer, DummyLayer)
