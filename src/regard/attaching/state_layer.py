"""A cache layer that holds the state of a mechanism: for linear attention the same number of bytes at any length."""

from typing import Any

import torch
from torch import Tensor

from regard.attaching.ledger import LedgerLayer
from regard.core import Unsupported
from regard.core.trees import tree_leaves, tree_map


class StateLayer(LedgerLayer):
    """A cache layer that holds the state of a mechanism and no keys. `get_seq_length` is tokens seen."""

    @property
    def state(self) -> Any:
        return self.memory["state"][0] if "state" in self.memory else None

    @state.setter
    def state(self, state: Any) -> None:
        self.memory["state"] = (state,)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.pending is None:
            raise Unsupported(
                "this cache holds a mechanism's state and no keys; attach the mechanism again to go on with it"
            )
        self.make_writable()
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        self.seen += key_states.shape[2]
        self.pending.append(self)
        return key_states, value_states

    @property
    def plain(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.seen:
            raise Unsupported(
                "assisted decoding and crop need to take tokens back, which a state that has summed them cannot; "
                "generate without an assistant or prompt lookup"
            )

    def _rows(self, rows: Tensor) -> None:
        if "state" in self.memory:
            self.state = tree_map(lambda t: t.index_select(0, rows.to(t.device)), self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(torch.arange(self._batch()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(torch.arange(self._batch())[indices.cpu()])

    def _batch(self) -> int:
        return next((t.shape[0] for t in tree_leaves(self.state)), 0)

    def bytes_held(self) -> int:
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(self.state)}
        return sum(held.values())

    def bytes_stored(self) -> int:
        return self.bytes_held()

    def stored(self) -> list[int]:
        return []
