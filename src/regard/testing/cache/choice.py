"""A page's choice is its definition: what it holds, reads and merges, token by token, layer by layer, head by head.

The oracle of `check_oracle` takes what a policy holds as given, whatever it is. Here a `Definition`, a slow loop over
one text, says what it has to be: the page runs on a padded batch over a prompt, steps and a second turn, queries, keys
and values are taken from the model's own projections, and every row is followed by the definition on its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from regard.core import Method
from regard.testing.cache.again import again, feeds_until
from regard.testing.cache.definition import Definition, Moment, Text
from regard.testing.cache.oracle import by_head, gap, present_rotation
from regard.testing.cache.script import Tape, full_cache, play, real, rewrites, script
from regard.testing.tiny import text
from regard.testing.zoo import build, sharpened

STEPS = (18, 1, 1, 1, 1, 1, 4, 1, 1, 3, 1, 1, 1)  # a prompt, steps, a question, steps, ...
# padding before and after the tokens of each row: of the prompt, and of both questions
GAPS = {0: ((0, 0), (14, 0), (2, 3)), 6: ((1, 0), (0, 2), (1, 1)), 9: ((0, 1), (1, 0), (0, 0))}
CLOSE = 1e-5  # of head outputs in float64; the model's rotary tables are float32
MOVED = 1e-4  # in logits
LAST = 4  # queries of a forward whose answers are written out, where not all are


@dataclass
class Trace:
    """A run of a page: the tape, and by layer q, k, v and head outputs of every forward, [B, N, heads, width]."""

    model: Any
    tape: Tape
    parts: list[dict[str, list[Tensor]]]


@cache
def asked(family: str, layers: int) -> Any:
    """A tiny model in float64."""
    if family != "llama" or layers == 3:
        return build(family)[0].double()
    torch.manual_seed(1)
    return sharpened(tf.LlamaForCausalLM(tf.LlamaConfig(**text(num_hidden_layers=layers)))).double()


def feeds_of_choice(family: str = "llama") -> list[dict]:
    """The script: rows with padding before, after and between.

    A model that slides a window counts padding in it: there it stands before a text alone.
    """
    return script(STEPS, pads=(0, 14)) if family != "llama" else script(STEPS, pads=(0,) * 3, gaps=GAPS)


@contextmanager
def projected(model: Any) -> Iterator[list[dict[str, list[Tensor]]]]:
    """Within the block, what every layer projects to queries, keys and values, and what its heads answer."""
    parts: list[dict[str, list[Tensor]]] = []
    once: set[tuple[int, str]] = set()  # a pass beside the model's own comes behind it, in the same forward
    handles = [model.register_forward_pre_hook(lambda *given: once.clear())]
    for number, layer in enumerate(model.model.layers):
        attention, noted = layer.self_attn, {name: [] for name in ("q", "k", "v", "z")}
        parts.append(noted)

        def note(name: str, x: Tensor, i: int = number, width: int = attention.head_dim) -> None:
            if (i, name) not in once:
                once.add((i, name))
                parts[i][name].append(x.detach().unflatten(-1, (-1, width)))

        for name in ("q", "k", "v"):
            projection = getattr(attention, f"{name}_proj")
            handles.append(
                projection.register_forward_hook(lambda m, a, x, name=name, note=note: note(name, x))
            )
        handles.append(attention.o_proj.register_forward_pre_hook(lambda m, a, note=note: note("z", a[0])))
    try:
        yield parts
    finally:
        for handle in handles:
            handle.remove()


def trace(model: Any, method: Method, feeds: list[dict]) -> Trace:
    """Run the script under the method, and write down what it chose and what it chose from."""
    with projected(model) as parts:
        tape = play(model, method, feeds)
    # a page that is measured on the model when it is attached has run it before
    return Trace(model, tape, [{name: xs[-len(feeds) :] for name, xs in noted.items()} for noted in parts])


def moment_of_text(model: Any, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Moment:
    """A layer of a text that is fed at once: what it projects to, [n, heads, width]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    turn, n = present_rotation(model, layer), q.shape[1]
    rotate = lambda x, by: turn(x[None, None], by[None, None])[0, 0]  # noqa: E731
    at = torch.arange(n)[None, None]
    return Moment(
        layer=layer, q=turn(q[None], at)[0], k=turn(k[None], at)[0], v=v, plain_q=q, plain_k=k, fed=n, budget=n,
        scale=q.shape[-1] ** -0.5, held=(tuple(range(n)),) * len(k), rotate=rotate,
        window=getattr(model.config, "sliding_window", None),
    )  # fmt: skip


