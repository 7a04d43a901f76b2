"""Flux Attention's claim: routers give retrieval more full layers than local copying, and retrieval loses nothing.

Prompts of 256 tokens of three kinds: a needle in text, a page of facts (each with a question about one of them), and
text that ends in a phrase said over and over, whose next tokens stand in the window. Routers of the shipped model,
which stays as it is, learn from such prompts made of the help pages of Python: of a question 45 % of the layers are to
be sparse, of a copy all, as the official code asks of questions, and of summaries or code. Measured is on other facts,
phrases and text, the answers decoded token by token with the decisions of their prompts.
"""

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.bench.conversion import LEARNED
from regard.catalog import task
from regard.claims.lab import difference, mean
from regard.claims.shipped_lm import accuracy, samples, shipped, stream
from regard.core.claim import Claim, Measured
from regard.tasks import Sample, Source, held_out
from regard.tasks.base import first_token
from regard.train.convert import convert, help_pages
from regard.train.routes import SPARSE, Routes

LENGTH, TESTED, PHRASE, COPIED, SAID = 256, 64, (6, 12), 48, 5
CONFIG = dict(sinks=16, local=64, pool=16, block_q=32, block_k=16)
# fewer steps, or a rate of 1e-2, and the routers do not tell the kinds apart yet: gaps of 0.03 to 0.17
TRAINED = dict(steps=450, batch=8, rate=3e-3)
KINDS = ("needle", "recall")


def copies(length: int, count: int, seed: int, source: Source) -> list[Sample]:
    """Text whose last COPIED tokens are a phrase over and over; the answer goes on with it."""
    found, tokenizer = [], shipped().tokenizer
    for i in range(count):
        rng, head = random.Random(f"copy {seed} {i}"), first_token(tokenizer)
        text = source.take(tokenizer, length - COPIED - len(head), rng)
        phrase = source.take(tokenizer, rng.randint(*PHRASE), rng)
        said = (phrase * (COPIED + SAID))[: COPIED + SAID]
        found.append(Sample(head + text + said[:COPIED], said[COPIED:], (0, 0)))
    return found


def lessons(count: int) -> tuple[Tensor, Tensor, Routes]:
    """(ids [rows, N], weights of answers, prompts and shares): as many questions as copies."""
    source, rows = Source("help pages", "\n\n".join(help_pages())), []
    tokenizer = shipped().tokenizer
    for name in KINDS:
        chosen = task(name).samples(tokenizer, LENGTH, count // 4, LEARNED, source)
        rows += [(s, SPARSE) for s in chosen]
    rows += [(s, 1.0) for s in copies(LENGTH, count // 2, LEARNED, source)]
    size = max(len(s.answer) for s, _ in rows)
    ids = torch.tensor([s.prompt + (s.answer + s.answer[-1:] * size)[:size] for s, _ in rows])
    weights = torch.zeros(ids.shape)
    for row, (s, _) in zip(weights, rows, strict=True):
        row[LENGTH : LENGTH + len(s.answer)] = 1.0
    return ids, weights, Routes(torch.full((len(rows),), LENGTH), torch.tensor([share for _, share in rows]))


@cache
def routed() -> Converted:
    ids, weights, routes = lessons(512)
    return convert(shipped().model, shipped().tokenizer, "flux_attention", ids=ids, weights=weights, routes=routes,
                   length=ids.shape[1], seed=0, **TRAINED, **CONFIG)  # fmt: skip


def full_share(converted: Converted, chosen: list[Sample]) -> tuple[float, list[float]]:
    """Share of full layers, the mean over prompts, and by layer."""
    prompts = torch.tensor([s.prompt for s in chosen])
    with torch.inference_mode(), attach(shipped().model, converted):
        cache = shipped().model(prompts, use_cache=True, logits_to_keep=1).past_key_values
    by_layer = [layer.memory["flux_attention"].float().mean().item() for layer in cache.layers]
    return mean(by_layer), by_layer


def base_difference(converted: Converted) -> float:
    """Largest difference of the logits where every layer is full."""
    everything = Converted(converted.method.with_settings(threshold=0.0), converted.params)
    ids = stream(LENGTH)[None]
    with torch.inference_mode():
        wanted = shipped().model(ids, use_cache=False).logits
        with attach(shipped().model, everything):
            return difference(shipped().model(ids, use_cache=False).logits, wanted)


def all_sparse(converted: Converted) -> Converted:
    """The same with routers that never say full: what the decision is worth."""
    params = {at: {**parts, "b_5": torch.tensor([99.0, -99.0])} for at, parts in converted.params.items()}
    return Converted(converted.method, params)


def measure() -> Measured:
    converted = routed()
    kinds = {name: samples(name, LENGTH, TESTED, seed=1) for name in KINDS}
    kinds["copy"] = copies(LENGTH, TESTED, 1, held_out())
    numbers: dict[str, Any] = {}
    for name, chosen in kinds.items():
        numbers[f"full_share_{name}"], by_layer = full_share(converted, chosen)
        numbers[f"full_by_layer_{name}"] = by_layer
        for way, method in (("base", None), ("routed", converted), ("all_sparse", all_sparse(converted))):
            numbers[f"accuracy_{name}_{way}"] = accuracy(chosen, method)
    share = {name: numbers[f"full_share_{name}"] for name in kinds}
    numbers["gap"] = mean(share[name] for name in KINDS) - share["copy"]
    lost = [numbers[f"accuracy_{name}_base"] - numbers[f"accuracy_{name}_routed"] for name in KINDS]
    numbers["points_lost"] = 100 * mean(lost)
    numbers["all_full_difference"] = base_difference(converted)
    parts = {
        "more full layers": numbers["gap"] >= 0.25,
        "retrieval kept": numbers["points_lost"] <= 2,
        "all full is the model": numbers["all_full_difference"] == 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="flux_attention",
    statement=(
        "routers learned on the shipped language model send more layers of long-retrieval prompts to full attention "
        "than of local-copy prompts, at unchanged retrieval accuracy; all layers full is the model itself"
    ),
    bound="gap of the shares of full layers >= 0.25; retrieval accuracy lost <= 2 points; difference of all full = 0",
    measure=measure,
)
