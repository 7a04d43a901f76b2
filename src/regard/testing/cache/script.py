"""Scripts of forwards on one cache, run under a policy: what went in, what each layer read and held."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
)

from regard.attaching.attachment import attach
from regard.attaching.hybrid_layer import has_states, holds_no_keys
from regard.attaching.ledger import LedgerLayer
from regard.attaching.sharing import readers_of
from regard.attaching.slots import Group
from regard.core import Method
from regard.core.deprecation import moved

FAMILIES = ("llama", "gemma3", "gptoss", "gpt2", "neox")
PADS = (0, 6, 17)  # left padding of three rows: none, some, and a row shorter than most sinks and windows
# of the forwards that feed five and three tokens: padding before, after and around a row's tokens
GAPS = {4: ((3, 0), (0, 2), (1, 1)), 7: ((0, 1), (1, 0), (0, 0))}
STEPS = (20, 1, 1, 1, 5, 1, 1, 3, 1)  # tokens of each forward: a prompt, steps, a question, steps, ...
NEAR = 2e-5

__getattr__ = moved(__name__, {"Read": "regard.testing.cache.script:ReadRecord"})


@dataclass
class ReadRecord:
    """What one layer reads in one forward. Its tables are over true indices, [b, h, seen], b in (1, B), h divides H."""

    alive: Tensor | None = None  # bool: this token can be read; None: whatever is stored
    moved: Tensor | None = None  # positions that its key is moved by
    # k, v [B, h, e, D], count [B, h, e], index [B, h, e]
    merged: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    # k, v [B, G, seen, D] in the place of what was written, of tokens of earlier forwards
    stored: tuple[Tensor, Tensor] | None = None
    chosen: bool = False  # whether the policy chose what to read, or all that is stored was read


@dataclass
class Tape:
    """A script that was run: what went in, what came out, what each layer read, what was held afterwards."""

    feeds: list[dict]
    outs: list[Tensor] = field(default_factory=list)
    reads: list[dict[int, ReadRecord]] = field(default_factory=list)
    held: list[dict[int, Tensor]] = field(default_factory=list)  # bool [B, G, seen]
    stored: list[list[list[int]]] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    contents: list[dict[int, tuple[Tensor, Tensor]]] = field(
        default_factory=list
    )  # k, v [B, G, seen, D] as held


def script(
    steps: Iterable[int] = STEPS,
    pads: Iterable[int] = PADS,
    seed: int = 0,
    gaps: Mapping[int, Iterable[tuple[int, int]]] | None = None,
) -> list[dict]:
    """Inputs of successive forwards on one cache, positions counted from each row's first token.

    pads: padding to the left of each row's prompt. gaps: by the number of a forward, the padding (before, after) the
    tokens of each row: what a question of the second turn has in a batch; of forward 0 it takes the place of `pads`.
    """
    g = torch.Generator().manual_seed(seed)
    pads, feeds, mask = torch.tensor(list(pads)), [], None
    for number, n in enumerate(steps):
        each = (gaps or {}).get(number, [(int(pad) if mask is None else 0, 0) for pad in pads])
        new = torch.stack([(torch.arange(n) >= a) & (torch.arange(n) < n - b) for a, b in each])
        mask = new.long() if mask is None else torch.cat([mask, new.long()], 1)
        tokens = torch.randint(3, 118, (len(pads), n), generator=g).where(new, 0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -n:]
        feeds.append(dict(input_ids=tokens, attention_mask=mask, position_ids=positions))
    return feeds


def alone(feeds: list[dict], row: int) -> list[dict]:
    """The same script for one row without its padding; forwards that feed the row nothing but padding are left out."""
    single = []
    for step, feed in enumerate(feeds):
        tokens, mask = real(feeds, step)[row], feed["attention_mask"][row].bool()
        new = {name: feed[name][row : row + 1, tokens] for name in ("input_ids", "position_ids")}
        if bool(tokens.any()):
            single.append({**new, "attention_mask": feed["attention_mask"][row : row + 1, mask]})
    return single


def real(feeds: list[dict], step: int) -> Tensor:
    """[B, n] bool: the tokens of this forward that are not padding."""
    return feeds[step]["attention_mask"][:, -feeds[step]["input_ids"].shape[1] :].bool()


def full_cache(model: Any) -> Cache:
    """A cache of transformers' own that keeps every token, also under a sliding window, and the model's states."""
    names = vars(sys.modules[type(model).__module__])
    own = [
        c
        for n, c in names.items()
        if n.endswith("Cache") and getattr(c, "__module__", "") == type(model).__module__
    ]
    if own:  # a model whose file brings a cache of its own takes no other
        return own[0]()
    kinds = DynamicCache(config=model.config).layers
    if all(isinstance(kind, DynamicLayer) and not has_states(kind) for kind in kinds):
        return Cache(layer_class_to_replicate=DynamicLayer)
    return Cache(layers=[unbounded(kind) for kind in kinds])


def unbounded(kind: Any) -> Any:
    """A layer like this one that keeps every token."""
    if holds_no_keys(kind):
        return kind
    if has_states(kind):
        return LinearAttentionAndFullAttentionLayer(number_of_states=kind.number_of_states)
    return DynamicLayer()


# -- the run under the policy, watched


def ledgers(attached: attach) -> dict[int, LedgerLayer]:
    layers = attached.cache.layers if attached.cache is not None else []
    return {i: layer for i, layer in enumerate(layers) if isinstance(layer, LedgerLayer)}


def tokens(group: Group, batch: int) -> tuple[Tensor, Tensor]:
    """True index [B, g, n] of every slot, and which are tokens: merged ones stand for several or repeat an index."""
    index = group.table().expand(batch, len(group.heads), -1)
    if group.count is None:
        return index, index >= 0
    again = (index[..., None] == index[..., None, :]).tril(-1).any(-1)
    return index, (index >= 0) & (group.count[..., : group.n] == 1) & ~again


def held(layer: LedgerLayer, batch: int) -> Tensor:
    """[B, G, seen] bool: the tokens that a layer holds, read from its ledger. Merged slots are not tokens."""
    heads = sum(len(group.heads) for group in layer.groups)
    result = torch.zeros(batch, heads, layer.seen + 1, dtype=torch.bool)
    for group in layer.groups:
        index, token = tokens(group, batch)
        where = index.masked_fill(~token, layer.seen)
        result[:, list(group.heads)] = result[:, list(group.heads)].scatter(-1, where, True)
    return result[..., :-1]


def contents(layer: LedgerLayer, batch: int) -> tuple[Tensor, Tensor]:
    """k, v [B, G, seen, D] that a layer holds for its tokens, as whoever reads them gets them; zero elsewhere."""
    heads = sum(len(group.heads) for group in layer.groups)
    found = []
    for x in layer.groups[0].kv():
        found.append(x.new_zeros(batch, heads, layer.seen + 1, x.shape[-1]))
    for group in layer.groups:
        index, token = tokens(group, batch)
        where = index.masked_fill(~token, layer.seen)[..., None]
        for all_heads, x in zip(found, group.kv(), strict=True):
            part = all_heads[:, list(group.heads)]
            all_heads[:, list(group.heads)] = part.scatter(2, where.expand(*where.shape[:3], x.shape[-1]), x)
    return found[0][:, :, :-1], found[1][:, :, :-1]


def merged(layer: LedgerLayer, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Merged slots of a layer, all heads, those that have none with count 0."""
    if all(group.count is None for group in layer.groups):
        return None
    heads = sum(len(group.heads) for group in layer.groups)
    most = max(group.n for group in layer.groups)
    first = layer.groups[0]
    k, v = (x.new_zeros(batch, heads, most, x.shape[-1]) for x in (first.keys, first.values))
    count, index = torch.zeros(batch, heads, most), torch.zeros(batch, heads, most, dtype=torch.long)
    for group in layer.groups:
        if group.count is None:
            continue
        at, n, (table, token) = list(group.heads), group.n, tokens(group, batch)
        k[:, at, :n], v[:, at, :n], index[:, at, :n] = group.k(), group.v(), table.clamp(min=0)
        count[:, at, :n] = group.count[..., :n].masked_fill(token | (table < 0), 0)
    return k, v, count, index


