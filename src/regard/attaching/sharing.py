"""Keys that several layers read: who stores them, and who reads them after it.

In Gemma 3n and Gemma 4 the last layers have no keys: they read those of an earlier layer of their kind. All of them see
the same slots under the same mask, and what is stored is stored and counted once. What stays is decided once in a
step, after the last of them has read, by the layer that stored the keys; the readers vote (`View.readers`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor

from regard.attaching.ledger import LedgerLayer


class Turn(NamedTuple):
    """The place of a call among those that read the same keys in one step.

    nth      0 for the layer that stored them, 1, 2, ... for those that read them after it
    of       how many read them
    number   the number of the layer: cache layers are counted first, then the layers that read theirs
    fed      tokens that the step brought: for a reader, transformers may compute the last queries alone; 0: not known
    """

    nth: int = 0
    of: int = 1
    number: int = 0
    fed: int = 0

    @property
    def last(self) -> bool:
        return self.nth == self.of - 1


ALONE = Turn()


def readers_of(config: Any) -> dict[int, tuple[int, ...]]:
    """Layer -> the later layers that read its keys, as a configuration with `kv_sharing_modes` says it.

    >>> from transformers import Gemma4TextConfig
    >>> kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    >>> readers_of(Gemma4TextConfig(num_hidden_layers=5, num_kv_shared_layers=3, layer_types=kinds))
    {0: (2, 4), 1: (3,)}
    """
    modes = getattr(config, "kv_sharing_modes", None) or ()
    kinds = getattr(config, "layer_types", None) or [""] * len(modes)
    owner = {kind: i for i, (kind, mode) in enumerate(zip(kinds, modes, strict=False)) if mode == "store"}
    readers: dict[int, tuple[int, ...]] = {}
    for i, (kind, mode) in enumerate(zip(kinds, modes, strict=False)):
        if mode == "reuse" and kind in owner:
            readers[owner[kind]] = (*readers.get(owner[kind], ()), i)
    return readers


@dataclass
class Loan:
    """The very tensors that a cache layer gave out, how many tokens were new, and how many layers read them since."""

    k: ref
    v: ref
    layer: LedgerLayer
    fed: int
    reads: int = 0


class Lent:
    """What cache layers gave out in this step: a call with the same tensors reads that layer's keys."""

    def __init__(self) -> None:
        self._loans: dict[int, Loan] = {}

    def add(self, q: Tensor, k: Tensor, v: Tensor, layer: LedgerLayer) -> Loan:
        self._loans = {key: x for key, x in self._loans.items() if x.k() is not None and x.layer is not layer}
        self._loans[id(k)] = loan = Loan(ref(k), ref(v), layer, q.shape[2])
        return loan

    def read(self, k: Tensor, v: Tensor) -> Loan | None:
        """The loan of these tensors, if they are lent; one more has read them."""
        loan = self._loans.get(id(k))
        if loan is None or loan.k() is not k or loan.v() is not v:
            return None
        loan.reads += 1
        return loan
