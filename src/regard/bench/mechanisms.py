"""`regard bench mechanisms`: linear attention against causal SDPA and against the machine, side by side in one process.

Rows are those of the other benchmarks; `ratio` says what the case says: times faster than SDPA, a share of the bound,
one length's tokens per second over another's, or for every other linear mechanism Lightning Attention-2's time over its
own. Batch 1, heads of width 64, all cores that torch uses.

The bound is the larger of two times: the operations of the chunked algorithm (what is written to the state and read
from it, the causal half of a chunk of C tokens) at the rate of a large matrix product measured here, and its inputs and
outputs once at the bandwidth of a copy measured here.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import catalog
from regard.bench.timing import (
    copy_bandwidth,
    failed,
    fresh,
    left,
    paired,
    product_rate,
    row,
    seconds,
    typical,
    unmeasured,
)
from regard.core import Method
from regard.core.call import Call
from regard.core.deprecation import renamed
from regard.nn import RegardConfig, RegardForCausalLM
from regard.ops.machine import product_dtype, resident, trim_memory

LIGHTNING = "lightning_attention_2"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOWER = 1.2  # times its time in float32 that a page may take in bfloat16
SLOWER = 2.5  # times Lightning Attention-2's time: what another linear mechanism may take


@dataclass(frozen=True)
class Sizes:
    short: int = 4_096
    long: int = 16_384
    longest: int = 65_536
    others: int = 16_384  # tokens at which the other mechanisms are timed
    trained: int = 8_192
    steps: tuple[int, int] = (100, 100_000)
    heads: int = 8
    width: int = 64
    repeats: int = 3

    def qkv(self, n: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(1, self.heads, n, self.width).to(dtype) for _ in range(3)]


QUICK = Sizes(512, 1_024, 2_048, 512, 256, (10, 1_000), 2, 64, 2)


@renamed(told="progress")
def rows(quick: bool = False, progress: Callable[[str], None] | None = None) -> list[dict]:
    """Everything that this benchmark measures. Say what is being measured through `progress`."""
    sizes, progress = QUICK if quick else Sizes(), progress or (lambda text: None)
    parts = (forward, trained_operator, lower, share, flat, memory, decode, others, decoder, longest)
    results: list[dict] = []
    with torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        for part in parts:
            for one in part(sizes, progress):
                results.append(one)
                progress(f"{one['case']}: {one['ratio']:.2f} (target {one['target']:g}) {one['note']}")
            gc.collect()
    return results


def lightning(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    method = catalog.method(LIGHTNING)
    return method.page.fast(q, k, v, method.config, Call(initial_state=state))


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def forward(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    for (name, dtype), target in zip(DTYPES.items(), (20.0, 25.0)):
        qkv = sizes.qkv(sizes.long, dtype)
        ours, theirs = (
            lambda path=path, qkv=qkv: seconds(lambda: path(*qkv)) for path in (lightning, softmax)
        )
        times = paired(ours, theirs, sizes.repeats)
        yield row(f"forward, {sizes.long:,} tokens, {name}, over SDPA", times, None, target)


def longest(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    """SDPA takes half a minute here: it is timed once."""
    for name, dtype in DTYPES.items():
        qkv = sizes.qkv(sizes.longest, dtype)
        case = f"forward, {sizes.longest:,} tokens, {name}, over SDPA"
        shorter = sizes.qkv(sizes.longest // 4, dtype)
        takes = 16 * seconds(lambda: softmax(*shorter)) if left() > 0 else 0.0  # noqa: B023
        if takes > left():
            note = f"SDPA would take {takes:.0f} s, and {max(0.0, left()):.0f} s are left"
            yield row(case, unmeasured(), None, 60.0, note)
            continue
        mine = typical(lambda: lightning(*qkv), sizes.repeats)  # noqa: B023
        base = seconds(lambda: softmax(*qkv)) if mine > 0 else mine  # noqa: B023
        times = dict(ratio=base / mine, spread=0.0, ms=1e3 * mine, baseline_ms=1e3 * base)
        yield row(case, times, None, 60.0, "SDPA once")


def trained_operator(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    for (name, dtype), target in zip(DTYPES.items(), (15.0, 20.0)):
        qkv = [t.requires_grad_() for t in sizes.qkv(sizes.long, dtype)]
        gradient = torch.randn_like(qkv[2])

        def both(path: Callable, qkv: list[Tensor] = qkv, gradient: Tensor = gradient) -> float:
            for t in qkv:
                t.grad = None
            with torch.enable_grad():
                return seconds(lambda: path(*qkv).backward(gradient))

        times = paired(lambda: both(lambda *qkv: lightning(*qkv)[0]), lambda: both(softmax), 2)  # noqa: B023
        yield row(f"forward and backward, {sizes.long:,} tokens, {name}, over SDPA", times, None, target)


def lower(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    """bfloat16 against float32 on every page, the same numbers: no CPU is to make it the slower one."""
    for name, method, pattern in linear_pages():
        case = f"{name}, {pattern}, {sizes.others:,} tokens, bfloat16 over float32"
        progress(case)
        target = 1.0 if name == LIGHTNING else 1 / LOWER
        try:
            inputs, qkv = arguments(method, sizes), sizes.qkv(sizes.others, torch.float32)
            sides = [(halved(inputs), [t.bfloat16() for t in qkv]), (inputs, qkv)]
            low, wide = (
                lambda inputs=inputs, qkv=qkv: seconds(lambda: run(method, qkv, pattern, inputs))  # noqa: B023
                for inputs, qkv in sides
            )
            yield row(case, paired(low, wide, sizes.repeats), None, target)
        except Exception as error:  # a page that cannot is a row that says so
            yield failed(case, target, error)
        gc.collect()


def halved(inputs: dict) -> dict:
    """Parameters and the layer's input in bfloat16."""
    params = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs["params"].items()}
    return {"params": params, "x": None if inputs["x"] is None else inputs["x"].bfloat16()}


