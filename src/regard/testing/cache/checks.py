"""The checks of a cache page: each on one tiny model of a family."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.core import Method
from regard.ops import parse_budget
from regard.testing.cache.oracle import gap, hide
from regard.testing.cache.own import in_tokens, probed
from regard.testing.cache.script import GAPS, NEAR, PADS, STEPS, Tape, alone, full_cache, play, real, script
from regard.testing.zoo import build


def check_oracle(method: Method, family: str) -> float:
    """The policy's logits are those of a full cache with the same tokens hidden. Returns what hiding them changed.

    An attention of the page's own is held to its reference instead.
    """
    model, _ = build(family)
    feeds, method = script(), in_tokens(method) if method.page.attention is not None else method
    tape = play(model, method, feeds)
    wrong = gap(feeds, tape.outs, wanted_logits(model, method, feeds, tape))
    what = (
        "its reference" if method.page.attention is not None else "a full cache with the same tokens hidden"
    )
    assert wrong <= NEAR, f"{method.label} on {family}: {wrong:.1e} away from {what}"
    return gap(feeds, tape.outs, hidden_nothing(family))


@cache
def hidden_nothing(family: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits of the script on a full cache, by explicit attention: the same for all policies."""
    return hide(build(family)[0].to(dtype), script())


@dataclass(frozen=True)
class Plain:
    """What a model answers by itself to the script: logits of each forward, and the tokens that it goes on with."""

    feeds: list[dict]
    outs: list[Tensor]
    sequences: Tensor


@cache
def plain(family: str) -> Plain:
    """The same for all policies: a model of the family that nothing was attached to."""
    model, _ = build(family)
    feeds, held = script(gaps={} if windowed(model) else GAPS), full_cache(model)
    with torch.no_grad():
        outs = [model(**feed, past_key_values=held).logits for feed in feeds]
    return Plain(feeds, outs, generate(model, feeds[0]).sequences)


def wanted_logits(model: Any, method: Method, feeds: list[dict], tape: Tape) -> list[Tensor]:
    """Logits of the script by the oracle of this policy."""
    if method.page.attention is not None:
        return hide(model, feeds, method=method)
    return hide(model, feeds, tape.reads)


def check_neutral(method: Method, family: str) -> None:
    """Neutral settings, and a full budget, give the model's own logits and tokens."""
    (model, _), own = build(family), plain(family)
    feeds, names = own.feeds, [f.name for f in fields(method.config)]
    settings = [dict(method.page.card.neutral)]
    assert settings[0], f"{method.name}: the card names no neutral settings"
    if "budget" in names and settings[0] != {"budget": 1.0}:
        settings.append({"budget": 1.0})
    for changes in settings:
        neutral = method.with_settings(**{**({"budget": None} if "budget" in names else {}), **changes})
        wrong = gap(feeds, play(model, neutral, feeds).outs, own.outs)
        assert wrong <= NEAR, f"{neutral.label} on {family} should change nothing, and changes {wrong:.1e}"
        with attach(model, neutral):
            tokens = generate(model, feeds[0]).sequences
        assert torch.equal(tokens, own.sequences), f"{neutral.label} on {family}: other tokens"