def texts(run: Trace, row: int) -> list[Moment]:
    """The whole text of a row, layer by layer."""
    feeds = run.tape.feeds
    tokens = [real(feeds, forward)[row] for forward in range(len(feeds))]
    parts = [
        [torch.cat([x[row, t] for x, t in zip(noted[name], tokens, strict=True)]) for name in ("q", "k", "v")]
        for noted in run.parts
    ]
    return [moment_of_text(run.model, layer, *qkv) for layer, qkv in enumerate(parts)]


def upto(whole: Moment, n: int, fed: int, held: list[list[int]], budget: int) -> Moment:
    """What the definition is told when the text has n tokens, of which this forward fed the last."""
    q, k, v, plain_q, plain_k = (x[:, :n] for x in (whole.q, whole.k, whole.v, whole.plain_q, whole.plain_k))
    stored = tuple((*before, *range(n - fed, n)) for before in held)
    budget = budget if whole.window is None else min(budget, whole.window)
    return replace(
        whole, q=q, k=k, v=v, plain_q=plain_q, plain_k=plain_k, fed=fed, budget=budget, held=stored
    )


def tokens_of(setting: int | float, n: int) -> int:
    """A budget in tokens or as a share, of a text of n tokens."""
    return min(n, setting) if isinstance(setting, int) else max(1, ceil(round(setting * n, 9)))


def follow(run: Trace, method: Method, definition: type[Definition], row: int, answers: int | None) -> None:
    """Hold one row of a run to the definition. `answers`: of so many last queries; None: of all."""
    feeds, wholes = run.tape.feeds, texts(run, row)
    written = definition(method.config, run.model)
    setting = getattr(method.config, "budget", None)
    setting = written.own_budget() if setting is None else setting
    held: list[list[list[int]]] = [[[] for _ in whole.k] for whole in wholes]
    stored: list[list[dict]] = [[{} for _ in whole.k] for whole in wholes]
    for forward in range(len(feeds)):
        mask = feeds[forward]["attention_mask"][row].bool()
        n, fed = int(mask.sum()), int(real(feeds, forward)[row].sum())
        moments = [
            as_stored(upto(whole, n, fed, held[layer], tokens_of(setting, n)), stored[layer])
            for layer, whole in enumerate(wholes)
        ]
        ids = feeds_until(feeds, forward)[row, mask].tolist()
        written.together(moments, Text(ids, partial(again, run.model, run.tape, row, forward)))
        for layer, at in enumerate(moments):
            said = f"{method.label}, row {row}, forward {forward}, layer {layer}"
            reads = written.reads(at)
            reads = [list(at.held[at.kv_head(h)]) for h in range(len(at.q))] if reads is None else reads
            compare_reads(run, said, row, layer, forward, mask, reads)
            compare_merged(run, said, row, layer, forward, written.merged(at))
            compare_answers(run, said, row, forward, at, written, reads, answers)
            keeps = written.keeps(at)
            keeps = [list(tokens) for tokens in at.held] if keeps is None else keeps
            # what a window can never see again is not held
            held[layer] = [sorted({*tokens} & {*at.lasting(g)}) for g, tokens in enumerate(keeps)]
            for g, tokens in enumerate(held[layer]):
                there = places(run.tape.held[forward][layer][row, g], mask)
                assert there == tokens, f"{said}, KV head {g}: holds {there}, by its definition {tokens}"
                stored[layer][g] |= written.stores(at, g, tokens)
            if run.tape.contents:
                compare_contents(run, said, row, forward, as_stored(at, stored[layer]), held[layer])


def as_stored(at: Moment, stored: list[dict[int, tuple[Tensor, Tensor]]]) -> Moment:
    """The moment with the keys and values that are stored for some of its tokens, by KV head."""
    if not any(stored):
        return at
    k, v = at.k.clone(), at.v.clone()
    for g, tokens in enumerate(stored):
        for j, (key, value) in tokens.items():
            k[g, j], v[g, j] = key, value
    return replace(at, k=k, v=v)


def compare_contents(
    run: Trace, said: str, row: int, forward: int, at: Moment, held: list[list[int]]
) -> None:
    """What is stored of the tokens that are held."""
    mask = run.tape.feeds[forward]["attention_mask"][row].bool()
    for what, there, wanted in zip(("key", "value"), run.tape.contents[forward][at.layer], (at.k, at.v)):
        for g, tokens in enumerate(held):
            wrong = (there[row, g, mask][tokens] - wanted[g, tokens]).abs().amax(-1)
            assert float(wrong.max()) <= CLOSE, (
                f"{said}, KV head {g}: the {what} of token {tokens[int(wrong.argmax())]} is "
                f"{float(wrong.max()):.1e} away from its definition"
            )


