"""What this machine multiplies well: the dtype in which products of tensors are taken, asked of the machine once.

A CPU without units for bfloat16 multiplies it a hundredth as fast as float32, and most do so with float16; bfloat16 on
units of its own is several times faster. No name or flag tells which is which on every machine, so a few small products
are timed, once per process and dtype, when products of that dtype are first asked for. A GPU is not asked: its products
stay in their dtype, as float32, float64 and all that is no product stay everywhere.

REGARD_CPU_PRODUCTS=float32 or native forces the answer for a process, `products_in` for a block.
"""

import ctypes
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import require

LOW = (torch.bfloat16, torch.float16)
VARIABLE, ANSWERS = "REGARD_CPU_PRODUCTS", ("float32", "native")
# batches of 64 x 64 products: few tell a rate that is far below float32's, many one that is near it
FEW, MANY, SIZE = 2, 16, 64
FAR = 0.25
PATIENCE = 1.5e-3  # seconds of repetitions, of which there are two at least
# time in which a busy machine does other work is no product's, where the system counts finely enough to leave it out
TICK = time.thread_time if time.get_clock_info("thread_time").resolution <= 1e-6 else time.perf_counter
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimdhp", "bf16", "sve")

FORCED: ContextVar[str | None] = ContextVar("FORCED", default=None)
RATES: dict[torch.dtype, float] = {}
LOCK = threading.Lock()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are fastest here: its own, or float32 for what the CPU does not multiply."""
    return product_dtype_of(x.dtype, x.device.type)


def product_dtype_of(dtype: torch.dtype, device: str) -> torch.dtype:
    """The same by dtype and type of device."""
    wide = dtype in LOW and device == "cpu" and not multiplies(dtype)
    return torch.float32 if wide else dtype


def for_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, each in the dtype in which its products are fastest."""
    return tuple(t.to(product_dtype(t)) for t in tensors)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype in which products are fastest; that is the result's too."""
    a, b = for_products(a, b)
    return a @ b


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies this dtype at least as fast as float32, or is said to."""
    # torch.compile takes the answer as a constant: it is asked for while a graph is traced, and never inside one
    answer = FORCED.get() or asked_for()
    return answer == "native" if answer else rate(dtype) >= 1


# what torch.compiler.assume_constant_result sets, without importing the compiler
multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined]


def asked_for() -> str | None:
    """What the environment variable says; ValueError if it is neither of the two."""
    answer = os.environ.get(VARIABLE)
    require(answer is None or answer in ANSWERS, f"{VARIABLE} is one of {ANSWERS}", value=answer)
    return answer


@contextmanager
def products_in(answer: torch.dtype | str) -> Iterator[None]:
    """Products of low precision on a CPU are in float32, or with "native" in their dtype, whatever the machine.

    In this thread. A graph that torch.compile traced before stays as it was traced.
    """
    answer = "float32" if answer == torch.float32 else answer
    require(answer in ANSWERS, f"products are in one of {ANSWERS}", value=answer)
    token = FORCED.set(str(answer))
    try:
        yield
    finally:
        FORCED.reset(token)


def rate(dtype: torch.dtype) -> float:
    """Products per second of this dtype over those of float32, on one core: measured once in a process."""
    with LOCK:
        if dtype not in RATES:
            RATES[dtype] = apart(lambda: measured(dtype))
    return RATES[dtype]


def apart(work: Callable[[], float]) -> float:
    """work() in a thread of its own: no autocast, no transform, no mode of torch's that is on here is on there."""
    found: list[float | BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # raised again where it was asked for
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def measured(dtype: torch.dtype) -> float:
    """The rate of small products, on one core: others may be busy, and waiting for them is no product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        few = least(torch.float32, FEW) / least(dtype, FEW)
        return few if few < FAR else least(torch.float32, MANY) / least(dtype, MANY)
    finally:
        torch.set_num_threads(threads)


def least(dtype: torch.dtype, batch: int) -> float:
    """The least seconds of some runs of one batch of products; the first, which prepares it, does not count."""
    a = torch.ones(batch, SIZE, SIZE, dtype=dtype)
    torch.bmm(a, a)
    runs: list[float] = []
    while len(runs) < 2 or sum(runs) < PATIENCE:
        start = TICK()
        torch.bmm(a, a)
        runs.append(TICK() - start)
    return min(runs)


def resident(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at its height. Linux only: FileNotFoundError elsewhere."""
    kilobytes = re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes[0])


def trim_memory() -> None:
    """What was freed goes back to the system where the C library can give it (glibc); else it stays resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@cache
def cpu_name() -> str:
    """The model name of the CPU, as the system tells it."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        lines = (line.partition(":") for line in told.read_text().splitlines())
        names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
        if names:
            return names[0]
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Of the instruction sets that matter to products, those that the CPU has; empty where the system does not tell."""
    told = Path("/proc/cpuinfo")
    words = told.read_text().split() if told.exists() else []
    return [flag for flag in FLAGS if flag in set(words)]


def cpu_facts() -> dict[str, Any]:
    """The CPU's name, whether it multiplies bfloat16, at which rate of float32's, and what torch and it can do."""
    return {
        "cpu": cpu_name(),
        "multiplies_bf16": multiplies(torch.bfloat16),
        "bf16_rate": round(rate(torch.bfloat16), 3),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "flags": cpu_flags(),
    }


def slow_on_cpu(model_dtype: torch.dtype, device: str | torch.device) -> str | None:
    """What to say of a model of this dtype on this device: that its products are slow; None where they are not."""
    if model_dtype not in LOW or torch.device(device).type != "cpu" or multiplies(model_dtype):
        return None
    name = str(model_dtype).removeprefix("torch.")
    return (
        f"{name} products run at {rate(model_dtype):.2g} of float32's rate on this CPU ({cpu_name()}); "
        "compare --dtype float32 loads the model in float32"
    )