def scattered(slots: Tensor, index: Tensor, seen: int, value: Tensor) -> Tensor:
    """[b, h, seen] with `value` at the true indices of slots [b, h, m] (-1: none)."""
    lead = [max(slots.shape[i], index.shape[i]) for i in (0, 1)]
    share = lead[1] // index.shape[1]
    index = index.repeat_interleave(share, 1).expand(*lead, -1)
    positions = index.gather(-1, slots.clamp(min=0).expand(*lead, -1))
    positions = positions.masked_fill(slots.expand(*lead, -1) < 0, seen).masked_fill(positions < 0, seen)
    result = value.new_zeros(*lead, seen + 1)
    return result.scatter(-1, positions, value.expand_as(positions))[..., :seen]


def watched(method: Method, now: dict[int, ReadRecord]) -> Method:
    """The method with its `select` and `shift` watched: what they answer goes into `now` under the layer's number.

    Every layer is asked by itself; that layers may share an answer is a check of its own (check_by_place).
    """
    page = method.page

    def select(view, cfg):
        slots = page.select(view, cfg)
        if slots is not None:
            assert slots.shape[-1] == 0 or int(slots.max()) < view.stored, (
                f"{method.label} selects slots that are not there"
            )
            alive = scattered(slots, view.index, view.seen, torch.ones((), dtype=torch.bool))
            now[view.layer] = ReadRecord(alive, chosen=True)
        return slots

    def shift(view, slots, cfg):
        by = page.shift(view, slots, cfg)
        if by is not None:
            at = torch.arange(by.shape[-1]).expand(1, 1, -1) if slots is None else slots
            lead = [max(a, b) for a, b in zip(at.shape[:2], by.shape[:2])]
            moved = scattered(at.expand(*lead, -1), view.index, view.seen, by.expand(*lead, -1).long())
            now.setdefault(view.layer, ReadRecord()).moved = moved
        return by

    watch = {name: f for name, f in (("select", select), ("shift", shift)) if getattr(page, name) is not None}
    return replace(method, page=replace(page, **watch, by_place=False))