def linear_pages() -> Iterator[tuple[str, Method, str]]:
    """(name, method at its default settings, pattern: causal where it can be) of the linear family."""
    for name in catalog.list_methods(kind="mechanism"):
        method = catalog.method(name)
        pattern = "causal_self" if "causal_self" in method.page.patterns else "self"
        if ".mechanisms.linear." in catalog.pages()[name] and pattern in method.page.patterns:
            yield name, method, pattern


def share(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    chunk = catalog.method(LIGHTNING).config.chunk
    d, n = sizes.width, sizes.long
    for (name, dtype), target in zip(DTYPES.items(), (0.35, 0.5)):
        qkv = sizes.qkv(n, dtype)
        case = f"share of the bound, {n:,} tokens, {name}"
        if left() <= 0:
            yield row(case, unmeasured(), None, target)
            continue
        took, rate, speed = [], 0.0, 0.0
        lightning(*qkv)
        for _ in range(max(5, sizes.repeats)):
            rate, speed = max(rate, product_rate(product_dtype(qkv[0]))), max(speed, copy_bandwidth())
            took.append(seconds(lambda: lightning(*qkv)))  # noqa: B023
        operations = sizes.heads * n * (4 * d * d + 2 * chunk * d)
        bound = max(operations / rate, 4 * qkv[0].nbytes / speed)
        times = dict(
            ratio=bound / statistics.median(took), spread=0.0, ms=1e3 * statistics.median(took), baseline_ms=1e3 * bound
        )  # fmt: skip
        pages = f"new pages {1e3 * fresh(qkv[0].nbytes):.1f} ms"
        note = f"products at {rate / 1e9:.0f} GFLOP/s, copies at {speed / 1e9:.0f} GB/s; {pages}"
        result = row(case, times, None, target, note)
        yield {**result, "of_bound": times["ratio"]}


def flat(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    for name, dtype in DTYPES.items():
        speed = {}
        for n in (sizes.short, sizes.longest):
            qkv = sizes.qkv(n, dtype)
            repeats = 2 * sizes.repeats * (sizes.longest // n if n == sizes.short else 1)
            speed[n] = n / typical(lambda: lightning(*qkv), repeats)  # noqa: B023
        short, long = speed.values()
        times = dict(
            ratio=long / short,
            spread=0.0,
            ms=1e3 * sizes.longest / long,
            baseline_ms=1e3 * sizes.short / short,
        )
        note = f"{long / 1e3:,.0f} against {short / 1e3:,.0f} thousand tokens per second"
        yield row(
            f"tokens per second, {sizes.longest:,} over {sizes.short:,}, {name}", times, None, 0.9, note
        )


def memory(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    """Peak resident memory while it runs, less what came out: at the short length over the long one."""
    for name, dtype in DTYPES.items():
        case = f"memory beyond inputs and outputs, {sizes.short:,} over {sizes.longest:,}, {name}"
        peaks = [peak(sizes.qkv(n, dtype)) for n in (sizes.short, sizes.longest)]
        times = dict(ratio=0.0, spread=0.0, ms=0.0, baseline_ms=0.0)
        if any(p is None for p in peaks):
            yield row(case, times, None, 0.9, "not measured: it takes Linux's /proc")
            continue
        # below a MiB it is noise
        short, long = (max(p or 0, 1 << 20) for p in peaks)
        yield row(
            case, {**times, "ratio": short / long}, None, 0.9, f"{short / 1e6:.1f} and {long / 1e6:.1f} MB"
        )


def peak(qkv: list[Tensor]) -> int | None:
    """Bytes that one call needed at its height beyond its inputs and outputs."""
    # what libraries keep for ever is there
    lightning(*(t[:, :, :512] for t in qkv))
    gc.collect()
    try:
        # freed memory that is still resident would hide what is used
        trim_memory()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    start = resident("VmRSS")
    outputs = lightning(*qkv)
    return resident("VmHWM") - start - sum(t.nbytes for t in outputs)


def decode(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    """One token after a short and after a long text: the same state, the same time."""
    for name, dtype in DTYPES.items():
        states = [prefilled(sizes, n, dtype) for n in sizes.steps]
        qkv = sizes.qkv(1, dtype)
        few, many = (
            lambda state=state: seconds(lambda: [lightning(*qkv, state=state) for _ in range(100)])  # noqa: B023
            for state in states
        )
        times = paired(many, few, 3 * sizes.repeats)
        times = {**times, "ms": times["ms"] / 100, "baseline_ms": times["baseline_ms"] / 100}
        bytes_ = [s.nbytes for s in states]
        note = f"{1e3 * times['ms']:.0f} µs; state {bytes_[0]:,} and {bytes_[1]:,} bytes"
        result = row(
            f"decode step, after {sizes.steps[0]:,} over {sizes.steps[1]:,} tokens, {name}",
            times,
            None,
            0.9,
            note,
        )
        yield {**result, "holds": result["holds"] and bytes_[0] == bytes_[1]}


def prefilled(sizes: Sizes, tokens: int, dtype: torch.dtype, segment: int = 8_192) -> Tensor:
    _, state = lightning(*sizes.qkv(min(segment, tokens), dtype))
    for start in range(segment, tokens, segment):
        _, state = lightning(*sizes.qkv(min(segment, tokens - start), dtype), state=state)
    return state


def others(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    """Every other linear mechanism of the catalogue at its default settings, causal where it can be."""
    for name, method, pattern in linear_pages():
        if name == LIGHTNING:
            continue
        case = f"{name}, {pattern}, {sizes.others:,} tokens, Lightning Attention-2 over it"
        progress(case)
        try:
            inputs = arguments(method, sizes)
            qkv = sizes.qkv(sizes.others, torch.float32)
            times = paired(
                lambda: seconds(lambda: run(method, qkv, pattern, inputs)),  # noqa: B023
                lambda: seconds(lambda: lightning(*qkv)),  # noqa: B023
                2,
            )
            yield row(case, times, None, 1 / SLOWER)
        except Exception as error:  # a page that cannot is a row that says so
            yield failed(case, 1 / SLOWER, error)
        gc.collect()


def arguments(method: Method, sizes: Sizes) -> dict:
    """Parameters and the layer's input, where a page wants them."""
    page, width = method.page, sizes.heads * sizes.width
    dims = {
        "heads": sizes.heads,
        "kv_heads": sizes.heads,
        "key": sizes.width,
        "value": sizes.width,
        "width": width,
    }
    params = page.init(method.config, dims) if page.init else None
    return {
        "params": params or {},
        "x": torch.randn(1, sizes.others, width) if page.reads_x(method.config) else None,
    }


def run(method: Method, qkv: list[Tensor], pattern: str, inputs: dict) -> Any:
    return (method.page.fast or method.page.reference)(*qkv, method.config, Call(pattern, **inputs))


def decoder(sizes: Sizes, progress: Callable) -> Iterator[dict]:
    """A step of training, forward and backward, of four layers of width 256 and four heads."""
    tokens = torch.randint(512, (1, sizes.trained))
    models = {}
    for name in (LIGHTNING, "softmax"):
        config = RegardConfig(
            vocab_size=512,
            hidden_size=4 * sizes.width,
            num_hidden_layers=4,
            num_attention_heads=4,
            mechanisms=name,
        )
        models[name] = RegardForCausalLM(config).train()

    def step(name: str) -> float:
        models[name].zero_grad()
        with torch.enable_grad():
            return seconds(lambda: models[name](tokens, labels=tokens, use_cache=False).loss.backward())

    times = paired(lambda: step(LIGHTNING), lambda: step("softmax"), 2)
    per = [sizes.trained / times[side] for side in ("ms", "baseline_ms")]
    note = f"{per[0]:.1f} against {per[1]:.1f} thousand tokens per second"
    yield row(
        f"training a decoder of 4 layers, {sizes.trained:,} tokens, over softmax", times, None, 3.0, note
    )
