"""Linear attention with decay on a GPU: the causal scan of ops/chunk, forward and backward, on Triton's kernels.

`triton_scan` is what is called. ops/triton_kernels.py has the kernels, and says what they compute; here shapes, grids,
blocks and precision are chosen, and gradients tied to outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.core import require
from regard.ops.triton_kernels import (
    CHANNEL,
    INTERPRETED,
    NONE,
    SCALAR,
    SUB,
    borders_kernel,
    gradients_kernel,
    inside_kernel,
    outputs_kernel,
    weights_kernel,
)


class Scan(torch.autograd.Function):
    """(out, state after the last token) of contiguous inputs, gates [B, H, N] or [B, H, N, D]."""

    @staticmethod
    def forward(ctx, q, k, v, g, state, chunk):
        run = Launch(q, k, v, g, chunk)
        with torch.cuda.device_of(q):
            borders = run.borders(k, v, state, backward=False)
            out = run.outputs(q, k, v, borders, run.weights(q, k), torch.float32, backward=False)
        ctx.save_for_backward(q, k, v, g, state)
        ctx.chunk = chunk
        return out, borders[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dend):
        """The states are made again: kept, they would be as large as the output, or larger."""
        q, k, v, g, state = ctx.saved_tensors
        run = Launch(q, k, v, g, ctx.chunk)
        dout = dout.contiguous()
        with torch.cuda.device_of(q):
            dborders = run.borders(q, dout, dend.contiguous(), backward=True)
            dv = run.outputs(k, q, dout, dborders, run.weights(q, k), v.dtype, backward=True)
            borders = run.borders(k, v, state, backward=False)
            dq, dk, dg = run.gradients(q, k, v, dout, borders, dborders)
        return dq, dk, dv, dg, dborders[:, :, 0].clone(), None


class Launch:
    """The kernels for inputs of these shapes: grids, blocks and precision chosen once."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, chunk: int) -> None:
        self.batch, self.heads, self.n, self.d = k.shape
        self.e, self.chunk, self.count = v.shape[3], chunk, triton.cdiv(self.n, chunk)
        # without gates their pointer is not read: any will do
        self.gates, self.kind = q, NONE.value
        if g is not None:
            self.kind = SCALAR.value if g.dim() == 3 else CHANNEL.value
            missing = self.count * chunk - self.n
            g = torch.nn.functional.pad(g, (*(0, 0) * (g.dim() - 3), 0, missing))
            self.gates = g.unflatten(2, (self.count, chunk)).cumsum(3)
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        self.low = {
            "LOW": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        }
        # without tensor cores the operands of a product are held in registers
        self.block = 32 if dtype == torch.float32 else 64

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.batch, self.heads, *shape, dtype=dtype, device=self.gates.device)

    def sizes(self, **more: int | bool) -> dict:
        shapes = {"N": self.n, "NC": self.count, "D": self.d, "E": self.e, "C": self.chunk, "KIND": self.kind}
        return {**shapes, **self.low, **more}

    def borders(self, x: Tensor, z: Tensor, start: Tensor, backward: bool) -> Tensor:
        borders = self.empty(self.count + 1, self.d, self.e)
        bd, be = block(self.d, self.block), block(self.e, self.block)
        grid = (self.batch * self.heads, triton.cdiv(self.d, bd), triton.cdiv(self.e, be))
        sizes = self.sizes(BD=bd, BE=be, BACKWARD=backward)
        borders_kernel[grid](x, z, self.gates, start, borders, **sizes)
        return borders

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        if self.kind != CHANNEL.value:
            # the pointer is not read
            return q
        weights = self.empty(self.count, self.chunk, self.chunk)
        grid = (self.batch * self.heads * self.count, self.chunk // SUB.value)
        weights_kernel[grid](q, k, self.gates, weights, **self.sizes(BD=block(self.d, 32)))
        return weights

    def outputs(self, x, y, z, borders: Tensor, weights: Tensor, dtype: torch.dtype, backward: bool):
        out, be = self.empty(self.n, self.e, dtype=dtype), block(self.e, self.block)
        grid = (self.batch * self.heads * self.count, triton.cdiv(self.e, be))
        sizes = self.sizes(BD=block(self.d, self.block), BE=be, BACKWARD=backward)
        outputs_kernel[grid](x, y, z, self.gates, borders, weights, out, **sizes)
        return out

    def gradients(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, borders: Tensor, dborders: Tensor):
        dq, dk, dg = torch.empty_like(q), torch.empty_like(k), None
        bd, be = block(self.d, 32), block(self.e, self.block)
        programs, blocks = self.batch * self.heads * self.count, triton.cdiv(self.d, bd)
        # where gates are not per channel the pointers `inside` are not read
        sizes, inside = self.sizes(BD=bd, BE=be), (dq, dk)
        if self.kind == CHANNEL.value:
            inside, dg = (self.empty(self.n, self.d), self.empty(self.n, self.d)), self.empty(self.n, self.d)
            grid = (programs, self.chunk // SUB.value, blocks)
            inside_kernel[grid](q, k, v, do, self.gates, *inside, **sizes)
        elif self.kind == SCALAR.value:
            dg = q.new_empty(blocks, self.batch, self.heads, self.n, dtype=torch.float32)
        arrays = (q, k, v, do, self.gates, borders, dborders, *inside, dq, dk, q if dg is None else dg)
        gradients_kernel[(programs, blocks)](*arrays, **sizes)
        return dq, dk, dg.sum(0) if dg is not None and self.kind == SCALAR.value else dg


def block(width: int, most: int) -> int:
    """The power of two that holds `width`, from 16 to `most`."""
    return min(max(triton.next_power_of_2(width), 16), most)


def triton_scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """(out [B, H, N, E], state [B, H, D, E]), both float32, of q, k [B, H, N, D] and v [B, H, N, E].

    g is None, [H], or broadcasts to [B, H, N] or [B, H, N, D]; it is finite and <= 0. Inputs are float32, bfloat16 or
    float16, on a GPU (or anywhere in Triton's interpreter). `chunk` changes the speed, never the result.
    """
    b, h, n, d = k.shape
    require(q.is_cuda or INTERPRETED, "Triton's kernels run on a GPU", device=q.device)
    fit = q.shape == k.shape and v.shape[:3] == k.shape[:3]
    require(fit, "q, k [B, H, N, D], v [B, H, N, E]", q=q, k=k, v=v)
    require(n > 0, "at least one token", k=k)
    require(chunk in (16, 32, 64, 128), "chunk is 16, 32, 64 or 128", chunk=chunk)
    narrow = all(t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in (q, k, v))
    require(narrow, "Triton's kernels take float32, bfloat16 or float16", q=q, k=k, v=v)
    if g is not None:
        g = g[None, :, None].expand(b, h, n) if g.dim() == 1 else g
        g = g.float().expand(b, h, n, *((d,) if g.dim() == 4 else ())).contiguous()
    shape = (b, h, d, v.shape[3])
    state = k.new_zeros(shape, dtype=torch.float32) if state is None else state.float().expand(shape)
    return Scan.apply(*(t.contiguous() for t in (q, k, v)), g, state.contiguous(), chunk)
