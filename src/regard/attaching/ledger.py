"""The ledger cache: every stored key knows which token of the text it is.

A layer stores keys and values in one or more groups of slots (more than one only after heads were cut to different
lengths). `get_seq_length` is the number of tokens SEEN.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from regard.attaching.rows import follow, select_rows
from regard.attaching.slots import Group, grown
from regard.core import Unsupported, require
from regard.core.trees import tree_map
from regard.ops import Kept

NO_TARGET = (
    "assisted decoding and crop need to take tokens back, and what a cache method evicted because of them would stay "
    "away; generate without an assistant or prompt lookup, or attach the method to the assistant"
)


class Pending(list["LedgerLayer"]):
    """The layers that were written and not yet attended to.

    arriving  (columns [B, n], N): what is about to be written are these of the N tokens of a forward; None: all of them
    """

    arriving: tuple[Tensor, int] | None = None


class LedgerLayer(DynamicLayer):
    """A cache layer whose tokens may be evicted, by row and by head, while the model keeps its true positions.

    window  the keys that a query of a sliding layer sees, its own included; None: all before it. What no query to
            come will see is not held, counted by index in the text, padding included, as the model's own mask counts
    """

    is_croppable = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.slide(window)
        # whether what leaves the window is held until the next crop, which may take it back
        self.record_past = False
        self.seen = 0
        self.groups: list[Group] = []
        self.memory: dict = {}
        self.labels: dict[str, Tensor] = {}  # [B, seen] by role
        self.positions: Tensor | None = (
            None  # [1|B, seen] where the model's rotation puts each token of the text
        )
        # where an attachment looks for the layer that was just written
        self.pending: Pending | None = None
        self.compressed = False  # whether anything was evicted, merged or moved
        # whether another model verifies its tokens: then what was evicted may stay away when some are taken back
        self.draft = False
        self.followers: dict[str, Any] = {}  # caches of passes beside the one that this layer's cache is of
        self.prepared: dict[str, tuple] = {}  # what steering methods found on the prompt, by name
        self.inference = False  # whether it was written last in inference mode
        self.offloads = False  # whether it is offloaded once the attention that reads it is done

    def __getstate__(self) -> dict:
        """A copy, pickled or deep, is in use by no attachment."""
        return {**self.__dict__, "pending": None}

    @property
    def plain(self) -> bool:
        """Nothing was evicted: the slots are the text, or what of it the window reaches."""
        return not self.compressed

    def slide(self, window: int | None) -> None:
        self.window, self.is_sliding = window, window is not None

    def activate_past_recording(self) -> None:
        self.record_past = self.is_sliding

    def forget(self) -> None:
        """Drop what no query to come will see."""
        if self.window is None:
            return
        for group in self.groups:
            group.forget(self.reach(self.seen))

    def attended(self) -> None:
        """The attention of this step is done."""
        if not self.record_past:
            self.forget()
        if self.offloads:
            self.offload()

    def reach(self, seen: int) -> int:
        """The first true index that the query after `seen` tokens sees."""
        return 0 if self.window is None else max(0, seen - self.window + 1)

    @torch._dynamo.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.make_writable()
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
        if self.pending is not None and self.pending.arriving is not None:
            self._renumber(*self.pending.arriving)
        if len(self.groups) == 1:
            group = self.shown(key_states.shape[2])[0]
            key_states, value_states = group.kv()
        if self.pending is not None:
            self.pending.append(self)
        else:
            self.attended()
        return key_states, value_states

    def _renumber(self, columns: Tensor, fed: int) -> None:
        """What was written last are these columns [B, n] of a forward of `fed` tokens; the others are never stored."""
        written = columns.shape[1]
        before = self.seen - written
        for group in self.groups:
            if group.index is None:
                group.index = group.table().expand(len(columns), -1, -1).int().clone()
            elif group.index.shape[0] < len(columns):
                group.index = group.index.expand(len(columns), -1, -1).clone()
            group.index[:, :, group.n - written : group.n] = (before + columns[:, None]).int()
        self.seen, self.compressed = before + fed, True

    def make_writable(self) -> None:
        """Back on its device; and what was born in inference mode, and must not be written outside it, is copied."""
        self.prefetch()
        born, self.inference = self.inference, torch.is_inference_mode_enabled()
        if not born or self.inference:
            return
        own = lambda t: t.clone() if t.is_inference() else t  # noqa: E731
        for group in self.groups:
            group.change(own)
        self.memory, self.labels = tree_map(own, self.memory), tree_map(own, self.labels)

    def offload(self) -> None:
        """Move keys, values and tables to the CPU, as soon as the attention that is about to read them is done."""
        if self.pending is not None and any(layer is self for layer in self.pending):
            self.offloads = True
            return
        self.offloads = False
        for group in self.groups:
            group.change(lambda t: t.to("cpu", non_blocking=True))

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Within the block on its device, if it was offloaded."""
        away = any(group.keys.device != self.device for group in self.groups)
        self.prefetch()
        yield
        if away:
            self.offload()

    def prefetch(self) -> None:
        for group in self.groups:
            if group.keys.device != self.device:
                group.change(lambda t: t.to(self.device, non_blocking=True))

    def shown(self, new: int) -> list[Group]:
        """The groups that a step of so many tokens attends to: of a past that is recorded, what the window reaches."""
        if self.window is None or not self.record_past or self.compressed:
            return list(self.groups)
        return [group.newest(min(group.n, self.window - 1 + new)) for group in self.groups]

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
        if slots.shape[1] > 1 and not kept.full:
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
        first = self.reach(self.seen)
        return self.seen - first + query_length, first

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        self.groups, self.memory, self.labels, self.positions = [], {}, {}, None
        self.seen, self.compressed, self.is_initialized = 0, False, False
        self.followers, self.prepared = {}, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens: an error once something was evicted, but for a draft, which is verified."""
        require(
            tokens_to_remove <= 0,
            "crop takes the negative number of tokens to remove",
            tokens=tokens_to_remove,
        )
        if not self.groups:
            return
        for cache in self.followers.values():
            cache.crop(tokens_to_remove)
        self.make_writable()
        if tokens_to_remove:
            self._take_back(self.seen + tokens_to_remove)
        self.forget()

    def _take_back(self, seen: int) -> None:
        if (self.compressed or self.memory) and not self.draft:
            raise Unsupported(NO_TARGET)
        if self.plain and self.groups[0].start > self.reach(seen):
            self._lacks(seen)
        for group in self.groups:
            group.take_back(seen)
        # what a page remembers may be of tokens that are gone
        self.memory = {}
        self.seen = seen
        self.labels = {name: label[:, :seen] for name, label in self.labels.items()}
        self.positions = None if self.positions is None else self.positions[:, :seen]

    def _lacks(self, seen: int) -> None:
        """The window has dropped tokens that it would reach again."""
        first = self.groups[0].start
        if not self.draft:
            raise Unsupported(
                f"crop to {seen} tokens: this layer sees {self.window} keys and has dropped those before {first}; "
                "call activate_past_recording before tokens that may be taken back"
            )
        self.compressed, self.groups[0].index = True, self.groups[0].table().int()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)
        for cache in self.followers.values():
            cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.groups:
            batch = self.groups[0].keys.shape[0]
            self._rows(torch.arange(batch, device=self.device).repeat_interleave(repeats))
        for cache in self.followers.values():
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.groups:
            batch = self.groups[0].keys.shape[0]
            self._rows(torch.arange(batch, device=self.device)[indices])
        for cache in self.followers.values():
            cache.batch_select_indices(indices)

    def _rows(self, rows: Tensor) -> None:
        rows = rows.to(self.device) if self.groups else rows
        if self.groups:
            self.prepared = follow(self.prepared, rows, self.groups[0].keys.shape[0])
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
        return sum(group.stored_bytes() for group in self.groups)

    def stored(self) -> list[int]:
        """Slots held by each head."""
        slots = {head: group.n for group in self.groups for head in group.heads}
        return [slots[head] for head in sorted(slots)]


def as_ledger(layer: DynamicLayer, window: int | None = None) -> LedgerLayer:
    """A ledger layer with what a dynamic layer holds, and the window of the layer."""
    new = LedgerLayer(window)
    new.record_past = getattr(layer, "record_past", False)
    if layer.is_initialized and layer.keys is not None and layer.keys.numel():
        new._start(layer.keys, layer.values)
        new.seen = layer.get_seq_length()
        new.groups[0].start = new.seen - new.groups[0].n
        new.forget()
    return new
