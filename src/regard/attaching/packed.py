"""A group of slots whose older tokens are stored packed: by a codec, in less memory than their numbers take.

The first `held` slots are packed, the rest lies in the buffers `keys` and `values` as in any group. Packed slots can go
one by one without a second rounding; whatever is read is unpacked for that one step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.attaching.slots import Group, grown
from regard.core import Unsupported
from regard.ops import Kept, gather_rows, slots_of
from regard.ops.codec import Codec, Parts


@dataclass(eq=False)
class PackedGroup(Group):
    """A Group of which the first `held` slots are in `parts` [B, g, held, ...], with what they share in `shared`."""

    codec: Codec = None  # type: ignore[assignment]
    held: int = 0
    parts: Parts = field(default_factory=dict)
    shared: Parts = field(default_factory=dict)
    chunk: Tensor | None = None  # [B, g, held] int32, once slots are no longer in the order of their chunks

    @classmethod
    def of(cls, group: Group, codec: Codec) -> "PackedGroup":
        """The same slots, none packed yet."""
        if isinstance(group, PackedGroup):
            return group
        return cls(**vars(group), codec=codec)

    def unpacked(self) -> tuple[Tensor, Tensor]:
        return self.codec.unpack(self.parts, self.shared, self.chunk)

    def k(self) -> Tensor:
        return self.kv()[0]

    def v(self) -> Tensor:
        return self.kv()[1]

    def kv(self) -> tuple[Tensor, Tensor]:
        tails = self.keys[:, :, : self.n - self.held], self.values[:, :, : self.n - self.held]
        if not self.held:
            return tails
        k, v = (torch.cat(pair, 2) for pair in zip(self.unpacked(), tails))
        return k, v

    def stored_bytes(self) -> int:
        tail = sum(x[:, :, : self.n - self.held].nbytes for x in (self.keys, self.values))
        return tail + sum(x.nbytes for x in self._packed().values())

    def _packed(self) -> dict[str, Tensor]:
        chunk = {} if self.chunk is None else {"chunk": self.chunk}
        parts = {f"part.{name}": t for name, t in self.parts.items()}
        return parts | {f"shared.{name}": t for name, t in self.shared.items()} | chunk

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self._packed()

    def written(self) -> dict[str, Tensor]:
        tail = {name: getattr(self, name)[:, :, : self.n - self.held] for name in ("keys", "values")}
        return super().written() | self._packed() | tail

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        super().change(change)
        self.parts = {name: change(t) for name, t in self.parts.items()}
        self.shared = {name: change(t) for name, t in self.shared.items()}
        self.chunk = None if self.chunk is None else change(self.chunk)

    def note(self, name: str) -> Tensor:
        if name not in self.notes:
            first = self.keys.new_zeros((*self.keys.shape[:2], self.n), dtype=torch.float32)
            self.notes[name] = grown(first, self.n, 0, 2)
        return self.notes[name][..., : self.n]

    def append(self, k: Tensor, v: Tensor, start: int) -> None:
        new, tail = k.shape[2], self.n - self.held
        if tail + new > self.keys.shape[2]:
            self.keys, self.values = (grown(x, tail, new, 2) for x in (self.keys, self.values))
        self.keys[:, :, tail : tail + new] = k
        self.values[:, :, tail : tail + new] = v
        self._append_tables(new, self.n + new, start)
        self.n += new

    def pack(self, real: Tensor | None, told: Parts) -> bool:
        """Pack the oldest tokens of the buffers beyond the residual, in whole chunks of each row's own tokens.

        real  [1|B, 1|g, n] which slots hold tokens, None: all. Others are dropped. Whether any token was packed.
        told  what the codec's page remembers, [B, g, ...] by name
        """
        codec, tail = self.codec, self.n - self.held
        if real is None:
            most = max(0, (tail - codec.residual) // codec.chunk) * codec.chunk
            if most:
                self._pack_first(most, told)
            return most > 0
        held = real.expand(*self.keys.shape[:2], -1)[..., self.held :]
        count = ((held.sum(-1) - codec.residual) // codec.chunk).clamp(min=0) * codec.chunk
        if not bool(count.any()):
            return False
        old = held & (held.cumsum(-1) <= count[..., None])
        self._order(slots_of(old), slots_of(held & ~old))
        self._pack_first(int(count.max()), told)
        there = self.table() >= 0
        if int(there[..., : self.held].sum(-1).max()) < self.held:  # other rows or heads were packed before
            self._gather(Kept(slots_of(there)))
        return True

    def _pack_first(self, count: int, told: Parts) -> None:
        """Pack the first slots of the buffers; the tables stay as they are."""
        k, v = self.keys[:, :, :count], self.values[:, :, :count]
        parts, shared = self.codec.pack(k, v, self.shared, told)
        self.parts = joined(self.parts, parts)
        if self.chunk is not None:
            # what they share follows what is there
            first = max((t.shape[2] for t in self.shared.values()), default=0)
            fresh = (first + torch.arange(count, device=k.device) // self.codec.chunk).int()
            self.chunk = torch.cat([self.chunk, fresh.expand(*k.shape[:2], -1)], -1)
        self.shared = joined(self.shared, shared)
        self.held += count
        rest = self.n - self.held
        self.keys, self.values = (grown(x[:, :, count:], rest, 0, 2) for x in (self.keys, self.values))

    def _order(self, old: Tensor, rest: Tensor) -> None:
        """The slots of the buffers in another order, packed ones first; -1: none. Tables go with them."""
        places = torch.arange(self.held, device=old.device).expand(*old.shape[:2], -1)
        order = torch.cat([old, rest], -1)
        k, v = (
            gather_rows(self.keys[:, :, : self.n - self.held], order),
            gather_rows(self.values[:, :, : self.n - self.held], order),
        )
        self._tables(torch.cat([places, torch.where(order < 0, -1, order + self.held)], -1))
        self.keys, self.values = k, v

    def _tables(self, slots: Tensor) -> None:
        """Index, counts and notes of these slots [B, g, m]; -1: none."""
        chosen = slots.clamp(min=0)
        self.index = self.table().expand(*slots.shape[:2], -1).gather(-1, chosen).int()
        self.index.masked_fill_(slots < 0, -1)
        take = lambda t: t[..., : self.n].gather(-1, chosen)  # noqa: E731
        self.count = None if self.count is None else take(self.count)
        self.notes = {name: take(t) for name, t in self.notes.items()}
        self.n = slots.shape[-1]

    def keep(self, kept: Kept) -> None:
        self._gather(kept)

    def _gather(self, kept: Kept) -> None:
        if kept.rewritten is not None:
            raise Unsupported("a method that rewrites what it keeps, beside one that stores tokens packed")
        slots = kept.slots.expand(*self.keys.shape[:2], -1)
        packed = (slots >= 0) & (slots < self.held)
        first, rest = slots_among(slots, packed), slots_among(slots, slots >= self.held)
        tail = torch.where(rest < 0, -1, rest - self.held)
        keys, values = (gather_rows(x[:, :, : self.n - self.held], tail) for x in (self.keys, self.values))
        if self.held:
            self._gather_packed(first)
        self._tables(torch.cat([first, rest], -1))
        self.keys, self.values, self.held = keys, values, first.shape[-1]
        if kept.merged is not None:
            self._merge(*kept.merged)

    def _gather_packed(self, slots: Tensor) -> None:
        chosen = slots.clamp(min=0)
        if self.chunk is None:
            at = torch.arange(self.held, device=slots.device, dtype=torch.int32) // self.codec.chunk
            self.chunk = at.expand(*chosen.shape[:2], -1)
        self.chunk = self.chunk.gather(-1, chosen)
        self.parts = {name: rows(t, chosen) for name, t in self.parts.items()}
        self._drop_chunks(slots >= 0)

    def _drop_chunks(self, there: Tensor) -> None:
        """What chunks share goes with their last token; those that stay are numbered anew."""
        count = max((t.shape[2] for t in self.shared.values()), default=0)
        if self.chunk is None or count < 2:
            return
        chunk = self.chunk.long().masked_fill(~there, count)
        used = torch.zeros(*chunk.shape[:2], count + 1, dtype=torch.bool, device=chunk.device)
        used = used.scatter(-1, chunk, True)[..., :count]
        stay = slots_of(used)
        if stay.shape[-1] < count:
            self.shared = {name: rows(t, stay.clamp(min=0)) for name, t in self.shared.items()}
            new = F.pad(used.cumsum(-1) - 1, (0, 1)).gather(-1, chunk)
            self.chunk = new.clamp(0, max(stay.shape[-1] - 1, 0)).int()

    def forget(self, before: int, viewed: bool = False) -> bool:
        table = self.table()
        out = (table >= 0) & (table < before)
        if not bool(out.any()):
            return False
        self._gather(Kept(slots_of((table >= 0) & ~out)))
        return True

    def newest(self, n: int) -> Group:
        if n == self.n:
            return self
        k, v = self.kv()
        plain = Group(self.heads, k, v, self.n, self.index, self.count, self.notes, None, self.start)
        return plain.newest(n)

    def take_back(self, seen: int) -> None:
        table = self.table()
        self._gather(Kept(slots_of((table >= 0) & (table < seen))))

    def split(self, lengths: list[int], kept: Kept) -> list[Group]:
        parts: list[Group] = []
        for length in sorted(set(lengths)):
            chosen = [i for i, n in enumerate(lengths) if n == length]
            part = PackedGroup(
                tuple(self.heads[i] for i in chosen), self.keys[:, chosen], self.values[:, chosen], self.n,
                codec=self.codec, held=self.held, start=self.start,
                parts={name: t[:, chosen] for name, t in self.parts.items()},
                shared={name: t[:, chosen] for name, t in self.shared.items()},
            )  # fmt: skip
            part.chunk = None if self.chunk is None else self.chunk[:, chosen]
            part.index = None if self.index is None else self.index.expand(-1, len(lengths), -1)[:, chosen]
            part.count = None if self.count is None else self.count[:, chosen]
            part.notes = {name: t[:, chosen] for name, t in self.notes.items()}
            merged = None if kept.merged is None else tuple(t[:, chosen] for t in kept.merged)
            part.keep(Kept(kept.slots[:, chosen, :length], merged))
            parts.append(part)
        return parts

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        self.parts = {name: t.index_select(0, rows) for name, t in self.parts.items()}
        self.shared = {name: t.index_select(0, rows) for name, t in self.shared.items()}
        self.chunk = None if self.chunk is None else self.chunk.index_select(0, rows)


def joined(old: Parts, new: Parts) -> Parts:
    """Entries of `new` after those of `old`, by name."""
    fresh = {name: torch.cat([old[name], t], 2) if name in old else t for name, t in new.items()}
    return {**old, **fresh}


def rows(t: Tensor, chosen: Tensor) -> Tensor:
    """Entries [B, g, m, ...] of t [B, g, n, ...] at `chosen` [B, g, m]."""
    flat = t.flatten(3) if t.dim() > 3 else t[..., None]
    return gather_rows(flat, chosen).view(*chosen.shape, *t.shape[3:])


def slots_among(slots: Tensor, marked: Tensor) -> Tensor:
    """Of slots [b, g, m] those that are marked, in order, filled with -1 to the longest."""
    places = slots_of(marked)
    return torch.where(places < 0, -1, slots.gather(-1, places.clamp(min=0)))
