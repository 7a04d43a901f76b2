"""`regard bench decode` and `regard bench attach`: times paired with full SDPA attention in one process.

A row: case, ratio (times faster than the paired baseline), of_bound (share of the machine's bound reached: the time
that the bytes it must read take at the read bandwidth measured here, over the time it took), spread (half the range
of the ratio over the repetitions), ms, baseline_ms, target, holds, note.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.ledger import LedgerLayer
from regard.bench import mechanisms, sparse
from regard.bench.timing import paired, row, seconds
from regard.core import unknown
from regard.core.deprecation import renamed

TOKEN = 7


@dataclass(frozen=True)
class Shape:
    """The model that is timed: random weights, bfloat16, batch 1."""

    context: int = 32_768
    layers: int = 16
    heads: int = 16
    width: int = 64
    prompt: int = 2_048

    def model(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=2048, hidden_size=self.heads * self.width, intermediate_size=2816,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            head_dim=self.width, max_position_embeddings=2 * self.context,
        )  # fmt: skip
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()

    def keys(self) -> torch.Tensor:
        return torch.randn(1, self.heads, self.context, self.width, dtype=torch.bfloat16)

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


QUICK = Shape(context=4_096, layers=4, prompt=512)


@renamed(told="progress")
def bench(name: str, quick: bool = False, progress: Callable[[str], None] | None = None) -> list[dict]:
    """Rows of one benchmark: "decode", "attach", "mechanisms" or "sparse"."""
    known = {"decode": decode, "attach": attached}
    if name == "mechanisms":
        return mechanisms.rows(quick, progress or (lambda text: None))
    if name == "sparse":
        return sparse.rows(quick, progress or (lambda text: None))
    if name not in known:
        raise unknown("benchmark", name, [*known, "mechanisms", "sparse", "efficiency"])
    with torch.inference_mode():
        return known[name](QUICK if quick else Shape(), progress or (lambda text: None))


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


def decode(shape: Shape, progress: Callable[[str], None]) -> list[dict]:
    """A decode step, end to end, of cache methods at a 5 % budget against full attention (SDPA, same ledger cache)."""
    model, speed = shape.model(), read_bandwidth()
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    cases = {
        "streaming_llm, budget 5 %": (catalog.method("streaming_llm", budget=0.05), 5.0),
        "tidaldecode, budget 5 %": (catalog.method("tidaldecode", budget=0.05), 2.0),
        "tokenselect, budget 5 %": (catalog.method("tokenselect", budget=0.05, reuse=None), 1.5),
        "tokenselect, budget 5 %, reuse": (catalog.method("tokenselect", budget=0.05), 2.5),
    }
    rows: list[dict] = []
    base_cache = shape.ledger()
    progress(
        f"read bandwidth {speed / 1e9:.1f} GB/s; weights {weights / 1e6:.0f} MB; context {shape.context}"
    )
    for case, (method, target) in cases.items():
        progress(case)
        cache, facts = shape.ledger(), dict[str, Any]()
        times = paired(lambda: step(model, cache, method, facts), lambda: step(model, base_cache, None, {}))  # noqa: B023
        read = statistics.median(facts["reads"][1:])  # the first step is not timed
        note = f"reads {read / 1e6:.0f} MB of keys and values, {speed / 1e9:.1f} GB/s"
        rows.append(row(case, times, (read + weights) / speed, target, note))
        del cache
        gc.collect()
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
        times = paired(lambda: step(model, cache, method, {}), lambda: native_step(model, native_cache))  # noqa: B023
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
