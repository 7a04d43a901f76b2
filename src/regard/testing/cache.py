"""Checks that every cache page must pass; yours too: `check_cache(regard.method("mine", budget=8))`.

The oracle: whatever a policy holds or reads, the model must answer as a full cache does in which exactly the other
tokens are hidden. A policy is run through a script of forwards, what each head could read is written down, and the
script is run again through transformers' own cache with an explicit softmax and transformers' own masks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.ledger import LedgerLayer
from regard.attaching.slots import Group
from regard.core import CachePage, Method, Unsupported
from regard.ops import parse_budget
from regard.testing.zoo import DECODERS, build

FAMILIES = ("llama", "gemma3", "gptoss", "gpt2", "neox")
PADS = (0, 6, 17)  # left padding of three rows: none, some, and a row shorter than most sinks and windows
STEPS = (20, 1, 1, 1, 5, 1, 1, 3, 1)  # tokens of each forward: a prompt, steps, a question, steps, ...
NEAR = 2e-5


@dataclass
class Read:
    """What one layer reads in one forward. Its tables are over true indices, [b, h, seen], b in (1, B), h divides H."""

    alive: Tensor  # bool: this token can be read
    moved: Tensor | None = None  # positions that its key is turned by
    merged: tuple[Tensor, Tensor, Tensor, Tensor] | None = (
        None  # k, v [B, h, e, D], count [B, h, e], index [B, h, e]
    )
    chosen: bool = False  # whether the policy chose what to read, or all that is stored was read


@dataclass
class Tape:
    """A script that was run: what went in, what came out, what each layer read, what was held afterwards."""

    feeds: list[dict]
    outs: list[Tensor] = field(default_factory=list)
    reads: list[dict[int, Read]] = field(default_factory=list)
    held: list[dict[int, Tensor]] = field(default_factory=list)  # bool [B, G, seen]
    stored: list[list[list[int]]] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


def script(steps: Iterable[int] = STEPS, pads: Iterable[int] = PADS, seed: int = 0) -> list[dict]:
    """Inputs of successive forwards on one cache, left-padded, positions counted from each row's first token."""
    g = torch.Generator().manual_seed(seed)
    pads, feeds, mask = torch.tensor(list(pads)), [], None
    for n in steps:
        new = torch.arange(n) >= pads[:, None] if mask is None else torch.ones(len(pads), n, dtype=torch.bool)
        mask = new.long() if mask is None else torch.cat([mask, new.long()], 1)
        tokens = torch.randint(3, 118, (len(pads), n), generator=g).where(new, 0)
        place = (mask.cumsum(-1) - 1).clamp(min=0)[:, -n:]
        feeds.append(dict(input_ids=tokens, attention_mask=mask, position_ids=place))
    return feeds


def alone(feeds: list[dict], row: int) -> list[dict]:
    """The same script for one row without its padding."""
    pad = int((feeds[0]["attention_mask"][row] == 0).sum())
    own = [{name: x[row : row + 1] for name, x in feed.items()} for feed in feeds]
    for feed in own:
        feed["attention_mask"] = feed["attention_mask"][:, pad:]
    own[0] = {name: x[:, -feeds[0]["input_ids"].shape[1] + pad :] for name, x in own[0].items()}
    return own


def real(feeds: list[dict], step: int) -> Tensor:
    """[B, n] bool: the tokens of this forward that are not padding."""
    return feeds[step]["attention_mask"][:, -feeds[step]["input_ids"].shape[1] :].bool()


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
    found = torch.zeros(batch, heads, layer.seen + 1, dtype=torch.bool)
    for group in layer.groups:
        index, token = tokens(group, batch)
        where = index.masked_fill(~token, layer.seen)
        found[:, list(group.heads)] = found[:, list(group.heads)].scatter(-1, where, True)
    return found[..., :-1]