def places(there: Tensor, mask: Tensor) -> list[int]:
    """The tokens of a row, counted without padding, that are marked in a table [seen]."""
    return there[mask].nonzero()[:, 0].tolist()


def compare_reads(
    run: Trace, said: str, row: int, layer: int, forward: int, mask: Tensor, reads: list[list[int]]
) -> None:
    alive = run.tape.reads[forward][layer].alive
    assert alive is not None
    alive = by_head(alive, len(reads))
    for h, tokens in enumerate(reads):
        there = places(alive[row if len(alive) > 1 else 0, h], mask)
        assert there == sorted(tokens), (
            f"{said}, query head {h}: reads {there}, by its definition {sorted(tokens)}"
        )


def compare_merged(run: Trace, said: str, row: int, layer: int, forward: int, expected: list | None) -> None:
    record = run.tape.reads[forward][layer].merged
    heads = len(expected or ()) if record is None else record[0].shape[1]
    for g in range(heads):
        there = [] if record is None else (record[2][row, g] > 0).nonzero()[:, 0].tolist()
        wanted = [] if expected is None or expected[g] is None else [expected[g]]
        assert len(there) == len(wanted), (
            f"{said}, KV head {g}: {len(there)} merged tokens, by its definition {len(wanted)}"
        )
        for slot, (key, value, count) in zip(there, wanted):
            assert record is not None
            k, v, c = (x[row, g, slot] for x in record[:3])
            assert float(c) == count, f"{said}, KV head {g}: a merged token of weight {float(c)}, not {count}"
            wrong = max(float((k - key).abs().max()), float((v - value).abs().max()))
            assert wrong <= CLOSE, (
                f"{said}, KV head {g}: a merged token is {wrong:.1e} away from its definition"
            )


def compare_answers(
    run: Trace,
    said: str,
    row: int,
    forward: int,
    at: Moment,
    written: Definition,
    reads: list,
    answers: int | None,
) -> None:
    tokens = real(run.tape.feeds, forward)[row]
    z = run.parts[at.layer]["z"][forward][row, tokens]  # [fed, H, E]
    for i in at.new if answers is None else at.new[-answers:]:
        for h in range(len(at.q)):
            expected = written.answer(at, h, i, at.seen(i, tuple(reads[h])))
            wrong = float((z[i - at.new[0], h] - expected).abs().max())
            assert wrong <= CLOSE, f"{said}, query head {h}, token {i}: {wrong:.1e} away from its definition"


def check_choice(
    method: Method,
    definition: type[Definition],
    feeds: list[dict] | None = None,
    family: str = "llama",
    answers: int | None = None,
) -> Tape:
    """The page holds, reads, merges and answers what its definition says, in every row, layer, head and forward."""
    model, feeds = asked(family, definition.layers), feeds or feeds_of_choice(family)
    run = trace(model, method, feeds)
    for row in range(len(feeds[0]["input_ids"])):
        follow(run, method, definition, row, answers)
    assert acts(method, model, run.tape), (
        f"{method.label} chooses nothing: settings too large to see what it chooses"
    )
    return run.tape


def acts(method: Method, model: Any, tape: Tape) -> bool:
    """Whether some token is not held or not read; of a page with its own attention, whether it answers otherwise."""
    if method.page.attention is None and not rewrites(method):
        feeds = [feed["attention_mask"].bool()[:, None] for feed in tape.feeds]
        tables = [[*held.values(), *(read.alive for read in reads.values() if read.alive is not None)]
                  for held, reads in zip(tape.held, tape.reads, strict=True)]  # fmt: skip
        return any(bool((mask & ~x).any()) for mask, some in zip(feeds, tables, strict=True) for x in some)
    past = full_cache(model)
    with torch.no_grad():
        plain = [model(**feed, past_key_values=past).logits for feed in tape.feeds]
    return gap(tape.feeds, tape.outs, plain) > MOVED


def check_default_choice(method: Method, definition: type[Definition]) -> None:
    """The same under the page's defaults, on one text that is long enough for them."""
    feeds = script((definition.long, 1, 1, 2, 1, 1), pads=(0,))
    check_choice(method, definition, feeds, answers=LAST)
