"""`regard bench sparse`: attention that leaves keys unread, against causal SDPA, side by side in one process.

Rows are those of the other benchmarks; `ratio` says what the case says: times faster than SDPA, or the exponent with
which time or memory grows with the length. Batch 1, 8 heads of width 64, all cores that torch uses; in float32, and in
bfloat16 where the CPU multiplies it. The baseline of bfloat16 is SDPA in the dtype in which it is faster.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import catalog
from regard.api import attend
from regard.attaching.attachment import attach
from regard.bench.efficiency import bytes_held
from regard.bench.timing import OUT, least, left, paired, row, seconds, unmeasured
from regard.core import Method
from regard.core.mask import causal, window
from regard.kinds.mechanism import run
from regard.models.shipped import load_shipped
from regard.ops.blocks import BlockSettings
from regard.ops.machine import multiplies

GROWTH = {"hip_attention": 1.25, "hyperattention": 1.25, "superlinear_attention": 1.6}


@dataclass(frozen=True)
class Sizes:
    long: int = 16_384
    short: int = 4_096
    longest: int = 32_768
    prompt: int = 2_048
    window: int = 256
    sparsity: float = 0.9
    heads: int = 8
    width: int = 64
    repeats: int = 3

    def qkv(self, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(1, self.heads, n, self.width).to(dtype) for _ in range(3)]


QUICK = Sizes(1_024, 512, 2_048, 256, 64, 0.9, 2, 64, 1)


def rows(quick: bool = False, progress: Callable[[str], None] | None = None) -> list[dict]:
    """Everything that this benchmark measures. Say what is being measured through `progress`."""
    sizes, progress = QUICK if quick else Sizes(), progress or (lambda text: None)
    results: list[dict] = []
    with torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        for part in (windows, compiled, trained, chosen, growth, attached):
            for one in part(sizes):
                results.append(one)
                progress(f"{one['case']}: {one['ratio']:.2f} (target {one['target']:g}) {one['note']}")
            gc.collect()
    return results


def dtypes() -> dict[str, torch.dtype]:
    """float32, and bfloat16 where this CPU has products of it."""
    found = {"float32": torch.float32}
    return found | {"bfloat16": torch.bfloat16} if multiplies(torch.bfloat16) else found


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def baseline(qkv: list[Tensor]) -> Callable[[], float]:
    """Seconds of causal SDPA, in this dtype or in float32 if that is faster."""
    wide = [t.float() for t in qkv]
    if left() <= 0:
        return lambda: math.nan
    low, high = (seconds(lambda t=t: sdpa(*t)) for t in (qkv, wide))
    best = qkv if low <= high else wide
    return lambda: seconds(lambda: sdpa(*best))


def windows(sizes: Sizes) -> Iterator[dict]:
    method = catalog.method("window", window=sizes.window)
    for name, dtype in dtypes().items():
        qkv = sizes.qkv(sizes.long, dtype)
        ours = lambda: seconds(lambda: attend(*qkv, "softmax", mask=method))  # noqa: B023, E731
        times = paired(ours, baseline(qkv), sizes.repeats)
        yield row(f"window of {sizes.window}, {sizes.long:,} tokens, {name}, over SDPA", times, None, 12.0)


def compiled(sizes: Sizes) -> Iterator[dict]:
    """FlexAttention compiled, with the block mask of the same window."""
    from torch._inductor.exc import InductorError
    from torch.nn.attention.flex_attention import flex_attention

    case = f"window of {sizes.window}, {sizes.long:,} tokens, float32, over compiled FlexAttention"
    if left() <= 0:
        yield row(case, unmeasured(), None, 1.5)
        return
    qkv = sizes.qkv(sizes.long)
    method = catalog.method("window", window=sizes.window)
    mask = (causal() & window(sizes.window)).block_mask(sizes.long)
    flex = torch.compile(flex_attention)
    try:
        flex(*qkv, block_mask=mask)
    except (InductorError, RuntimeError) as error:
        none = dict(ratio=math.nan, spread=0.0, ms=0.0, baseline_ms=0.0)
        yield row(case, none, None, 1.5, f"not measured: {type(error).__name__}: no compiler?") | {
            "holds": True
        }
        return
    ours = lambda: seconds(lambda: attend(*qkv, "softmax", mask=method))  # noqa: E731
    yield row(
        case, paired(ours, lambda: seconds(lambda: flex(*qkv, block_mask=mask)), sizes.repeats), None, 1.5
    )


def trained(sizes: Sizes) -> Iterator[dict]:
    """Forward and backward of the window, against SDPA with the dense mask."""
    qkv = [t.requires_grad_() for t in sizes.qkv(sizes.long)]
    gradient = torch.randn_like(qkv[2])
    method = catalog.method("window", window=sizes.window)
    mask = (causal() & window(sizes.window)).dense(sizes.long)

    def both(path: Callable[[], Tensor]) -> float:
        with torch.enable_grad():
            return seconds(lambda: torch.autograd.grad(path(), qkv, gradient))

    ours = lambda: both(lambda: attend(*qkv, "softmax", mask=method).out)  # noqa: E731
    theirs = lambda: both(lambda: F.scaled_dot_product_attention(*qkv, attn_mask=mask))  # noqa: E731
    case = f"window of {sizes.window}, {sizes.long:,} tokens, float32, forward and backward, over SDPA with the mask"
    yield row(case, paired(ours, theirs, 1), None, 8.0)


def chosen(sizes: Sizes) -> Iterator[dict]:
    """Blocks that the data chooses, the choice included."""
    for n, target in ((sizes.long, 4.0), (sizes.short, 0.9)):
        method = catalog.method("block_topk", top_k=blocks_left(n, sizes.sparsity))
        for name, dtype in dtypes().items():
            qkv = sizes.qkv(n, dtype)
            ours = lambda: seconds(lambda: attend(*qkv, method))  # noqa: B023, E731
            case = f"block_topk at {sizes.sparsity:.0%} sparsity, {n:,} tokens, {name}, over SDPA"
            yield row(case, paired(ours, baseline(qkv), sizes.repeats), None, target)


def blocks_left(n: int, sparsity: float, block: int = 64) -> int:
    """How many blocks a query reads, where half of n tokens lie before one on average.

    >>> blocks_left(16_384, 0.9), blocks_left(512, 0.9)
    (13, 1)
    """
    return max(1, round((1 - sparsity) * n / block / 2))


def growth(sizes: Sizes) -> Iterator[dict]:
    """With which power of the length time and memory grow; memory of every page that reads a few keys of many."""
    for name, most in GROWTH.items():
        if name in catalog.pages():
            times = [
                least(partial(work, catalog.method(name), sizes.qkv(n)), sizes.repeats)
                for n in (sizes.short, sizes.longest)
            ]
            power = math.log(times[1] / times[0]) / math.log(sizes.longest / sizes.short)
            yield at_most(
                f"{name}: power of the length in time, {sizes.short:,} to {sizes.longest:,}", power, most
            )
    for name in sparse_pages():
        case = f"{name}: power of the length in memory"
        if left() <= 0:
            yield at_most(case, math.nan, 1.1)
            continue
        held = [
            bytes_held(lambda n=n, name=name: work(catalog.method(name), sizes.qkv(n)))
            for n in (sizes.short, sizes.long)
        ]
        power = math.log(held[1] / held[0]) / math.log(sizes.long / sizes.short)
        yield at_most(case, power, 1.1, f"{held[1] / 1e6:.0f} MB at {sizes.long:,}")


def sparse_pages() -> list[str]:
    """Mechanisms that choose blocks and learn nothing."""
    names = catalog.list_methods(kind="mechanism", pattern="causal_self")
    pages: dict[str, Any] = {name: catalog.get(name) for name in names}
    return [
        name for name, page in pages.items() if isinstance(page.config(), BlockSettings) and page.init is None
    ]


def work(method: Method, qkv: list[Tensor]) -> Any:
    """The output of a page with the parameters that it begins with."""
    q, k, v = qkv
    dims = {"heads": q.shape[1], "kv_heads": k.shape[1], "key": k.shape[3], "value": v.shape[3], "width": 1}
    params = method.page.init(method.config, dims) if method.page.init is not None else {}
    return run(method, q, k, v, params=params)[0]


def at_most(case: str, value: float, most: float, note: str = "") -> dict:
    """A row whose value is to be small."""
    none = dict(spread=0.0, ms=0.0, baseline_ms=0.0, of_bound=None)
    return {
        "case": case,
        "ratio": value,
        **none,
        "target": most,
        "holds": value <= most,
        "note": f"at most. {OUT if math.isnan(value) else note}",
    }


def attached(sizes: Sizes) -> Iterator[dict]:
    """What an attached mask costs that hides nothing, and what sparse prefill saves, on the shipped model."""
    model, _ = load_shipped()
    prompt = torch.randint(3, 200, (1, sizes.prompt))

    def prefill(method: Any) -> float:
        if method is None:
            return seconds(lambda: model(prompt, use_cache=True, logits_to_keep=1))
        with attach(model, method):
            return seconds(lambda: model(prompt, use_cache=True, logits_to_keep=1))

    wide = catalog.method("window", window=2**40)
    times = paired(lambda: prefill(wide), lambda: prefill(None), 2 * sizes.repeats)
    case = f"attached mask that hides nothing, prefill of {sizes.prompt:,}, over native"
    yield row(case, times, None, 1 / 1.15)