def windowed(model: Any) -> bool:
    """Whether layers of the model slide a window of their own."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) is not None
    return sliding if kinds is None else any(kind != "full_attention" for kind in kinds)


def check_rows(method: Method, family: str, seed: int = 0, steps: Iterable[int] = STEPS) -> None:
    """Each row of a batch gives what it gives alone and unpadded, and holds the same tokens, wherever padding lies."""
    model, _ = build(family)
    # a window of the model's own counts padding, and so tears rows apart by itself
    feeds = script(steps, seed=seed, gaps={} if windowed(model) else GAPS)
    batch = play(model, method, feeds)
    for row in range(len(PADS)):
        single = play(model, method, alone(feeds, row))
        for step, (a, b) in enumerate(zip(batch.outs, single.outs, strict=True)):
            tokens = real(feeds, step)[row]
            wrong = float((a[row][tokens] - b[0]).abs().max())
            said = f"{method.label} on {family}, seed {seed}: row {row} of a padded batch, forward {step}"
            for i, held in batch.held[step].items():
                mask = feeds[step]["attention_mask"][row].bool()
                one, other = (held[row] & mask)[:, mask], single.held[step][i][0]
                assert torch.equal(one, other), f"{said}: layer {i} holds other tokens than the row alone"
            assert wrong <= NEAR, f"{said}: {wrong:.1e} away from the row alone"


def allowed(budget: int | float | str, mask: Tensor, model_bytes: int) -> Tensor:
    """[B] tokens that a budget allows after the tokens that `mask` [B, seen] shows."""
    parsed, count = parse_budget(budget), mask.sum(-1)
    if parsed.tokens is not None:
        return count.clamp(max=parsed.tokens)
    if parsed.fraction is not None:
        return torch.tensor([max(1, math.ceil(c * parsed.fraction - 1e-9)) for c in count.tolist()])
    assert parsed.bytes is not None
    return count.clamp(max=parsed.bytes // model_bytes)


def check_budget(method: Method, family: str, budget: int | float | str, since: bool = False) -> None:
    """Right after a step no head holds, and in a step none reads, more real tokens than the budget.

    The newest token stays. Heads that keep different lengths are held to the budget on average. `since`: a
    selecting policy reads, beyond its budget, what was generated since the prompt.
    """
    model, _ = build(family)
    method = method.with_settings(budget=budget)
    # no row is too short for sinks and a window
    feeds = script(pads=(0, 6, 3))
    tape = play(model, method, feeds)
    one_token = full_bytes(model, feeds[:1], len(PADS)) // feeds[0]["input_ids"].shape[1]
    evicts = method.page.keep is not None or method.page.score is not None
    run = 0
    for step, feed in enumerate(feeds):
        mask = feed["attention_mask"].bool()
        limit, n = allowed(budget, mask, one_token), feed["input_ids"].shape[1]
        run = run + 1 if n == 1 else 0
        said = f"{method.label} on {family}, forward {step}"
        cuts = method.page.phase == "both" and method.page.due is None
        if evicts and (cuts or n > 1):
            unequal = len({n for heads in tape.stored[step] for n in heads}) > 1 or method.page.across
            check_held(tape.held[step], unequal, mask, limit, said)
            # heads, or layers whose rows differ, hold memory for the longest
            ragged = method.page.across or any(len(set(heads)) > 1 for heads in tape.stored[step])
            whole = parse_budget(budget).bytes
            assert whole is None or ragged or tape.bytes[step] <= whole, (
                f"{said}: {tape.bytes[step]} bytes are held, tables and room to grow included, of {whole}"
            )
        for i, read in tape.reads[step].items():
            if read.chosen and n == 1 and read.alive is not None:
                count, room = (read.alive & mask[:, None]).sum(-1), limit + (run if since else 0)
                assert bool((count <= room[:, None]).all()), (
                    f"{said}: layer {i} reads {count.tolist()}, not {room.tolist()}"
                )


def check_attention_budget(method: Method, family: str, budget: int | float | str) -> None:
    """No head of an attention of the page's own reads more tokens in a step of decoding than the budget."""
    if method.page.attention is None:
        return
    model, _ = build(family)
    feeds, now = script(pads=(0, 6, 3)), {}
    one_token = full_bytes(model, feeds[:1], len(PADS)) // feeds[0]["input_ids"].shape[1]
    cache, acted = full_cache(model), 0
    with attach(model, probed(method.with_settings(budget=budget), now)), torch.no_grad():
        for step, feed in enumerate(feeds):
            now.clear()
            model(**feed, past_key_values=cache)
            limit = allowed(budget, feed["attention_mask"].bool(), one_token)
            for i, read in now.items():
                acted, count = acted + 1, read.sum(-1)  # [B, H]
                assert bool((count <= limit[:, None]).all()), (
                    f"{method.label} on {family}, forward {step}: layer {i} reads {count.tolist()}, the budget is "
                    f"{limit.tolist()}"
                )
    assert acted, (
        f"{method.label} on {family}: with budget={budget} its attention never acts in a step of decoding"
    )


def check_held(held: dict[int, Tensor], unequal: bool, mask: Tensor, limit: Tensor, said: str) -> None:
    """`unequal`: heads share the budget unequally, and hold it in the mean."""
    counts = {i: (x & mask[:, None]).sum(-1) for i, x in held.items()}  # [B, G]
    for i, count in counts.items():
        mean = (
            torch.stack(list(counts.values())).double().mean((0, 2)) if unequal else count.double().amax(-1)
        )
        assert bool((mean <= limit).all()), (
            f"{said}: layer {i} holds {count.tolist()}, the budget is {limit.tolist()}"
        )
        assert bool(held[i][..., -1].all()), f"{said}: layer {i} dropped the newest token"


def full_bytes(model: Any, feeds: list[dict], batch: int) -> int:
    """Bytes of a full cache after the script, counted from the shapes that transformers' own cache holds."""
    cache = full_cache(model)
    with torch.no_grad():
        for feed in feeds:
            model(**feed, past_key_values=cache)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    tensors = [getattr(layer, name) for layer in layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors)


