"""What a larger setting of a cache page does to what is held and read, on one text of a tiny model."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.core.errors import present
from regard.testing.cache.choice import asked
from regard.testing.cache.oracle import by_head
from regard.testing.cache.script import Tape, full_cache, play, script
from regard.testing.directions.way import Row, less, more

STEPS = (40, 1, 1, 1, 1, 6, 1, 1, 1, 1)
# of a text of 50 tokens, for the pages that have them
SMALL = {
    "budget": 12, "window": 3, "sinks": 1, "pool": 1, "init": 1, "local": 3, "chunk": 4, "block": 3, "blocks": 2,
    "representatives": 1, "full": 0, "k": 6, "residual": 4, "group": 4, "lag": 5, "page": 3, "n": 2, "stride": 3,
    "history": 20, "future": 8, "recent": 0.3, "length": 8, "last": 2, "select": (1,), "chunks": 5,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "scissorhands": {"recent": 2},
    "sparq": {"local": 0.25},
    "criticalkv": {"first": 0.5},
    "compactor": {"first": 1},
    "kvzip": {"whole": (90, 91), "part": (60,), "answer": ()},
    "headkv": {"importance": ((5.0, 1.0), (3.0, 0.5), (1.0, 0.2))},
}
SCORE = "a part of a score: which tokens are above others for it depends on the text"

CACHES: dict[str, Row] = {
    # how much is read, or held
    "budget": more("read", 8, 20),
    "longheads.budget": less("change", 8, 40),
    "sparq.budget": less("change", 8, 30),
    "k": more("read", 4, 12, budget=None),
    "full": more("read", 0, 2),
    "tidaldecode.full": "below the first selecting layer all is read; a sliding layer searches from here on",
    "blocks": more("read", 1, 4, budget=None),
    "chunks": less("change", 3, 7, budget=None),
    "trained": less("change", 1, 60),
    "retrieval": more("read", 0.2, 0.7, budget=None),
    "threshold": more("read", 0.1, 0.9, budget=None),
    "similarity": more("read", -0.9, 0.9, stride=50),
    "stride": less("read", 2, 5),
    "drop": less("held", 0.1, 0.8),
    "n": more("held", 2, 7),
    # what stays in any case
    "window": more("newest", 2, 8),
    "streaming_llm.window": more("newest", 2, 8, budget=None),
    "duo_attention.window": more("newest", 2, 8, budget=None),
    "razor_attention.window": more("newest", 2, 20, budget=None),
    "simlayerkv.window": more("newest", 2, 8, budget=None, threshold=0.0),
    "cur.window": "tokens that are judged together, of which none has to stay",
    "recent": more("newest", 0.1, 0.7),
    "scissorhands.recent": more("newest", 1, 6),
    "local": more("newest", 2, 8),
    "sparq.local": "which of the tokens read are chosen by age: its own attention says no slots",
    "compactor.last": more("newest", 1, 6),
    "lag": more("newest", 2, 8),
    "sinks": more("first", 1, 5),
    "duo_attention.sinks": more("first", 1, 5, budget=None),
    "razor_attention.sinks": more("first", 1, 5, budget=None),
    "simlayerkv.sinks": more("first", 1, 5, budget=None, threshold=0.0),
    "init": more("first", 1, 5),
    "compactor.first": more("first", 1, 5),
    # what stays together, and how it is shared out
    "pool": more("run", 1, 5),
    "chunk": more("run", 2, 8),
    "block": more("run", 2, 6),
    "page": more("run", 2, 6),
    "length": more("gap", 4, 20),
    "floor": less("spread", 0.0, 1.0),
    "spread": less("spread", 0.2, 5.0),
    "motion": less("spread", 0.2, 5.0),
    "temperature": more("spread", 0.3, 2.0),
    "headkv.beta": less("spread", 1.5, 6.0),
    "pyramidkv.beta": more("spread", 1.5, 20.0),
    "chunkkv.reuse": more("alike", 1, 3),
    "tokenselect.reuse": more("turnover", -0.5, 0.9),
    # how well it is chosen
    "channels": more("mass", 1 / 8, 1.0),
    "components": more("mass", 0.1, 1.0),
    "mix": more("mass", 0.0, 1.0),
    "rank": less("change", 1, 16),
    "criticalkv.first": less("foreign", 0.0, 1.0),
    # how exactly it is stored, and what that takes
    "bits": (less("change", 2, 8), more("bytes", 2, 8)),
    "group": (more("change", 4, 8), less("bytes", 4, 8)),
    "residual": (less("change", 0, 30), more("bytes", 0, 30)),
    "mustafar.window": (less("change", 2, 20), more("bytes", 2, 20)),
    "think.window": more("bytes", 2, 20),
    "keys": (more("change", 0.3, 0.8), less("bytes", 0.3, 0.8)),
    "values": (more("change", 0.3, 0.8), less("bytes", 0.3, 0.8)),
    "sparsity": (more("change", 0.3, 0.8), less("bytes", 0.3, 0.8)),
    # no direction
    "seed": "another one is another draw",
    "following": "how many share the value of one that goes: none of them stays for it",
    "last": "queries that are asked whether a layer is lazy: more of them answer neither yes nor no",
    "finch.chunk": "parts of the document that share the budget: smaller ones are no more tokens",
    "kvzip.chunk": "tokens that are repeated in one pass: all are, however many passes that takes",
    "lead": "tokens that an instruction quotes",
    "longheads.chunk": "tokens of a chunk of those read; a small budget shrinks it",
    "compactor.chunk": "tokens that attend to each other, for a score",
    "non_causal_attention.chunk": "tokens that attend to each other, for a score",
    **dict.fromkeys(
        ("blend", "epsilon", "future", "gamma", "history", "queries", "representatives", "ridge", "similar",
         "smoothing", "steps", "tau_end", "tau_init"), SCORE,
    ),
}  # fmt: skip


def settings_of(cfg: Any) -> set[str]:
    """The names of its settings, and of those of the pages that it is made of."""
    below = [x for x in vars(cfg).values() if is_dataclass(x)]
    return {*vars(cfg)}.union(*map(settings_of, below))


@lru_cache(maxsize=4)
def tape(name: str, settings: tuple[tuple[str, Any], ...]) -> Tape:
    """The text read under a page with these settings beside small ones."""
    names = settings_of(catalog.method(name).config)
    base = {setting: value for setting, value in SMALL.items() if setting in names}
    method = catalog.method(name, **{**base, **OWN.get(name, {}), **dict(settings)})
    return play(asked("llama", 3), method, script(STEPS, pads=(0,)))


@cache
def plain() -> tuple[list[Tensor], list[Tensor]]:
    """(logits, weights of the first layer [1, H, n, seen]) of each forward, where all is kept."""
    model, outs, weights = asked("llama", 3), [], []
    past, before = full_cache(model), model.config._attn_implementation
    model.set_attn_implementation("eager")  # the one that says weights
    with torch.no_grad():
        for feed in script(STEPS, pads=(0,)):
            out = model(**feed, past_key_values=past, output_attentions=True)
            outs.append(out.logits)
            weights.append(out.attentions[0])
    model.set_attn_implementation(before)
    return outs, weights


def measure(name: str, quantity: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """A quantity of a page with these settings, mean over steps, layers and heads."""
    run = tape(name, tuple(sorted(settings.items())))
    return {"": float(QUANTITIES[quantity](run))}


def read(run: Tape) -> list[Tensor]:
    """[1, H, seen] bool for each layer of each forward after the prompt: what is read."""
    heads = asked("llama", 3).config.num_attention_heads
    tables = [record.alive for step in run.reads[1:] for record in step.values()]
    return [by_head(table, heads) for table in tables if table is not None]


def held(run: Tape) -> list[Tensor]:
    """[1, G, seen] bool for each layer of each forward: what is held after it."""
    return [table for step in run.held for table in step.values()]


def mean(found: list[Tensor]) -> float:
    return float(torch.stack([x.double().mean() for x in found]).mean())


def run_length(table: Tensor) -> Tensor:
    """[1, H]: mean tokens of a stretch without a gap."""
    begins = table & ~torch.nn.functional.pad(table, (1, 0))[..., :-1]
    return table.sum(-1) / begins.sum(-1).clamp(min=1)


def longest_gap(table: Tensor) -> Tensor:
    """[1, G]: the most tokens in a row of which none is there."""
    n = table.shape[-1]
    at = torch.arange(n).expand_as(table)
    last = torch.where(table, at, -1).cummax(-1).values
    return (at - last).amax(-1)


def spread(run: Tape) -> float:
    """How unlike each other heads of the whole model are in what they hold."""
    return mean([torch.cat([x.sum(-1).double() for x in step.values()]).std()[None] for step in run.held])


def alike(run: Tape) -> float:
    """Share of tokens that two neighbouring layers both hold, of those that either does."""
    pairs = [pair for step in run.held for pair in pairwise(step.values())]
    return mean([(a & b).sum(-1) / (a | b).sum(-1).clamp(min=1) for a, b in pairs])


def turnover(run: Tape) -> float:
    """Tokens that are read in a step and were there, but not read, in the one before."""
    found = []
    for before, after in pairwise(run.reads[1:]):
        for layer, record in after.items():
            old = present(before[layer].alive, "what a layer read")
            found.append((present(record.alive, "what a layer read")[..., : old.shape[-1]] & ~old).sum(-1))
    return mean(found)


def mass(run: Tape) -> float:
    """Share of the attention of full attention's first layer that goes to what is read."""
    found = []
    for step, weights in zip(run.reads[1:], plain()[1][1:]):
        alive = by_head(step[0].alive, weights.shape[1])
        found.append((weights[:, :, -1] * alive).sum(-1))
    return mean(found)


def change(run: Tape) -> float:
    """How far logits are from those of full attention."""
    return mean([(a - b).abs() for a, b in zip(run.outs[1:], plain()[0][1:])])


def foreign(run: Tape) -> float:
    """Tokens held that SnapKV, the page below, does not hold."""
    below = tape("snapkv", ())
    steps = zip(run.held, below.held, strict=True)
    return mean([(step[i] & ~other[i]).sum(-1) for step, other in steps for i in step])


QUANTITIES = {
    "foreign": foreign,
    "read": lambda run: mean([x.sum(-1) for x in read(run)]),
    "held": lambda run: mean([x.sum(-1) for x in held(run)]),
    "newest": lambda run: mean([x.flip(-1).cumprod(-1).sum(-1) for x in read(run)]),
    "first": lambda run: mean([x.cumprod(-1).sum(-1) for x in read(run)]),
    "run": lambda run: mean([run_length(x) for x in read(run)]),
    "gap": lambda run: mean([longest_gap(x) for x in held(run)]),
    "bytes": lambda run: float(run.bytes[-1]),
    "spread": spread,
    "alike": alike,
    "turnover": turnover,
    "mass": mass,
    "change": change,
}
