"""A ledger layer beside plain lists: whatever is done to it, in whatever order, it holds what the lists hold.

A token's key is a number of its own, and beside it how far the key was moved; its value is minus that number. A list
holds a slot as (true index, number, tokens it stands for, note).
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers.cache_utils import Cache

from regard.attaching.ledger import LedgerLayer, Pending
from regard.attaching.selecting import rotate_first
from regard.attaching.step import Step, text_labels
from regard.attaching.store import load_cache, save_cache
from regard.core import Unsupported
from regard.ops import Kept, slots_of

HEADS, TURNED = 3, 2


@dataclass
class Row:
    """What one row of the batch holds: slots by head, the labels and positions of its text, what a page remembers."""

    heads: list[list[tuple]] = field(default_factory=lambda: [[] for _ in range(HEADS)])
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    memory: int | None = None

    def only(self, stays) -> None:
        self.heads = [[slot for slot in slots if stays(slot[0])] for slots in self.heads]


class Ledger(RuleBasedStateMachine):
    window: int | None = None
    past = False  # whether what leaves the window is held until the next crop

    @initialize(batch=st.integers(1, 3), draft=st.booleans())
    def begin(self, batch, draft):
        self.draft, self.seen, self.number, self.further = draft, 0, 0, 0
        self.rows = [Row() for _ in range(batch)]
        self.use(LedgerLayer(self.window))
        self.append(9 if self.window else 3, False)

    def use(self, layer):
        self.layer = layer
        layer.pending, layer.draft, layer.record_past = Pending(), self.draft, self.past

    def numbers(self, *shape):
        count = int(torch.tensor(shape).prod())
        self.number += count
        return torch.arange(self.number - count + 1, self.number + 1).view(shape)

    # -- what comes in

    @rule(new=st.integers(1, 4), moved=st.booleans())
    def append(self, new, moved):
        if moved:
            self.turn()
        self.write(self.numbers(len(self.rows), HEADS, new), None, new)

    @rule(data=st.data(), fed=st.integers(2, 4))
    def append_some_of_what_is_fed(self, data, fed):
        written = data.draw(st.integers(1, fed))
        draw = st.permutations(range(fed))
        columns = torch.tensor([sorted(data.draw(draw)[:written]) for _ in self.rows])
        self.write(self.numbers(len(self.rows), HEADS, written), columns, fed)

    def write(self, numbers, columns, fed):
        labels, positions = self.numbers(len(self.rows), fed), self.numbers(len(self.rows), fed)
        self.layer.pending.arriving = None if columns is None else (columns, fed)
        k = torch.stack([numbers, torch.zeros_like(numbers)], -1).float()
        shown = self.layer.update(k, -k[..., :1])
        step = Step(labels={"mark": labels})
        text_labels(self.layer, step, {"mark": lambda ids: ids}, fed)
        self.layer.note_positions((positions, False), None)
        columns = torch.arange(fed).expand(len(self.rows), -1) if columns is None else columns
        for b, row in enumerate(self.rows):
            for h, slots in enumerate(row.heads):
                slots += [
                    (self.seen + int(i), int(x), 1, 0) for i, x in zip(columns[b], numbers[b, h], strict=True)
                ]
            row.labels += labels[b].tolist()
            row.positions += positions[b].tolist()
        self.seen += fed
        if self.layer.plain:
            self.plain_is_shown(shown, fed)
        self.layer.attended()
        if not self.past:
            self.forget()

    def plain_is_shown(self, shown, fed):
        """Where nothing was evicted, attention reads the text in its order, as far back as its first query sees."""
        first = 0 if self.window is None else self.seen - fed - self.window + 1
        for b, row in enumerate(self.rows):
            wanted = [number for index, number, _, _ in row.heads[0] if index >= first]
            assert shown[0][b, 0, :, 0].tolist() == wanted
            assert shown[1][b, 0, :, 0].tolist() == [-number for number in wanted]

    def forget(self):
        if self.window is not None:
            for row in self.rows:
                row.only(lambda index: index >= self.seen - self.window + 1)

    # -- what a policy answers

    @rule(data=st.data(), merges=st.booleans())
    def keep(self, data, merges):
        chance = st.integers(0, 3)
        for group in list(self.layer.groups):
            table = group.table().expand(len(self.rows), len(group.heads), -1)
            dropped = [data.draw(chance) == 0 for _ in range(table.numel())]
            alive = (table >= 0) & (
                ~torch.tensor(dropped).view(table.shape) | (table == table.amax(-1, keepdim=True))
            )
            merged = self.merged(data, len(group.heads)) if merges else None
            for b, row in enumerate(self.rows):
                for i, head in enumerate(group.heads):
                    row.heads[head] = self.kept(b, i, group, table, alive, merged)
            self.layer.keep(group, Kept(slots_of(alive), merged))

    def merged(self, data, heads):
        shape = len(self.rows), heads, data.draw(st.integers(1, 2))
        k = self.numbers(*shape)
        count = [data.draw(st.sampled_from([0, 0, 2, 5])) for _ in range(k.numel())]
        k = torch.stack([k, torch.zeros_like(k)], -1).float()
        return k, -k[..., :1], torch.tensor(count).view(shape).float()

    def kept(self, b, i, group, table, alive, merged):
        slots = [self.held(group, table, b, i, s) for s in range(group.n) if alive[b, i, s]]
        if merged is not None:
            first = min(index for index, *_ in slots)
            both = zip(merged[0][b, i, :, 0].tolist(), merged[2][b, i].tolist(), strict=True)
            slots += [(first, int(number), int(count), 0) for number, count in both if count]
        return slots

    def held(self, group, table, b, i, s):
        number = self.home(group)[b, i, s, 0]
        same = [x for x in self.rows[b].heads[group.heads[i]] if x[:2] == (int(table[b, i, s]), int(number))]
        assert len(same) == 1, "each token is in one slot"
        return same[0]

    def home(self, group):
        if group.origin is None:
            return group.k()
        return torch.cat([group.origin, group.k()[:, :, group.origin.shape[2] :]], 2)

    @rule(data=st.data(), alike=st.booleans(), moved=st.booleans())
    def keep_all_but_one(self, data, alike, moved):
        if moved:
            self.turn()
        for group in list(self.layer.groups):
            table = group.table().expand(len(self.rows), len(group.heads), -1)
            free = table != table.amax(-1, keepdim=True)
            free = free & free.all(0).all(0) if alike else free
            if bool((table < 0).any()) or not bool(free.any(-1).all()):
                continue
            lead = (1, 1) if alike else table.shape[:2]
            holes = [data.draw(st.sampled_from(f.nonzero()[:, 0].tolist())) for f in free.flatten(0, 1)]
            hole = torch.tensor(holes[:1] if alike else holes).view(lead)
            alive = torch.arange(group.n) != hole.expand(table.shape[:2])[..., None]
            for b, row in enumerate(self.rows):
                for i, head in enumerate(group.heads):
                    row.heads[head] = self.kept(b, i, group, table, alive, None)
            self.layer.keep(group, Kept.all_but(hole, group.n))

    @rule()
    def note(self):
        for group in self.layer.groups:
            group.note("mine").copy_(self.home(group)[..., 0] * 2)
        for row in self.rows:
            row.heads = [[(i, x, count, 2 * x) for i, x, count, _ in slots] for slots in row.heads]

    @rule()
    def turn(self):
        """Keys of the first slots are moved, by something else each time; those moved before by their own home."""
        self.further += 1
        for group in self.layer.groups:
            if group.n >= TURNED:
                by = self.home(group)[:, :, :TURNED, 0] % 5 + self.further
                self.carry_out(group, by)

    @rule()
    def turn_back(self):
        for group in self.layer.groups:
            self.carry_out(group, None)
            held = group.table().expand(group.k().shape[:3]) >= 0
            assert group.origin is None and not group.k()[..., 1][held].any()

    def carry_out(self, group, by):
        further = lambda x, by: torch.stack([x[..., 0], x[..., 1] + by], -1)  # noqa: E731
        view = SimpleNamespace(k=group.k(), rotate=further)
        rotate_first(view, by, SimpleNamespace(slots=group, ledger=self.layer))
        if by is not None:
            assert torch.equal(group.keys[:, :, :TURNED, 1], by) and not self.layer.plain

    # -- rows

    @rule(data=st.data())
    def reorder(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=3))
        self.layer.reorder_cache(torch.tensor(rows))
        self.rows = [copy.deepcopy(self.rows[i]) for i in rows]

    @precondition(lambda self: len(self.rows) <= 2)
    @rule(times=st.integers(1, 2))
    def repeat(self, times):
        self.layer.batch_repeat_interleave(times)
        self.rows = [copy.deepcopy(row) for row in self.rows for _ in range(times)]

    @rule(data=st.data())
    def choose(self, data):
        rows = sorted(data.draw(st.sets(st.integers(0, len(self.rows) - 1), min_size=1)))
        self.layer.batch_select_indices(torch.tensor(rows))
        self.rows = [self.rows[i] for i in rows]

    @rule()
    def remember(self):
        ids = self.numbers(len(self.rows))
        self.layer.memory = {"row": ids.clone(), (0, 1): {"row": ids.clone()}, "n": 3}
        for row, x in zip(self.rows, ids.tolist(), strict=True):
            row.memory = x

    # -- a cache is cropped, kept on disk, copied, begun again

    @rule(tokens=st.integers(0, 3))
    def crop(self, tokens):
        seen = self.seen - tokens
        if seen < 1 or not all(any(i < seen for i, *_ in x) for row in self.rows for x in row.heads):
            return
        if tokens and not self.draft and (not self.layer.plain or self.remembers() or self.lacks(seen)):
            try:
                self.layer.crop(-tokens)
            except Unsupported:
                return
            raise AssertionError("tokens are taken back over what was evicted, or dropped")
        self.layer.crop(-tokens)
        self.seen = seen
        for row in self.rows:
            row.only(lambda index: index < seen)
            row.labels, row.positions = row.labels[:seen], row.positions[:seen]
            row.memory = None if tokens else row.memory
        self.forget()

    def remembers(self):
        return self.rows[0].memory is not None

    def lacks(self, seen):
        first = 0 if self.window is None else max(0, seen - self.window + 1)
        return first not in [index for index, *_ in self.rows[0].heads[0]]

    @rule()
    def save_and_load(self):
        with TemporaryDirectory() as folder:
            save_cache(Cache(layers=[self.layer]), Path(folder, "cache"))
            plain = self.layer.plain
            self.use(load_cache(Path(folder, "cache")).layers[0])
            assert self.layer.plain == plain

    @rule()
    def deep_copy(self):
        old, new = self.layer, copy.deepcopy(self.layer)
        self.use(new)
        for group in old.groups:  # what becomes of the one is nothing to the other
            group.change(lambda t: t.fill_(-1))

    @precondition(lambda self: self.seen > 12)
    @rule()
    def begin_again(self):
        self.layer.reset()
        assert self.layer.plain
        self.rows, self.seen = [Row() for _ in self.rows], 0
        self.use(self.layer)
        self.append(2, False)

    # -- they agree

    @invariant()
    def slots_are_those_of_the_lists(self):
        found = {}
        for group in self.layer.groups:
            table, home = group.table().expand(len(self.rows), len(group.heads), -1), self.home(group)
            count = torch.ones(table.shape) if group.count is None else group.count[..., : group.n]
            note = group.note("mine") if "mine" in group.notes else torch.zeros(table.shape)
            assert torch.equal(group.v()[..., 0][table >= 0], -home[..., 0][table >= 0])
            assert not home[..., 1][table >= 0].any(), "what was moved is known as it was"
            parts = [x.tolist() for x in (table, home[..., 0], count, note)]
            for i, head in enumerate(group.heads):
                for b in range(len(self.rows)):
                    slots = zip(*(part[b][i] for part in parts), strict=True)
                    found[b, head] = sorted(tuple(map(int, slot)) for slot in slots if slot[0] >= 0)
        wanted = {(b, h): sorted(x) for b, row in enumerate(self.rows) for h, x in enumerate(row.heads)}
        assert found == wanted
        assert self.layer.stored() == [
            next(group.n for group in self.layer.groups if head in group.heads) for head in range(HEADS)
        ]

    @invariant()
    def what_is_of_the_text_is_that_of_the_lists(self):
        batch, layer = len(self.rows), self.layer
        assert (
            layer.get_seq_length() == self.seen
            and [*layer.labels] == ["mark"]
            and layer.positions is not None
        )
        assert layer.labels["mark"].expand(batch, -1).tolist() == [row.labels for row in self.rows]
        assert layer.positions.expand(batch, -1).tolist() == [row.positions for row in self.rows]
        if self.remembers():
            assert {*layer.memory} == {"row", (0, 1), "n"} and {*layer.memory[0, 1]} == {"row"}
            for memory in (layer.memory, layer.memory[0, 1]):
                assert memory["row"].expand(batch).tolist() == [row.memory for row in self.rows]
            assert layer.memory["n"] == 3
        else:
            assert not layer.memory


class Sliding(Ledger):
    window = 4


class Recorded(Ledger):
    window, past = 4, True


for machine in (Ledger, Sliding, Recorded):
    machine.TestCase.settings = settings(
        max_examples=60, stateful_step_count=20, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
TestLedger, TestSliding, TestRecorded = Ledger.TestCase, Sliding.TestCase, Recorded.TestCase


def test_tokens_are_not_taken_back_from_what_a_page_remembers():
    layer, k = LedgerLayer(), torch.zeros(1, HEADS, 4, 2)
    layer.update(k, k)
    layer.memory = {"row": torch.zeros(1)}
    with pytest.raises(Unsupported, match="take tokens back"):
        layer.crop(-1)
    layer.draft = True
    layer.crop(-1)
    assert layer.seen == 3 and not layer.memory