def check_bytes(method: Method, family: str) -> None:
    """Evicting frees memory: what is held is what the slots need, and room to grow by 20 tokens or a quarter."""
    if method.page.keep is None and method.page.score is None:
        return
    model, _ = build(family)
    feeds = script(steps=(160, 1, 1, 1))
    tape = play(model, method, feeds)
    # index, count, notes and first keys: beside keys of width 8 they weigh more than in life
    tables, seen = 2.5, 0
    one_slot = full_bytes(model, feeds[:1], len(PADS)) / sum(160 * len(layer) for layer in tape.stored[0])
    for feed, layers, size in zip(feeds, tape.stored, tape.bytes):
        seen += feed["input_ids"].shape[1]
        need = sum(slots + max(20, slots // 4) for layer in layers for slots in layer) * one_slot * tables
        said = f"{method.label} on {family} holds {size} bytes for {sum(map(sum, layers))} slots of {seen} tokens"
        assert size <= need, f"{said}, which need {need:.0f}"


def generate(model: Any, feed: dict, **settings: Any) -> Any:
    """Six tokens, greedily; no token ends the text."""
    defaults = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True)
    with torch.no_grad():
        inputs = {name: feed[name] for name in ("input_ids", "attention_mask")}
        return model.generate(**inputs, return_dict_in_generate=True, **{**defaults, **settings})


def feeds_of(tokens: Tensor, mask: Tensor, steps: Iterable[int]) -> list[dict]:
    """A script that feeds these tokens in steps of these lengths."""
    feeds, at, positions = [], 0, (mask.cumsum(-1) - 1).clamp(min=0)
    for n in steps:
        new = slice(at, at + n)
        feeds.append(
            dict(input_ids=tokens[:, new], attention_mask=mask[:, : at + n], position_ids=positions[:, new])
        )
        at += n
    return feeds


def grown_mask(feed: dict, n: int) -> Tensor:
    mask = feed["attention_mask"]
    return torch.cat([mask, mask.new_ones(mask.shape[0], n - mask.shape[1])], 1)


def check_two_calls(method: Method, family: str) -> None:
    """Two generate() calls on one cache give the logits of the same tokens fed by hand."""
    model, _ = build(family)
    feed, cache = script(steps=(20,))[0], full_cache(model)
    with attach(model, method):
        first = generate(model, feed, past_key_values=cache)
        question = torch.randint(3, 118, (len(PADS), 4), generator=torch.Generator().manual_seed(5))
        text = torch.cat([first.sequences, question], 1)
        second = generate(
            model, dict(input_ids=text, attention_mask=grown_mask(feed, 30)), past_key_values=cache
        )
    tokens = second.sequences[:, :-1]
    tape = play(model, method, feeds_of(tokens, grown_mask(feed, 35), (20, 1, 1, 1, 1, 1, 5, 1, 1, 1, 1, 1)))
    expected = [out[:, -1] for out in tape.outs]
    logits = [*first.logits, *second.logits]
    wrong = max(float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True))
    assert wrong <= NEAR, (
        f"{method.label} on {family}: two calls are {wrong:.1e} away from the same tokens by hand"
    )


def check_generation(method: Method, family: str) -> None:
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
    check_prompt_in_chunks(method, family)


def check_prompt_in_chunks(method: Method, family: str) -> None:
    """A prompt that generate() feeds in chunks gives the logits of the same chunks fed by hand."""
    model, _ = build(family)
    feed = script(steps=(20,), pads=(0, 0))[0]
    with attach(model, method):
        out = generate(model, feed, prefill_chunk_size=8)
    feeds = feeds_of(out.sequences[:, :-1], grown_mask(feed, 25), (8, 8, 4, 1, 1, 1, 1, 1))
    expected = torch.stack([x[:, -1] for x in play(model, method, feeds).outs[2:]], 1)
    wrong = float((expected - torch.stack(out.logits, 1)).abs().max())
    assert wrong <= NEAR, (
        f"{method.label} on {family}, a prompt in chunks: {wrong:.1e} away from the same by hand"
    )


def check_bfloat16(method: Method, family: str) -> None:
    """In bfloat16 the policy is as far from its float32 oracle as the model itself is from its own."""
    model, _ = build(family)
    own = method.page.attention is not None
    feeds, method = script(), in_tokens(method) if own else method
    tape = play(build(family)[0].bfloat16(), method, feeds)
    assert all(bool(x.isfinite().all()) for x in tape.outs), (
        f"{method.label} on {family} in bfloat16: not finite"
    )
    # an attention of the page's own is held to one that chooses for itself, and otherwise where it nearly ties: its
    # middle row is asked, which few ties move
    far, slack = (median, 0.0) if own else (max, 0.02)
    noise = far(apart(feeds, hidden_nothing(family, torch.bfloat16), hidden_nothing(family)))
    wrong = far(apart(feeds, tape.outs, wanted_logits(model, method, feeds, tape)))
    assert wrong <= 3 * noise + slack, (
        f"{method.label} on {family} in bfloat16: {wrong:.2g} off, the model {noise:.2g}"
    )


def apart(feeds: list[dict], outs: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Of every forward and row that has tokens, how far its logits are from those wanted, as a share of them."""
    pairs = [(a[token].float(), b[token]) for i, logits in enumerate(zip(outs, wanted, strict=True))
             for a, b, token in zip(*logits, real(feeds, i), strict=True) if token.any()]  # fmt: skip
    return [float((a - b).norm() / b.norm()) for a, b in pairs]
