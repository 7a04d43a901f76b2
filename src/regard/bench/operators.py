"""`regard bench decode` and `regard bench attach`: times paired with full SDPA attention in one process.

A row: case, ratio (times faster than the paired baseline), of_bound (share of the machine's bound reached: the time
that the bytes it must read take at the read bandwidth measured here, over the time it took), spread (half the range
of the ratio over the repetitions), ms, baseline_ms, target, holds, note.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.ledger import LedgerLayer
from regard.bench import attached as pretrained
from regard.bench import caches, grid, mechanisms, sparse
from regard.bench.estimate import free_here
from regard.bench.timing import LIMIT, QUICK_LIMIT, left, paired, row, seconds, unmeasured, with_cpu, within
from regard.core import unknown
from regard.core.deprecation import renamed
from regard.ops.machine import product_dtype_of

TOKEN = 7


@dataclass(frozen=True)
class Shape:
    """The model that is timed: random weights, batch 1."""

    context: int = 32_768
    layers: int = 16
    heads: int = 16
    width: int = 64
    prompt: int = 2_048
    dtype: torch.dtype = torch.bfloat16

    def model(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=2048, hidden_size=self.heads * self.width, intermediate_size=2816,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            head_dim=self.width, max_position_embeddings=2 * self.context,
        )  # fmt: skip
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(self.dtype).eval()

    def keys(self) -> torch.Tensor:
        return drawn(self).clone()

    @property
    def cached(self) -> int:
        """Bytes of a full cache."""
        return 2 * self.layers * self.heads * self.context * self.width * self.dtype.itemsize

    def ledger(self) -> Cache:
        """A full cache of random keys and values, in ledger layers."""
        layers = []
        for _ in range(self.layers):
            layers.append(LedgerLayer())
            layers[-1]._start(self.keys(), self.keys())
        return Cache(layers=layers)

    def dynamic(self) -> DynamicCache:
        cache = DynamicCache()
        for i in range(self.layers):
            cache.update(self.keys(), self.keys(), i)
        return cache


@lru_cache(maxsize=1)
def drawn(shape: Shape) -> torch.Tensor:
    """The keys of one layer: random numbers take longer than the steps, so layers have the same."""
    return torch.randn(1, shape.heads, shape.context, shape.width).to(shape.dtype)


QUICK = Shape(context=4_096, layers=4, prompt=512)


@renamed(told="progress")
def bench(name: str, quick: bool = False, progress: Callable[[str], None] | None = None) -> list[dict]:
    """Rows of one benchmark: "decode", "attach", "caches", "grid", "mechanisms" or "sparse"."""
    own = ("decode", "attach")
    others = {"caches": caches.rows, "grid": grid.rows, "mechanisms": mechanisms.rows, "sparse": sparse.rows}
    if name not in (*own, *others):
        raise unknown("benchmark", name, [*own, *others, "efficiency"])
    progress = progress or (lambda text: None)
    with within(QUICK_LIMIT if quick else LIMIT):
        if name in others:
            return with_cpu(others[name](quick, progress))
        with torch.inference_mode():
            shape = shape_here(QUICK if quick else Shape(), name)
            if name == "decode":
                return with_cpu(decode(shape, progress))
            with within(left() / 3):
                rows = attached(shape, progress)
            return with_cpu([*rows, *pretrained.rows(quick, progress)])


def shape_here(shape: Shape, name: str) -> Shape:
    """The shape that is timed on this CPU: where it does not multiply bfloat16 a model of float32, of as many bytes."""
    if name == "decode" or product_dtype_of(shape.dtype, "cpu") == shape.dtype:
        return shape
    return replace(shape, dtype=torch.float32, context=shape.context // 2)


def read_bandwidth() -> float:
    """Bytes per second between this machine's memory and its cores: the best of a sum and of a copy of 1 GiB."""
    source = torch.ones(256 << 20)
    target = torch.empty_like(source)
    summed = min(seconds(source.sum) for _ in range(5))
    copied = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return max(source.nbytes / summed, 2 * source.nbytes / copied)


def step(model: Any, cache: Any, method: Any, facts: dict) -> float:
    """Seconds of one decode step under an attachment; `facts` hears the bytes it read and holds."""
    tokens = torch.tensor([[TOKEN]])
    with attach(model, method) as att:
        took = seconds(lambda: model(tokens, past_key_values=cache, use_cache=True))
        facts.update(read=att.bytes_read(), held=att.bytes_held())
        facts.setdefault("reads", []).append(facts["read"])
    return took


def steady(model: Any, cache: Any, method: Any, facts: dict) -> float:
    """As `step`, the second step under one attachment: the first asks the model how its keys turn."""
    tokens = torch.tensor([[TOKEN]])
    with attach(model, method) as att:
        model(tokens, past_key_values=cache, use_cache=True)
        took = seconds(lambda: model(tokens, past_key_values=cache, use_cache=True))
        facts.setdefault("reads", []).append(att.bytes_read())
    return took


