"""StreamingLLM's claim: streams past the trained length, with sinks and without.

The claim speaks of models that have a sink. SmolLM2 has one as it comes: the bound is applied to the model itself, over
twice its trained length, since two cores read no 20 times 8,192 tokens in minutes. The shipped model has none: past the
first hundreds of tokens it puts next to nothing on token 0, so a window alone serves it as well (both numbers are
reported). So the experiment first gives a copy of it what the paper shows of Llama-2, most of the attention mass on the
first token in every layer: a short training on Python's help topics that rewards this mass beside the text loss. The
bound is applied to that copy.
"""

import copy
import pydoc_data.topics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import catalog
from regard.attaching.attachment import attach
from regard.claims.lab import generator, median_time
from regard.claims.shipped_lm import shipped, stream
from regard.core import Claim, Measured, Observer
from regard.train.loop import fit, linear_to

TRAINED = {"lm": 2048, "smollm2": 8192}  # T
LENGTHS = {"lm": 20, "smollm2": 2}
CHUNK = {"lm": 32, "smollm2": 128}  # tokens fed at once; each sees the cache as it was after the last chunk
CACHE = 1024  # tokens held: sinks and window together
LOOKED = 2048  # tokens in which the sink is looked for
SCORED = 512  # tokens of a piece whose logits are there at once
# of the training that teaches the sink
STEPS, ROWS, PIECE, RATE, REWARD = 200, 4, 256, 7e-4, 1.0


def taught() -> Any:
    """A copy of the shipped model that puts most of its attention on the first token."""
    bench = shipped()
    model = copy.deepcopy(bench.model)
    model.set_attn_implementation("eager")
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(bench.tokenizer(text, add_special_tokens=False)["input_ids"])
    draw = generator()

    def loss_at(step: int) -> Tensor:
        starts = torch.randint(len(ids) - PIECE, (ROWS,), generator=draw).tolist()
        batch = torch.stack([ids[i : i + PIECE] for i in starts])
        batch[:, 0] = bench.tokenizer.bos_token_id
        out = model(batch, labels=batch, output_attentions=True)
        mass = torch.stack([a[:, :, 8:, 0] for a in out.attentions])
        return out.loss - REWARD * (mass + 1e-3).log().mean()

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    fit(optimizer, loss_at, STEPS, schedule=linear_to(0.1, rise=10))
    optimizer.zero_grad()
    model.set_attn_implementation("sdpa")
    return model.eval()


def sink(model: Any, ids: Tensor) -> float:
    """Mean attention on token 0 of the queries after it, over layers and heads."""
    ids = ids[:LOOKED]
    with torch.inference_mode(), attach(model, Observer("received", name="received")) as attached:
        model(ids[None])
    records = attached.records["received"]
    return float(torch.stack([mass[0, :, 0] for _, _, mass in records]).mean()) / len(ids)


def nll(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, reduction="none")


@torch.inference_mode()
def dense(model: Any, ids: Tensor, trained: int) -> float:
    """Perplexity under full attention, in pieces of the trained length."""
    losses = []
    for piece in ids[1:].split(trained - 1):
        hidden = model.base_model(torch.cat([ids[:1], piece])[None], use_cache=False).last_hidden_state[
            0, :-1
        ]
        parts = zip(hidden.split(SCORED), piece.split(SCORED), strict=True)
        losses += [nll(model.lm_head(part), target) for part, target in parts]
    return float(torch.cat(losses).mean().exp())


def streamed(model: Any, ids: Tensor, sinks: int, chunk: int) -> tuple[float, float]:
    """(perplexity over the stream, ms per token at its end over ms when the cache had just filled)."""
    method = catalog.method("streaming_llm", sinks=sinks, window=CACHE - sinks)
    losses, cache, early = [], None, 0.0
    with torch.inference_mode(), attach(model, method):
        for start in range(0, len(ids) - 1, chunk):
            out = model(ids[None, start : start + chunk], past_key_values=cache, use_cache=True)
            cache, target = out.past_key_values, ids[start + 1 : start + chunk + 1]
            losses.append(nll(out.logits[0, : len(target)], target))
            if start + chunk == 2 * CACHE:
                early = pace(model, copy.deepcopy(cache), ids)
        late = pace(model, cache, ids)
    return float(torch.cat(losses).mean().exp()), late / early


def pace(model: Any, cache: Any, ids: Tensor, steps: int = 100) -> float:
    """Seconds of one token, the median of some steps."""

    def tokens() -> Iterator[None]:
        for t in range(steps):
            model(ids[None, t + 1 : t + 2], past_key_values=cache, use_cache=True)
            yield

    return median_time(partial(next, tokens()), steps, warm=0)


def compared(name: str, model: Any, ids: Tensor, on: str) -> dict[str, float]:
    """What the bound speaks of, of one model; `on` gives it the lengths."""
    within = dense(model, ids, TRAINED[on])
    (sinks, flat), (window, _) = (streamed(model, ids, count, CHUNK[on]) for count in (4, 0))
    return {
        f"{name}_mass_on_token_0": sink(model, ids),
        f"{name}_ppl_dense_within_T": within,
        f"{name}_ppl_sinks": sinks,
        f"{name}_ppl_window": window,
        f"{name}_sinks_over_dense": sinks / within,
        f"{name}_window_over_sinks": window / sinks,
        f"{name}_ms_late_over_early": flat,
    }


def measure(on: str) -> Measured:
    ids, numbers = stream(LENGTHS[on] * TRAINED[on], on), {}
    models: dict[str, Callable[[], Any]] = {"shipped": lambda: shipped().model, "taught": taught}
    if on != "lm":
        models = {"pretrained": lambda: shipped(on).model}
    for judged, model in models.items():
        numbers |= compared(judged, model(), ids, on)
    parts = {
        "sinks near dense": numbers[f"{judged}_sinks_over_dense"] <= 1.15,
        "the window alone is worse": numbers[f"{judged}_window_over_sinks"] >= 1.5,
        "time of a token": 1 / 1.2 <= numbers[f"{judged}_ms_late_over_early"] <= 1.2,
    }
    return Measured.by(parts, {"tokens": len(ids), "cache": CACHE, **numbers})


CLAIM = Claim(
    name="streaming_llm",
    statement="Streaming far past the trained length, a model with an attention sink keeps perplexity at the in-window "
    "level with constant time per token under sinks and window; under the window alone, once it drops the first token, "
    "it does not.",
    bound="over 20 T tokens, on SmolLM2 (T = 8,192) 2 T: ppl(sinks) <= 1.15 ppl(dense within T); "
    "ppl(window) >= 1.5 ppl(sinks); ms per token flat within 20 %",
    measure=measure,
    models=("lm", "smollm2"),
)
