"""The ledger cache: every stored key knows which token of the text it is.

A layer stores keys and values in one or more groups of slots (more than one only after heads were cut to different
lengths). `get_seq_length` is the number of tokens SEEN.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from regard.attaching.slots import Group, grown
from regard.core import Unsupported, require
from regard.ops import Kept


def select_rows(memory: dict, rows: Tensor) -> dict:
    """A layer's memory for these rows of the batch: its tensors, those of nested dicts too, lead with 1 or B."""
    return {
        name: select_rows(x, rows)
        if isinstance(x, dict)
        else x.index_select(0, rows)
        if isinstance(x, Tensor) and x.dim() and x.shape[0] > 1
        else x
        for name, x in memory.items()
    }


class LedgerLayer(DynamicLayer):
    """A cache layer whose tokens may be evicted, by row and by head, while the model keeps its true positions."""

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.groups: list[Group] = []
        self.memory: dict = {}
        self.labels: dict[str, Tensor] = {}  # [B, seen] by role
        self.positions: Tensor | None = (
            None  # [1|B, seen] where the model's rotation puts each token of the text
        )
        # where an attachment looks for the layer that was just written
        self.pending: list[LedgerLayer] | None = None
        self.compressed = False  # whether anything was evicted, merged or moved

    @property
    def plain(self) -> bool:
        """Nothing was evicted: slot i is token i."""
        return not self.compressed

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.pending is None and self.compressed:
            raise Unsupported(
                "this cache was compressed by an attachment that has ended; attach the method again to go on with it"
            )
        if not self.groups:
            self._start(key_states, value_states)
        else:
            for group in self.groups:
                k, v = key_states, value_states
                if len(self.groups) > 1:
                    k, v = k[:, list(group.heads)], v[:, list(group.heads)]
                group.append(k, v, self.seen)
            self.seen += key_states.shape[2]
        if self.pending is not None:
            self.pending.append(self)
        if len(self.groups) == 1:
            return self.groups[0].k(), self.groups[0].v()
        return key_states, value_states

    def _start(self, k: Tensor, v: Tensor) -> None:
        self.is_initialized, self.dtype, self.device = True, k.dtype, k.device
        n, heads = k.shape[2], tuple(range(k.shape[1]))
        if torch.is_grad_enabled() and k.requires_grad:
            self.groups = [Group(heads, k, v, n)]
        else:
            self.groups = [Group(heads, grown(k, n, 0, 2), grown(v, n, 0, 2), n)]
        self.seen += n

    def keep(self, group: Group, kept: Kept) -> None:
        """Carry out a policy's answer for one group; heads of unequal length part into groups of their own."""
        self.compressed = True
        slots = kept.slots
        if slots.shape[1] > 1:
            lengths = (slots >= 0).sum(-1).amax(0).tolist()
            if len(set(lengths)) > 1:
                at = self.groups.index(group)
                self.groups[at : at + 1] = group.split(lengths, kept)
                return
        group.keep(kept)

    def note_positions(self, new: tuple[Tensor, bool] | None, order: Tensor | None) -> None:
        """Add the positions [1|B, N] of the tokens that were just written; the flag: a token may have several."""
        if new is None:
            return
        at, several = new
        old = at[:, :0] if self.positions is None else self.positions
        missing = self.seen - at.shape[1] - old.shape[1]
        if missing < 0:  # another module of the same layer
            return
        if missing and several:
            raise Unsupported(
                "the positions of tokens that were fed before the method was attached are not known, and a model that "
                "gives a token several does not count them one by one; attach before the text begins"
            )
        # what was fed before: counted back from the newest token
        order = torch.arange(self.seen, device=at.device)[None] if order is None else order
        counted = (at[:, -1:] - order[:, -1:] + order)[:, old.shape[1] : old.shape[1] + missing]
        batch = max(len(old), len(counted), len(at))
        self.positions = torch.cat([x.expand(batch, -1) for x in (old, counted, at)], 1)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return self.groups[0].k() if self.groups else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        require(value is None, "keys of a ledger layer are written by update only", value=value)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.groups[0].v() if self.groups else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        require(value is None, "values of a ledger layer are written by update only", value=value)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.groups, self.memory, self.labels, self.positions = [], {}, {}, None
        self.seen, self.compressed, self.is_initialized = 0, False, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens: possible while nothing was evicted, an error afterwards."""
        if tokens_to_remove == 0 or not self.groups:
            return
        if self.compressed or self.memory:
            raise Unsupported(
                "assisted decoding and crop need to take tokens back, and a policy has already acted on this cache; "
                "generate without an assistant or prompt lookup, or attach no cache method"
            )
        require(
            tokens_to_remove < 0,
            "crop takes the negative number of tokens to remove",
            tokens=tokens_to_remove,
        )
        self.groups[0].n += tokens_to_remove
        self.seen += tokens_to_remove
        self.labels = {name: label[:, : self.seen] for name, label in self.labels.items()}
        self.positions = None if self.positions is None else self.positions[:, : self.seen]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.groups:
            batch = self.groups[0].keys.shape[0]
            self._rows(torch.arange(batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.groups:
            batch = self.groups[0].keys.shape[0]
            self._rows(torch.arange(batch, device=self.device)[indices])

    def _rows(self, rows: Tensor) -> None:
        rows = rows.to(self.device) if self.groups else rows
        for group in self.groups:
            group.select_rows(rows)
        self.memory, self.labels = select_rows(self.memory, rows), select_rows(self.labels, rows)
        self.positions = select_rows({"": self.positions}, rows)[""]

    def bytes_held(self) -> int:
        """Bytes of memory behind this layer, room and tables included, each storage once."""
        storages = {}
        for group in self.groups:
            for t in group.tensors().values():
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return sum(storages.values())

    def bytes_stored(self) -> int:
        """Bytes of the keys and values, without room to grow and tables."""
        return sum(x.numel() * x.element_size() for group in self.groups for x in (group.k(), group.v()))

    def stored(self) -> list[int]:
        """Slots held by each head."""
        slots = {head: group.n for group in self.groups for head in group.heads}
        return [slots[head] for head in sorted(slots)]


def as_ledger(layer: DynamicLayer) -> LedgerLayer:
    """A ledger layer with what a dynamic layer holds."""
    new = LedgerLayer()
    if layer.is_initialized and layer.keys is not None and layer.keys.numel():
        seen = layer.get_seq_length()
        new._start(layer.keys, layer.values)
        if seen != layer.keys.shape[2]:
            group = new.groups[0]
            first = seen - group.n
            group.index = torch.arange(first, seen, device=layer.keys.device, dtype=torch.int32)[None, None]
            new.compressed = True
        new.seen = seen
    return new