CASES = {
    "streaming_llm, budget 5 %": ("streaming_llm", {}, 7.0),
    "tidaldecode, budget 5 %": ("tidaldecode", {}, 2.0),
    "tokenselect, budget 5 %": ("tokenselect", {"reuse": None}, 1.5),
    "tokenselect, budget 5 %, reuse": ("tokenselect", {}, 3.0),
}


def decode(shape: Shape, progress: Callable[[str], None]) -> list[dict]:
    """A decode step, end to end, of cache methods at a 5 % budget against full attention (SDPA, same ledger cache).

    In bfloat16 and in float32; half of the time is for each.
    """
    speed, rows = read_bandwidth(), list[dict]()
    for i, dtype in enumerate((torch.bfloat16, torch.float32)):
        with within(left() / (2 - i)):
            rows += decode_in(replace(shape, dtype=dtype), speed, progress)
        drawn.cache_clear()
        gc.collect()
    return rows


def decode_in(shape: Shape, speed: float, progress: Callable[[str], None]) -> list[dict]:
    """The rows of one dtype."""
    name = str(shape.dtype).removeprefix("torch.")
    labels = {f"{case}, {name}": asked for case, asked in CASES.items()}
    room = free_here()
    if 2.5 * shape.cached > room:
        note = f"not measured: two caches of {shape.cached / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free"
        return [row(case, unmeasured(), None, target, note) for case, (_, _, target) in labels.items()]
    model, rows = shape.model(), list[dict]()
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    base_cache = shape.ledger()
    progress(
        f"read bandwidth {speed / 1e9:.1f} GB/s; weights {weights / 1e6:.0f} MB; context {shape.context}"
    )
    for case, (page, settings, target) in labels.items():
        progress(case)
        if left() <= 0:
            rows.append(row(case, unmeasured(), None, target))
            continue
        cache, facts = shape.ledger(), dict[str, Any]()
        method = catalog.method(page, budget=0.05, **settings)
        times = paired(
            lambda: steady(model, cache, method, facts),  # noqa: B023, F821  (deleted later)
            lambda: steady(model, base_cache, None, {}),  # noqa: F821  (deleted later)
        )
        if "reads" in facts:
            read = statistics.median(facts["reads"][1:])  # the first step is not timed
            note = f"reads {read / 1e6:.0f} MB of keys and values, {speed / 1e9:.1f} GB/s"
            rows.append(row(case, times, (read + weights) / speed, target, note))
        else:  # the time ran out while the cache was made
            rows.append(row(case, times, None, target))
        del cache
        gc.collect()
    del base_cache
    if shape.dtype == torch.bfloat16:
        rows.append(held(shape, model))
    return rows


def held(shape: Shape, model: Any) -> dict:
    """Bytes behind the cache after eviction at a 10 % budget: measured on its storages, at most 15 % of full."""
    facts, full, cache = dict[str, Any](), dict[str, Any](), shape.ledger()
    step(model, cache, None, full)
    step(model, cache, catalog.method("streaming_llm", budget=0.1), facts)
    share = facts["held"] / full["held"]
    times = dict(ratio=full["held"] / facts["held"], spread=0.0, ms=0.0, baseline_ms=0.0)
    note = f"{share:.1%} of full ({facts['held'] / 1e6:.0f} of {full['held'] / 1e6:.0f} MB)"
    return {"case": "bytes held, budget 10 %", **times, "of_bound": None, "target": 1 / 0.15, "holds": share <= 0.15,
            "note": note}  # fmt: skip


def attached(shape: Shape, progress: Callable[[str], None]) -> list[dict]:
    """What attaching costs: against the model's own SDPA with its own cache, prefill and decode."""
    model = shape.model()
    prompt = torch.randint(3, 2000, (1, shape.prompt))
    everything = catalog.method("streaming_llm", budget=1.0)
    rows = []
    for label, method, most in (
        ("no method", None, 1.05),
        ("a budget that covers everything", everything, 1.10),
    ):
        progress(f"{label}: prefill and decode")
        times = paired(lambda: prefill(model, prompt, method), lambda: prefill(model, prompt, False))  # noqa: B023
        rows.append(row(f"{label}: prefill of {shape.prompt}", times, None, 1 / most))
        cache, native_cache = shape.ledger(), shape.dynamic()
        times = paired(lambda: step(model, cache, method, {}), lambda: native_step(model, native_cache))  # noqa: B023, F821  (deleted later)
        rows.append(
            row(f"{label}: decode at {shape.context}", times, None, 1 / most, "own: DynamicCache, SDPA")
        )
        del cache, native_cache
        gc.collect()
    return rows


def prefill(model: Any, prompt: torch.Tensor, method: Any) -> float:
    if method is False:
        return seconds(lambda: model(prompt, use_cache=True, logits_to_keep=1))
    with attach(model, method):
        return seconds(lambda: model(prompt, use_cache=True, logits_to_keep=1))


def native_step(model: Any, cache: DynamicCache) -> float:
    return seconds(lambda: model(torch.tensor([[TOKEN]]), past_key_values=cache, use_cache=True))