def merged(layer: LedgerLayer, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Merged slots of a layer, all heads, those that have none with count 0."""
    if all(group.count is None for group in layer.groups):
        return None
    heads = sum(len(group.heads) for group in layer.groups)
    most = max(group.n for group in layer.groups)
    first = layer.groups[0]
    k, v = (x.new_zeros(batch, heads, most, x.shape[-1]) for x in (first.keys, first.values))
    count, index = torch.zeros(batch, heads, most), torch.zeros(batch, heads, most, dtype=torch.long)
    for group in (group for group in layer.groups if group.count is not None):
        own, n, (place, token) = list(group.heads), group.n, tokens(group, batch)
        k[:, own, :n], v[:, own, :n], index[:, own, :n] = group.k(), group.v(), place.clamp(min=0)
        count[:, own, :n] = group.count[..., :n].masked_fill(token | (place < 0), 0)
    return k, v, count, index


def scattered(slots: Tensor, index: Tensor, seen: int, value: Tensor) -> Tensor:
    """[b, h, seen] with `value` at the true indices of slots [b, h, m] (-1: none)."""
    lead = [max(slots.shape[i], index.shape[i]) for i in (0, 1)]
    share = lead[1] // index.shape[1]
    places = (
        index.repeat_interleave(share, 1).expand(*lead, -1).gather(-1, slots.clamp(min=0).expand(*lead, -1))
    )
    places = places.masked_fill(slots.expand(*lead, -1) < 0, seen).masked_fill(places < 0, seen)
    found = value.new_zeros(*lead, seen + 1)
    return found.scatter(-1, places, value.expand_as(places))[..., :seen]


def watched(method: Method, now: dict[int, Read]) -> Method:
    """The method with its `select` and `place` watched: what they answer goes into `now` under the layer's number."""
    page = method.page

    def select(view, cfg):
        slots = page.select(view, cfg)
        if slots is not None:
            assert slots.shape[-1] == 0 or int(slots.max()) < view.stored, (
                f"{method.label} selects slots that are not there"
            )
            alive = scattered(slots, view.index, view.seen, torch.ones((), dtype=torch.bool))
            now[view.layer] = Read(alive, chosen=True)
        return slots

    def place(view, slots, cfg):
        by = page.place(view, slots, cfg)
        if by is not None:
            at = torch.arange(by.shape[-1]).expand(1, 1, -1) if slots is None else slots
            lead = [max(a, b) for a, b in zip(at.shape[:2], by.shape[:2])]
            moved = scattered(at.expand(*lead, -1), view.index, view.seen, by.expand(*lead, -1).long())
            now.setdefault(view.layer, Read(None)).moved = moved
        return by

    watch = {name: f for name, f in (("select", select), ("place", place)) if getattr(page, name) is not None}
    return replace(method, page=replace(page, **watch))


def play(
    model: Any,
    method: Method | None,
    feeds: list[dict],
    others: Iterable = (),
    cache: Cache | None = None,
    **settings: Any,
) -> Tape:
    """Run the script under the method, with others beside it, and write down what every layer reads and holds."""
    tape, now = Tape(feeds), {}
    cache = cache or Cache(layer_class_to_replicate=DynamicLayer)
    methods = [*([] if method is None else [watched(method, now)]), *others]
    with attach(model, methods, **settings) as attached, torch.no_grad():
        for feed in feeds:
            now.clear()
            batch, n = feed["input_ids"].shape
            before = {i: (held(x, batch), merged(x, batch)) for i, x in ledgers(attached).items() if x.groups}
            tape.outs.append(model(**feed, past_key_values=cache).logits)
            tape.reads.append(settle(before, now, ledgers(attached), n))
            tape.held.append({i: held(x, batch) for i, x in ledgers(attached).items()})
            tape.stored.append(attached.stored())
            tape.bytes.append(attached.bytes_held())
    return tape


def settle(before: dict, now: dict[int, Read], layers: dict[int, LedgerLayer], n: int) -> dict[int, Read]:
    """By layer index of the model: what was stored before and came in, less what the policy did not select."""
    found = {}
    for number, i in enumerate(layers):
        old, extra = before.get(i, (None, None))
        new = torch.ones(1, 1, n, dtype=torch.bool)
        stored = new if old is None else torch.cat([old, new.expand(*old.shape[:2], n)], -1)
        asked = now.get(number, Read(None))
        alive = stored if asked.alive is None else asked.alive
        found[i] = Read(alive, asked.moved, None if asked.chosen else extra, asked.chosen)
    return found


# -- the oracle: transformers' own full cache, explicit softmax, hidden tokens


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, h, ...] -> [B, heads, ...] by writing every head out."""
    return torch.stack([x[:, i * x.shape[1] // heads] for i in range(heads)], 1)


def angles(model: Any, layer: int) -> Tensor | None:
    """Angles per position of the rotated pairs, from the configuration alone; None: no plain rotary positions."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_theta" not in rope:
        rope = rope[config.layer_types[layer]]
    if (
        not rope
        or rope["rope_type"] != "default"
        or "mrope_section" in rope
        or hasattr(config, "kv_lora_rank")
    ):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    return torch.tensor([rope["rope_theta"] ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)


def turned(k: Tensor, by: Tensor, angle: Tensor) -> Tensor:
    """Keys [B, H, n, D] rotated by `by` [b, h, n] positions: pair i is (x_i, x_{i + pairs}), turned in the plane."""
    pairs = len(angle)
    plane = torch.complex(k[..., :pairs].double(), k[..., pairs : 2 * pairs].double())
    plane = plane * torch.polar(torch.ones((), dtype=torch.float64), by[..., None].double() * angle)
    return torch.cat([plane.real.to(k), plane.imag.to(k), k[..., 2 * pairs :]], -1)


Change = Callable[[int, str, Tensor, Tensor], Tensor]  # (layer, scores, weights or z; x; seen) -> x


def oracle_function(model: Any, now: dict[int, Read], change: Change | None = None) -> Callable:
    change = change or (lambda layer, quantity, x, seen: x)

    def oracle(module, query, key, value, attention_mask=None, *args, scaling=None, **kwargs):
        heads, layer = query.shape[1], module.layer_idx
        read = now.get(layer)
        k, v = by_head(key, heads), by_head(value, heads)
        seen = attention_mask.expand(-1, heads, -1, -1)
        if read is not None:
            seen = seen & by_head(read.alive, heads)[:, :, None]
            if read.moved is not None:
                k = turned(k, by_head(read.moved, heads), angles(model, layer))
        s = torch.einsum("bhnd,bhmd->bhnm", query.float(), k.float()) * scaling
        if kwargs.get("softcap") is not None:
            s = kwargs["softcap"] * torch.tanh(s / kwargs["softcap"])
        s = change(layer, "scores", s, seen).masked_fill(~seen, -math.inf)
        if read is not None and read.merged is not None:
            mk, mv, count, index = (by_head(x, heads) for x in read.merged)
            more = (
                torch.einsum("bhnd,bhmd->bhnm", query.float(), mk.float()) * scaling + count.log()[:, :, None]
            )
            open_ = attention_mask.expand(-1, heads, -1, -1).gather(-1, index[:, :, None].expand_as(more))
            s, v = torch.cat([s, more.masked_fill(~open_, -math.inf)], -1), torch.cat([v, mv], 2)
        top = s.amax(-1, keepdim=True)
        if kwargs.get("s_aux") is not None:
            sink = kwargs["s_aux"].float().view(1, -1, 1, 1)
            top = torch.maximum(top, sink)
        top = top.nan_to_num(neginf=0.0)
        e = (s - top).exp()
        total = e.sum(-1, keepdim=True)
        if kwargs.get("s_aux") is not None:
            total = total + (sink - top).exp()
        w = change(layer, "weights", e / total.clamp(min=1e-30), seen)
        z = change(layer, "z", torch.einsum("bhnm,bhme->bhne", w, v.float()), seen)
        return z.to(query.dtype).transpose(1, 2).contiguous(), w

    return oracle


@contextmanager
def explicit_attention(model: Any, now: dict[int, Read], change: Change | None = None) -> Iterator[None]:
    """The model computes attention by `oracle_function` and reads, in layer i, only what now[i] says."""
    config = model.config.get_text_config()
    name, old = f"oracle/{id(now)}", config._attn_implementation_internal
    whole = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    AttentionInterface.register(name, oracle_function(model, now, change))
    AttentionMaskInterface.register(name, lambda *a, **k: sdpa_mask(*a, **{**k, **whole}))
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = old
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def hide(
    model: Any,
    feeds: list[dict],
    reads: list[dict[int, Read]] | None = None,
    change: Change | None = None,
    cache: Cache | None = None,
) -> list[Tensor]:
    """Logits of the script on a full cache in which everything but `reads` is hidden; None: nothing is.

    `change` is handed scores, weights and head outputs of every layer and gives what goes on.
    """
    now: dict[int, Read] = {}
    cache, outs = cache or Cache(layer_class_to_replicate=DynamicLayer), []
    with explicit_attention(model, now, change), torch.no_grad():
        for i, feed in enumerate(feeds):
            now.clear()
            now.update(reads[i] if reads is not None else {})
            outs.append(model(**feed, past_key_values=cache).logits)
    return outs


def gap(feeds: list[dict], found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference on tokens that are not padding."""
    return max(
        float((a - b)[real(feeds, i)].abs().max()) for i, (a, b) in enumerate(zip(found, wanted, strict=True))
    )


# -- the checks


def movable(method: Method, model: Any) -> bool:
    """Whether this policy's positions can be computed by hand on this model."""
    return (method.page.place or method.page.attend) is None or angles(model, 0) is not None


def check_oracle(method: Method, family: str) -> float:
    """The policy's logits are those of a full cache with the same tokens hidden. Returns what hiding them changed."""
    model, _ = build(family)
    feeds = script()
    tape = play(model, method, feeds)
    if method.page.attend is not None:  # attention of its own: the page brings its own oracle
        return gap(feeds, tape.outs, hide(model, feeds))
    wrong = gap(feeds, tape.outs, hide(model, feeds, tape.reads))
    assert wrong <= NEAR, (
        f"{method.label} on {family}: {wrong:.1e} away from a full cache with the same tokens hidden"
    )
    return gap(feeds, tape.outs, hide(model, feeds))


def check_neutral(method: Method, family: str) -> None:
    """Neutral settings, and a full budget, give the model's own logits and tokens."""
    model, _ = build(family)
    feeds, names = script(), [f.name for f in fields(method.config)]
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    with torch.no_grad():
        own = [model(**feed, past_key_values=cache).logits for feed in feeds]
    settings = [dict(method.page.card.neutral)] + [{"budget": 1.0}] * ("budget" in names)
    assert settings[0], f"{method.name}: the card names no neutral settings"
    for changes in settings:
        calm = method.with_(**{**({"budget": None} if "budget" in names else {}), **changes})
        wrong = gap(feeds, play(model, calm, feeds).outs, own)
        assert wrong <= NEAR, f"{calm.label} on {family} should change nothing, and changes {wrong:.1e}"
        with attach(model, calm):
            tokens = generate(model, feeds[0]).sequences
        assert torch.equal(tokens, generate(model, feeds[0]).sequences), (
            f"{calm.label} on {family}: other tokens"
        )


def check_rows(method: Method, family: str) -> None:
    """Each row of a left-padded batch gives what it gives alone and unpadded, and holds the same tokens."""
    model, _ = build(family)
    feeds = script()
    batch = play(model, method, feeds)
    for row, pad in enumerate(PADS):
        single = play(model, method, alone(feeds, row))
        for step, (a, b) in enumerate(zip(batch.outs, single.outs)):
            own = real(feeds, step)[row]
            wrong = float((a[row][own] - b[0]).abs().max())
            said = f"{method.label} on {family}: row {row} with {pad} pads, forward {step}"
            for i, there in batch.held[step].items():
                mask = feeds[step]["attention_mask"][row].bool()
                one, other = (there[row] & mask)[:, pad:], single.held[step][i][0]
                assert torch.equal(one, other), f"{said}: layer {i} holds other tokens than the row alone"
            assert wrong <= NEAR, f"{said}: {wrong:.1e} away from the row alone"


def allowed(budget: int | float | str, mask: Tensor, model_bytes: int) -> Tensor:
    """[B] tokens that a budget allows after the tokens that `mask` [B, seen] shows."""
    asked, count = parse_budget(budget), mask.sum(-1)
    if asked.tokens is not None:
        return count.clamp(max=asked.tokens)
    if asked.fraction is not None:
        return torch.tensor([max(1, math.ceil(c * asked.fraction - 1e-9)) for c in count.tolist()])
    return count.clamp(max=asked.bytes // model_bytes)


def check_budget(method: Method, family: str, budget: int | float | str, since: bool = False) -> None:
    """Right after a step no head holds, and in a step none reads, more real tokens than the budget.

    The newest token stays. Heads that keep different lengths are held to the budget on average. `since`: a
    selecting policy reads, beyond its budget, what was generated since the prompt.
    """
    model, _ = build(family)
    method, feeds = (
        method.with_(budget=budget),
        script(pads=(0, 6, 3)),
    )  # no row too short for sinks and a window
    tape = play(model, method, feeds)
    one_token = full_bytes(model, feeds[:1], len(PADS)) // feeds[0]["input_ids"].shape[1]
    evicts = method.page.keep is not None or method.page.score is not None
    run = 0
    for step, feed in enumerate(feeds):
        mask = feed["attention_mask"].bool()
        limit, n = allowed(budget, mask, one_token), feed["input_ids"].shape[1]
        run = run + 1 if n == 1 else 0
        said = f"{method.label} on {family}, forward {step}"
        if evicts and (method.page.phase == "both" or n > 1):
            check_held(tape.held[step], tape.stored[step], mask, limit, said)
        for i, read in tape.reads[step].items():
            if read.chosen and n == 1:
                count, room = (read.alive & mask[:, None]).sum(-1), limit + (run if since else 0)
                assert bool((count <= room[:, None]).all()), (
                    f"{said}: layer {i} reads {count.tolist()}, not {room.tolist()}"
                )


def check_held(
    held: dict[int, Tensor], stored: list[list[int]], mask: Tensor, limit: Tensor, said: str
) -> None:
    counts = {i: (x & mask[:, None]).sum(-1) for i, x in held.items()}  # [B, G]
    ragged = any(len(set(heads)) > 1 for heads in stored) or len({h[0] for h in stored}) > 1
    for i, count in counts.items():
        mean = torch.stack(list(counts.values())).double().mean((0, 2)) if ragged else count.double().amax(-1)
        assert bool((mean <= limit).all()), (
            f"{said}: layer {i} holds {count.tolist()}, the budget is {limit.tolist()}"
        )
        assert bool(held[i][..., -1].all()), f"{said}: layer {i} dropped the newest token"


def full_bytes(model: Any, feeds: list[dict], batch: int) -> int:
    """Bytes of a full cache after the script, counted from the shapes that transformers' own cache holds."""
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    with torch.no_grad():
        for feed in feeds:
            model(**feed, past_key_values=cache)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors)


def check_bytes(method: Method, family: str) -> None:
    """Evicting frees memory: what is held is what the slots need, and room to grow by 20 tokens or a quarter."""
    if method.page.keep is None and method.page.score is None:
        return
    model, _ = build(family)
    feeds = script(steps=(160, 1, 1, 1))
    tape = play(model, method, feeds)
    tables, seen = (
        2.5,
        0,
    )  # index, count, notes and first keys: beside keys of width 8 they weigh more than in life
    one_slot = full_bytes(model, feeds[:1], len(PADS)) / sum(160 * len(layer) for layer in tape.stored[0])
    for feed, layers, found in zip(feeds, tape.stored, tape.bytes):
        seen += feed["input_ids"].shape[1]
        need = sum(slots + max(20, slots // 4) for layer in layers for slots in layer) * one_slot * tables
        said = f"{method.label} on {family} holds {found} bytes for {sum(map(sum, layers))} slots of {seen} tokens"
        assert found <= need, f"{said}, which need {need:.0f}"


def generate(model: Any, feed: dict, **settings: Any) -> Any:
    """Six tokens, greedily; no token ends the text."""
    asked = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True)
    with torch.no_grad():
        inputs = {name: feed[name] for name in ("input_ids", "attention_mask")}
        return model.generate(**inputs, return_dict_in_generate=True, **{**asked, **settings})


def feeds_of(tokens: Tensor, mask: Tensor, steps: Iterable[int]) -> list[dict]:
    """A script that feeds these tokens in steps of these lengths."""
    feeds, at, place = [], 0, (mask.cumsum(-1) - 1).clamp(min=0)
    for n in steps:
        own = slice(at, at + n)
        feeds.append(
            dict(input_ids=tokens[:, own], attention_mask=mask[:, : at + n], position_ids=place[:, own])
        )
        at += n
    return feeds


def grown_mask(feed: dict, n: int) -> Tensor:
    mask = feed["attention_mask"]
    return torch.cat([mask, mask.new_ones(mask.shape[0], n - mask.shape[1])], 1)


def check_turns(method: Method, family: str) -> None:
    """Two generate() calls on one cache give the logits of the same tokens fed by hand."""
    model, _ = build(family)
    feed, cache = script(steps=(20,))[0], Cache(layer_class_to_replicate=DynamicLayer)
    with attach(model, method):
        first = generate(model, feed, past_key_values=cache)
        question = torch.randint(3, 118, (len(PADS), 4), generator=torch.Generator().manual_seed(5))
        asked = torch.cat([first.sequences, question], 1)
        second = generate(
            model, dict(input_ids=asked, attention_mask=grown_mask(feed, 30)), past_key_values=cache
        )
    tokens = second.sequences[:, :-1]
    tape = play(model, method, feeds_of(tokens, grown_mask(feed, 35), (20, 1, 1, 1, 1, 1, 5, 1, 1, 1, 1, 1)))
    wanted = [out[:, -1] for out in tape.outs]
    found = [*first.logits, *second.logits]
    wrong = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    assert wrong <= NEAR, (
        f"{method.label} on {family}: two turns are {wrong:.1e} away from the same tokens by hand"
    )


def check_ways(method: Method, family: str) -> None:
    """Beams, several sequences and a prompt in chunks: what is returned scores as the same tokens fed by hand."""
    model, _ = build(family)
    feed = script(steps=(20,), pads=(0, 6))[0]
    for name, settings in {
        "beams": dict(num_beams=3, num_return_sequences=2, output_scores=True),
        "samples": dict(do_sample=True, num_return_sequences=2),
    }.items():
        torch.manual_seed(0)
        with attach(model, method):
            out = generate(model, feed, **settings)
        mask = grown_mask({"attention_mask": feed["attention_mask"].repeat_interleave(2, 0)}, 26)
        tape = play(model, method, feeds_of(out.sequences[:, :-1], mask[:, :-1], (20, 1, 1, 1, 1, 1)))
        logits = torch.stack([x[:, -1] for x in tape.outs], 1)
        if name == "beams":
            chosen = logits.log_softmax(-1).gather(-1, out.sequences[:, 20:, None])[..., 0]
            wrong = float((chosen.mean(-1) - out.sequences_scores).abs().max())
        else:
            wrong = float((logits - torch.stack(out.logits, 1)).abs().max())
        assert wrong <= NEAR, (
            f"{method.label} on {family}, {name}: {wrong:.1e} away from the same tokens by hand"
        )
    feed = script(steps=(20,), pads=(0, 0))[0]
    with attach(model, method):
        out = generate(model, feed, prefill_chunk_size=8)
    tape = play(
        model, method, feeds_of(out.sequences[:, :-1], grown_mask(feed, 25), (8, 8, 4, 1, 1, 1, 1, 1))
    )
    wrong = float(
        (torch.stack([x[:, -1] for x in tape.outs[2:]], 1) - torch.stack(out.logits, 1)).abs().max()
    )
    assert wrong <= NEAR, (
        f"{method.label} on {family}, a prompt in chunks: {wrong:.1e} away from the same by hand"
    )


def check_bfloat16(method: Method, family: str) -> None:
    """In bfloat16 the policy is as far from its float32 oracle as the model itself is from its own."""
    model, _ = build(family)
    feeds = script()
    exact = hide(model, feeds)
    low = build(family)[0].bfloat16()
    tape = play(low, method, feeds)
    assert all(bool(x.isfinite().all()) for x in tape.outs), (
        f"{method.label} on {family} in bfloat16: not finite"
    )

    def far(found: list[Tensor], wanted: list[Tensor]) -> float:
        return max(
            float((a.float() - b)[real(feeds, i)].norm() / b.norm())
            for i, (a, b) in enumerate(zip(found, wanted))
        )

    if method.page.attend is not None or any(r.merged for step in tape.reads for r in step.values()):
        return  # float32 keys cannot stand beside merged bfloat16 ones
    noise, wrong = far(hide(low, feeds), exact), far(tape.outs, hide(model, feeds, tape.reads))
    assert wrong <= 3 * noise + 0.02, (
        f"{method.label} on {family} in bfloat16: {wrong:.2f} off, the model {noise:.2f}"
    )


def small(page: CachePage, **given: Any) -> Mapping[str, Any]:
    """Settings under which a page acts on twenty tokens: its own first `tries`, or a budget of 8 and small numbers."""
    tries = getattr(page, "tries", ())
    if tries:
        return {**tries[0], **given}
    default = page.config()
    numbers = {
        f.name: 3
        for f in fields(default)
        if type(getattr(default, f.name)) is int and getattr(default, f.name) > 8
    }
    budget = {"budget": 8} if any(f.name == "budget" for f in fields(default)) else {}
    for settings in ({**numbers, **budget, **given}, {**budget, **given}):
        try:
            page.config(**settings)
        except ValueError:
            continue
        return settings
    return given


def check_cache(
    method: str | Method,
    families: Iterable[str] = FAMILIES,
    *,
    since: bool = False,
    budgets: Iterable = (8, 0.4, "bytes"),
) -> dict[str, float]:
    """Every check of a cache page on tiny models of these families; "bytes" is half of the full prompt's.

    Returns how far the policy moved the logits, by family: a policy that moves none was not tested. Raises
    AssertionError with the check, the method and the family.
    """
    method = catalog.method(method, **small(catalog.get(method))) if isinstance(method, str) else method
    families, effect = tuple(families), {}
    for family in families:
        model, _ = build(family)
        if not movable(method, model):
            refused(method, family)
            continue
        effect[family] = check_oracle(method, family)
        check_rows(method, family)
    assert max(effect.values()) > 1e-3, (
        f"{method.label} changed nothing on {families}: settings too large to test it"
    )
    first = next(iter(effect))
    for family in DECODERS:
        check_neutral(method, family)
    if any(f.name == "budget" for f in fields(method.config)):
        for budget in budgets:
            some = full_bytes(build(first)[0], script()[:1], len(PADS)) // 2
            check_budget(method, first, f"{some}B" if budget == "bytes" else budget, since)
    for check in (check_bytes, check_turns, check_ways, check_bfloat16):
        check(method, first)
    return effect


def refused(method: Method, family: str) -> None:
    """A policy that moves keys runs on other rotary positions, or says that it cannot."""
    model, _ = build(family)
    try:
        play(model, method, script())
    except Unsupported as told:
        if method.name not in str(told) and "position" not in str(told):
            raise AssertionError(f"{told} does not say what cannot be moved") from told
