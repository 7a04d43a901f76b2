"""Slots of a cache layer: heads that store equally many tokens, each slot with the true index of its token.

Buffers have growing room at their end. The tables travel with the slots: `index` (true position in the text, padding
counted, -1 = empty), `count` (tokens a merged slot stands for) and named notes of policies. Tables have size 1 in
place of batch or heads where all agree.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.ops import Kept, gather_rows, slots_of

SLACK = 16  # room for at least so many tokens whenever a buffer grows; beyond, an eighth of its length


def slack(n: int) -> int:
    """Room beyond n slots."""
    return max(SLACK, n // 8)


def grown(x: Tensor, n: int, extra: int, dim: int, limit: int | None = None) -> Tensor:
    """A copy of x's first n entries along dim with room for `extra` more and some slack, which ends at `limit`."""
    room = n + extra + slack(n + extra)
    if limit is not None and n + extra <= limit:
        room = min(room, limit)
    shape = list(x.shape)
    shape[dim] = room
    wide = x.new_empty(shape)
    wide.narrow(dim, 0, n).copy_(x.narrow(dim, 0, n))
    return wide


@dataclass(eq=False)
class Group:
    """Heads of one layer that store equally many slots. Buffers are longer than `n`; only the first n count."""

    heads: tuple[int, ...]
    keys: Tensor  # [B, g, room, D]
    values: Tensor  # [B, g, room, E]
    n: int
    index: Tensor | None = None  # [1|B, 1|g, room] int32; None: slot i holds token start + i
    count: Tensor | None = None  # [B, g, room] float32; None: every slot is one token
    notes: dict[str, Tensor] = field(default_factory=dict)  # [B, g, room] float32
    limit: int | None = None  # the most slots that a policy with a budget in bytes lets it have room for
    start: int = 0  # true index of slot 0 where `index` is None: what lay before is out of the layer's window
    # [B, g, s, D] keys of the first s slots before they were moved to other positions
    origin: Tensor | None = None

    def k(self) -> Tensor:
        return self.keys[:, :, : self.n]

    def v(self) -> Tensor:
        return self.values[:, :, : self.n]

    def kv(self) -> tuple[Tensor, Tensor]:
        return self.k(), self.v()

    def stored_bytes(self) -> int:
        """Bytes of the keys and values, without room to grow and tables."""
        return sum(x.numel() * x.element_size() for x in self.kv())

    def table(self) -> Tensor:
        """[1|B, 1|g, n] int64 true index of every slot."""
        if self.index is None:
            return torch.arange(self.start, self.start + self.n, device=self.keys.device)[None, None]
        return self.index[..., : self.n].long()

    def note(self, name: str) -> Tensor:
        """[B, g, n] float32, zero where a slot is new; written in place by its policy."""
        if name not in self.notes:
            self.notes[name] = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.float32)
        return self.notes[name][..., : self.n]

    def tensors(self) -> dict[str, Tensor]:
        buffers = {name: getattr(self, name) for name in ("keys", "values", "index", "count", "origin")}
        buffers |= {f"note.{name}": t for name, t in self.notes.items()}
        return {name: t for name, t in buffers.items() if t is not None}

    def written(self) -> dict[str, Tensor]:
        """What says all of the slots, without room to grow."""
        whole = self.tensors()
        return {name: t if name == "origin" else t[:, :, : self.n] for name, t in whole.items()}

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of every tensor in its place."""
        for name in ("keys", "values", "index", "count", "origin"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        self.notes = {name: change(note) for name, note in self.notes.items()}

    def append(self, k: Tensor, v: Tensor, start: int) -> None:
        """Store new tokens whose first has true index `start`."""
        new, end = k.shape[2], self.n + k.shape[2]
        if torch.is_grad_enabled() and (k.requires_grad or self.keys.requires_grad):
            self.keys, self.values = torch.cat([self.k(), k], 2), torch.cat([self.v(), v], 2)
        else:
            if end > self.keys.shape[2]:
                wide = [grown(x, self.n, new, 2, self.limit) for x in (self.keys, self.values)]
                self.keys, self.values = wide
            self.keys[:, :, self.n : end] = k
            self.values[:, :, self.n : end] = v
        self._append_tables(new, end, start)
        self.n = end

    def _append_tables(self, new: int, end: int, start: int) -> None:
        if self.index is not None:
            if end > self.index.shape[-1]:
                self.index = grown(self.index, self.n, new, 2, self.limit)
            fresh = torch.arange(start, start + new, device=self.index.device, dtype=torch.int32)
            self.index[..., self.n : end] = fresh
        if self.count is not None:
            self.count = (
                self.count if end <= self.count.shape[-1] else grown(self.count, self.n, new, 2, self.limit)
            )
            self.count[..., self.n : end] = 1
        for name, note in self.notes.items():
            wide = note if end <= note.shape[-1] else grown(note, self.n, new, 2, self.limit)
            wide[..., self.n : end] = 0
            self.notes[name] = wide

    def keep(self, kept: Kept) -> None:
        """Drop every slot that is not in `kept.slots`; free their memory; add what was merged."""
        plain = kept.merged is None and kept.rewritten is None
        if plain and kept.slots.shape[-1] == self.n - 1 and kept.full:
            self._drop_one(kept)
            return
        if not self._keeps_first(kept.slots):
            self.restore()
        self._gather(kept)

    def _gather(self, kept: Kept) -> None:
        """Only `kept.slots` in memory of their own; what looked at the old ones looks at them still."""
        slots = kept.slots
        self.index = self.table().expand(*slots.shape[:2], -1).gather(-1, slots.clamp(min=0)).int()
        self.index.masked_fill_(slots < 0, -1)
        self.keys, self.values = gather_rows(self.k(), slots), gather_rows(self.v(), slots)
        tables = {**self.notes} if self.count is None else {**self.notes, "": self.count}
        chosen = slots.clamp(min=0).expand(*self.keys.shape[:2], -1)
        tables = {name: t[..., : self.n].gather(-1, chosen) for name, t in tables.items()}
        self.count = tables.pop("", None)
        self.notes = tables
        self.n = slots.shape[-1]
        if kept.rewritten is not None:
            self.keys, self.values = (x.to(self.keys.dtype).contiguous() for x in kept.rewritten)
        if kept.merged is not None:
            self._merge(*kept.merged)

    def forget(self, before: int, viewed: bool = False) -> bool:
        """Drop the tokens whose true index is below `before`, which no query will see again; whether any was there.

        viewed: a view of the slots is still read, so nothing may be written over
        """
        if self.index is None:
            gone = min(max(before - self.start, 0), self.n)
            self._drop_first(gone)
            return gone > 0
        table = self.table()
        out = (table >= 0) & (table < before)
        dropped = before > 0 and bool(out.any())
        if dropped and viewed:
            self.restore()
            self._gather(Kept(slots_of((table >= 0) & ~out)))
        elif dropped:
            self.keep(Kept(slots_of((table >= 0) & ~out)))
        return dropped

    def _drop_first(self, gone: int) -> None:
        """Few slots go by a step forward in their buffers, which the next growth frees; many by a copy of the rest."""
        if gone == 0:
            return
        self.restore()
        self.start, self.n = self.start + gone, self.n - gone
        rest = lambda t: grown(t[:, :, gone:], self.n, 0, 2) if gone > SLACK else t[:, :, gone:]  # noqa: E731
        self.keys, self.values = rest(self.keys), rest(self.values)
        self.count = None if self.count is None else rest(self.count)
        self.notes = {name: rest(note) for name, note in self.notes.items()}

    def newest(self, n: int) -> "Group":
        """The last n slots, of a group that holds more because its past is recorded; the same memory."""
        if n == self.n:
            return self
        first, last = self.n - n, slice(self.n - n, self.n)
        notes = {name: t[..., last] for name, t in self.notes.items()}
        index = None if self.index is None else self.index[..., last]
        count = None if self.count is None else self.count[..., last]
        keys, values = self.keys[:, :, last], self.values[:, :, last]
        return Group(self.heads, keys, values, n, index, count, notes, self.limit, self.start + first)

    def take_back(self, seen: int) -> None:
        """Drop the tokens from true index `seen` on."""
        if self.index is None:
            self.restore()
            self.n = max(0, seen - self.start)
            return
        table = self.table()
        self.keep(Kept(slots_of((table >= 0) & (table < seen))))

    def _keeps_first(self, slots: Tensor) -> bool:
        """Whether the slots at the beginning whose keys were rotated all stay where they are, if there are any."""
        if self.origin is None:
            return True
        s = self.origin.shape[2]
        return slots.shape[-1] >= s and bool((slots[..., :s] == torch.arange(s, device=slots.device)).all())

    def restore(self) -> None:
        """Move the first keys back to where they were in the text."""
        if self.origin is not None:
            self.keys[:, :, : self.origin.shape[2]] = self.origin
            self.origin = None

    def _drop_one(self, kept: Kept) -> None:
        """One slot goes: the last one moves into it. What a window does at every step, without copying it all."""
        last, holes = self.n - 1, kept.holes
        first = 0 if self.origin is None else self.origin.shape[2]
        if first and bool((holes < first).any()):
            self.restore()
        if self.index is None:
            self.index = self.table().int()
        tables = self.notes.values() if self.count is None else (*self.notes.values(), self.count)
        if kept.hole is not None:
            for t in (self.keys, self.values, self.index, *tables):
                t[:, :, kept.hole] = t[:, :, last]
        else:
            self.index = self.index.expand(*self.keys.shape[:2], -1).contiguous()
            place = holes.expand(self.keys.shape[:2])[..., None]
            for t in (self.index, *tables):
                t.scatter_(2, place, t[:, :, last:][..., :1])
            for t in (self.keys, self.values):
                t.scatter_(2, place[..., None].expand(-1, -1, -1, t.shape[-1]), t[:, :, last : last + 1])
        self.n = last

    def _merge(self, k: Tensor, v: Tensor, count: Tensor) -> None:
        if self.count is None:
            self.count = self.keys.new_ones(self.keys.shape[:3], dtype=torch.float32)
        start, wide = self.n, (*self.keys.shape[:2], -1)
        held = self.table()
        self.index = held.int().expand(*wide).contiguous()
        # a merged slot takes the index of the first token held, which no padding hides
        first = torch.where(held >= 0, held, held.amax() + 1).amin(-1, keepdim=True)
        self.append(k.to(self.keys.dtype), v.to(self.values.dtype), 0)
        self.index[..., start : self.n] = torch.where(count > 0, first, -1).int()
        self.count[..., start : self.n] = count

    def split(self, lengths: list[int], kept: Kept) -> list["Group"]:
        """One group for each different length, holding the heads that keep so many."""
        parts = []
        self.restore()
        for length in sorted(set(lengths)):
            chosen = [i for i, n in enumerate(lengths) if n == length]
            heads = tuple(self.heads[i] for i in chosen)
            part = Group(heads, self.keys[:, chosen], self.values[:, chosen], self.n)
            part.start, part.limit = self.start, self.limit
            part.index = None if self.index is None else self.index.expand(-1, len(lengths), -1)[:, chosen]
            part.count = None if self.count is None else self.count[:, chosen]
            part.notes = {name: t[:, chosen] for name, t in self.notes.items()}
            merged = None if kept.merged is None else tuple(t[:, chosen] for t in kept.merged)
            if merged is not None and not bool((merged[2] > 0).any()):
                merged = None
            written = kept.rewritten and tuple(t[:, chosen, :length] for t in kept.rewritten)
            changed = merged is not None or written is not None
            if length != self.n or changed or bool((kept.slots[:, chosen] < 0).any()):
                part.keep(Kept(kept.slots[:, chosen, :length], merged, written))
            parts.append(part)
        return parts

    def select_rows(self, rows: Tensor) -> None:
        """Reorder or pick rows of the batch."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        if self.index is not None and self.index.shape[0] > 1:
            self.index = self.index.index_select(0, rows)
        self.count = None if self.count is None else self.count.index_select(0, rows)
        self.origin = None if self.origin is None else self.origin.index_select(0, rows)
        self.notes = {name: t.index_select(0, rows) for name, t in self.notes.items()}
