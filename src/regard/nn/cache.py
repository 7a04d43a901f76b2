"""What a backbone carries from one token to the next: a state for every layer, as a Hugging Face cache."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from regard.core import Unsupported
from regard.core.trees import tree_map
from regard.nn.attention import nbytes, select_rows


class StateCache(Cache):
    """The states of all layers, whatever their mechanisms keep; what `past_key_values` is in these models."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[Any] = []
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states = [select_rows(state, beam_idx) for state in self.states]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = [repeated(state, repeats) for state in self.states]

    def crop(self, max_length: int) -> None:
        raise Unsupported("a state of fixed size cannot forget its last tokens: no assisted generation here")

    def nbytes(self) -> int:
        return nbytes(tuple(self.states))


def repeated(state: Any, repeats: int) -> Any:
    return tree_map(lambda t: t.repeat_interleave(repeats, dim=0), state)
