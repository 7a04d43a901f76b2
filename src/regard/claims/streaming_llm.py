"""StreamingLLM on the shipped model: 20 times its trained length, with sinks and without."""

import statistics
import time

import torch

from regard import catalog
from regard.claims._lm import shipped, stream
from regard.core import Claim, Measured
from regard.models.attach import attach

TRAINED = 2048  # T
CACHE = 1024  # tokens held: sinks and window together
CHUNK = 32  # tokens fed at once; each sees the cache as it was after the last chunk
LENGTHS = 20


def dense(ids: torch.Tensor) -> float:
    """Mean negative log-likelihood under full attention, in pieces of the trained length."""
    model, losses = shipped().model, []
    for piece in ids[1:].split(TRAINED - 1):
        with torch.inference_mode():
            losses.append(nll(model(torch.cat([ids[:1], piece])[None]).logits[0, :-1], piece))
    return float(torch.cat(losses).mean())


def nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


def streamed(ids: torch.Tensor, sinks: int) -> tuple[float, float, float]:
    """(nll over the stream, ms per token early, ms per token late) with `sinks` sinks and the rest a window."""
    method = catalog.method("streaming_llm", sinks=sinks, window=CACHE - sinks)
    losses, cache, early = [], None, 0.0
    with torch.inference_mode(), attach(shipped().model, method):
        for start in range(0, len(ids) - 1, CHUNK):
            piece = ids[start : start + CHUNK]
            out = shipped().model(piece[None], past_key_values=cache, use_cache=True)
            cache, target = out.past_key_values, ids[start + 1 : start + CHUNK + 1]
            losses.append(nll(out.logits[0, : len(target)], target))
            if start + CHUNK == 2 * CACHE:
                early = pace(cache, ids)
        late = pace(cache, ids)
    return float(torch.cat(losses).mean()), early, late


def pace(cache, ids: torch.Tensor, steps: int = 60) -> float:
    """Milliseconds of one token, the median of some steps."""
    took = []
    for t in range(steps):
        start = time.perf_counter()
        shipped().model(ids[None, t + 1 : t + 2], past_key_values=cache, use_cache=True)
        took.append(time.perf_counter() - start)
    return 1e3 * statistics.median(took)


def measure() -> Measured:
    ids = stream(LENGTHS * TRAINED)
    within = dense(ids)
    sinks, early, late = streamed(ids, 4)
    window, _, _ = streamed(ids, 0)
    ppl = {
        k: float(torch.tensor(v).exp()) for k, v in (("dense", within), ("sinks", sinks), ("window", window))
    }
    flat = late / early
    holds = (
        ppl["sinks"] <= 1.15 * ppl["dense"] and ppl["window"] >= 1.5 * ppl["sinks"] and 1 / 1.2 <= flat <= 1.2
    )
    return Measured(
        holds,
        {
            "tokens": len(ids),
            "cache": CACHE,
            "ppl_dense_within_T": ppl["dense"],
            "ppl_sinks": ppl["sinks"],
            "ppl_window": ppl["window"],
            "sinks_over_dense": ppl["sinks"] / ppl["dense"],
            "window_over_sinks": ppl["window"] / ppl["sinks"],
            "ms_late_over_early": flat,
        },
    )


CLAIM = Claim(
    name="streaming_llm",
    statement="Streaming far past the trained length, sinks and window keep perplexity at the in-window level with "
    "constant time per token; the window alone, once it drops the first token, does not.",
    bound="over 20 T tokens: ppl(sinks) <= 1.15 ppl(dense within T); ppl(window) >= 1.5 ppl(sinks); "
    "ms per token flat within 20 %",
    measure=measure,
)