def play(
    model: Any,
    method: Method | None,
    feeds: list[dict],
    others: Iterable = (),
    cache: Cache | None = None,
    **settings: Any,
) -> Tape:
    """Run the script under the method, with others beside it, and record what every layer reads and holds."""
    tape, now = Tape(feeds), {}
    cache = cache or full_cache(model)
    readers = readers_of(model.config.get_text_config(decoder=True))
    methods = [*([] if method is None else [watched(method, now)]), *others]
    with attach(model, methods, **settings) as attached, torch.no_grad():
        for feed in feeds:
            now.clear()
            batch, n = feed["input_ids"].shape
            filled = {i: x for i, x in ledgers(attached).items() if x.groups}
            before = {i: (held(x, batch), merged(x, batch)) for i, x in filled.items()}
            kept = {i: contents(x, batch) for i, x in filled.items()} if rewrites(method) else {}
            tape.outs.append(model(**feed, past_key_values=cache).logits)
            tape.reads.append(settle(before, now, ledgers(attached), n, readers, kept))
            if rewrites(method):
                tape.contents.append({i: contents(x, batch) for i, x in ledgers(attached).items()})
            tape.held.append({i: held(x, batch) for i, x in ledgers(attached).items()})
            tape.stored.append(attached.stored())
            tape.bytes.append(attached.bytes_held())
    return tape


def rewrites(method: Method | None) -> bool:
    """Whether the method stores other numbers than the model wrote."""
    return method is not None and (method.page.codec is not None or method.page.rewrites)


def settle(
    before: dict,
    now: dict[int, ReadRecord],
    layers: dict[int, LedgerLayer],
    n: int,
    readers: Mapping[int, tuple[int, ...]],
    kept: Mapping[int, tuple[Tensor, Tensor]],
) -> dict[int, ReadRecord]:
    """By layer index of the model: what was stored before and came in, less what the policy did not select."""
    owner = {i: i for i in layers}
    owner |= dict(sorted((reader, i) for i in readers for reader in readers[i]))
    reads = {}
    for number, i in enumerate(owner):
        old, extra = before.get(owner[i], (None, None))
        new = torch.ones(1, 1, n, dtype=torch.bool)
        stored = new if old is None else torch.cat([old, new.expand(*old.shape[:2], n)], -1)
        record = now.get(number, ReadRecord())
        alive = stored if record.alive is None else record.alive
        extra = None if record.chosen else extra
        reads[i] = ReadRecord(alive, record.moved, extra, kept.get(owner[i]), record.chosen)
    return reads
