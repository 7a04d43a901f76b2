"""What the causal scan of linear attention runs on: torch anywhere, Triton's kernels on a GPU where there are any.

"auto" takes the kernels for CUDA tensors of float32 or less when triton is installed, and torch for all else. What is
asked for by name is never replaced: "triton" raises where it cannot run.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from regard.core.errors import Unsupported
from regard.ops.chunk import chunked
from regard.ops.softmax import at_least_float32


@cache
def available() -> bool:
    return find_spec("triton") is not None


def on_triton(q: Tensor, backend: str = "auto") -> bool:
    """Whether a scan of these queries runs on Triton's kernels; Unsupported if they are asked for and are not there."""
    if backend == "triton" and not available():
        raise Unsupported("impl='triton', and triton is not installed: pip install triton")
    if backend == "auto":
        return q.is_cuda and q.dtype != torch.float64 and available()
    return backend == "triton"


def causal(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, *, chunk: int, normalise: bool = False,
    eps: float = 0.0, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, N, E] in v's dtype, state) of queries, keys and values of the same N tokens; g as in linear."""
    if not on_triton(q, backend):
        return chunked(q, k, v, g, state, chunk=chunk, normalise=normalise, eps=eps)
    from regard.ops.triton_linear import triton_scan

    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if normalise else v
    out, end = triton_scan(q, k, values, g, state, chunk=chunk if chunk in (16, 32, 64, 128) else 64)
    if normalise:
        total = at_least_float32(out[..., -1:]) + eps
        out = out[..., :-1] / total.masked_fill(total == 0, 1)
    return out.to(v.dtype), end
