"""Run by test_triton.py in a process of its own, since TRITON_INTERPRET must be set before triton is imported.

python triton_cases.py KIND          the kernels against dense_linear in float64: on the GPU if there is one, else in
                                     the interpreter, whose bfloat16 is cut off, not rounded: twice a GPU's error
python triton_cases.py compile ARCH  every launch of forward and backward compiled for that NVIDIA architecture
"""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "compile" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from regard.ops import triton_linear  # noqa: E402
from regard.ops.linear import dense_linear  # noqa: E402
from regard.ops.triton_linear import triton_scan  # noqa: E402

LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = {"none": None, "fixed": "H", "token": "BHN", "channel": "BHND"}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# length, key width, value width, with a state, share of gates at -50, dtype, chunk
CASES = (
    (1, 16, 16, True, 0, F32, 64),
    (7, 20, 16, False, 0, F32, 64),
    (64, 16, 20, True, 0, F32, 64),
    (65, 20, 20, True, 0.3, F32, 64),
    (130, 16, 20, False, 0, F32, 128),
    (130, 20, 16, True, 0.05, F32, 32),
    (7, 16, 16, True, 1, F32, 64),
    (20, 40, 36, True, 0, F32, 16),
    (7, 20, 16, False, 0, BF16, 64),
    (65, 20, 16, True, 0.3, BF16, 64),
    (130, 16, 20, True, 0, BF16, 64),
    (17, 36, 20, False, 0, BF16, 16),
    (65, 16, 20, True, 0.1, F16, 64),
)


def inputs(kind, n, d, e, carried, strong, dtype):
    """q, k, v, g, state and the weights of out and of the end state in the loss."""
    b, h, maker = 2 if n < 20 else 1, 2, torch.Generator().manual_seed(n)
    sizes = {"B": b, "H": h, "N": n, "D": d}
    q, k = (torch.randn(b, h, n, d, generator=maker).div(d**0.25).to(dtype) for _ in range(2))
    v = torch.randn(b, h, n, e, generator=maker).to(dtype)
    g = None
    if SHAPES[kind]:
        shape = [sizes[axis] for axis in SHAPES[kind]]
        g = torch.nn.functional.logsigmoid(torch.randn(shape, generator=maker) + 1)
        g = torch.where(torch.rand(shape, generator=maker) < strong, -50.0, g)
    state = torch.randn(b, h, d, e, generator=maker) if carried else None
    weights = torch.randn(b, h, n, e, generator=maker), torch.randn(b, h, d, e, generator=maker)
    return (q, k, v, g, state), weights


def results(scan, tensors, weights, device, dtype=None):
    """{name: out, end, and the gradient of every input}, in float64."""
    tensors = [None if t is None else t.to(device, dtype or t.dtype).requires_grad_() for t in tensors]
    out, end = scan(*tensors)
    (out * weights[0].to(out)).sum().add((end * weights[1].to(end)).sum()).backward()
    named = {"out": out, "end": end} | {
        name: t.grad for name, t in zip(["q", "k", "v", "g", "state"], tensors, strict=True) if t is not None
    }
    return {name: t.detach().double().cpu() for name, t in named.items()}


def dense(q, k, v, g, state):
    return dense_linear(q, k, v, g, state=state)


def compare(kind):
    bad = []
    for n, d, e, carried, strong, dtype, chunk in CASES[:: 3 if kind == "fixed" else 1]:
        tensors, weights = inputs(kind, n, d, e, carried, strong, dtype)
        want = results(dense, tensors, weights, "cpu", torch.float64)
        got = results(lambda *a, c=chunk: triton_scan(*a, chunk=c), tensors, weights, DEVICE)
        # where all gates are at -50 their gradient is of the size of float64's rounding: there, an absolute error
        off = {
            name: ((got[name] - w).abs().max() / w.abs().max().clamp(min=1e-3)).item()
            for name, w in want.items()
        }
        errors = " ".join(f"{name} {x:.1e}" for name, x in off.items())
        worse = [name for name, x in off.items() if not x <= LIMITS[dtype]]
        print(
            f"{kind} {dtype} n={n} d={d} e={e} state={carried} strong={strong} chunk={chunk}: {errors}",
            *worse,
        )
        bad += worse
    assert not bad, bad


def calls(kind):
    """What the comparison does not ask: broadcast gates, two dtypes, one output used, far numbers, refusals."""
    (q, k, v, g, state), _ = inputs(kind, 7, 16, 16, True, 0, F32)
    q, k, v, state = (t.to(DEVICE) for t in (q, k, v, state))
    g = None if g is None else g.to(DEVICE)
    if kind in ("token", "channel"):
        one = g[:1].clone().requires_grad_()
        many = g[:1].expand_as(g).clone().requires_grad_()
        outs = [triton_scan(q, k, v, gates, state)[0] for gates in (one, many)]
        torch.testing.assert_close(*outs, rtol=0, atol=0)
        for out in outs:
            out.square().sum().backward()
        torch.testing.assert_close(one.grad[0], many.grad.sum(0))
    mixed = triton_scan(q, k, v.bfloat16().requires_grad_(), g, state)[0]
    assert mixed.dtype == F32
    torch.testing.assert_close(mixed, triton_scan(q, k, v.bfloat16().float(), g, state)[0], rtol=0, atol=1e-5)
    alone = v.clone().requires_grad_()
    triton_scan(q, k, alone, g, state)[1].sum().backward()  # no gradient comes through out
    assert alone.grad.abs().sum() > 0
    for dtype in (F32, BF16):
        far = [(100 * t).to(dtype).requires_grad_() for t in (q, k, v)]
        out, end = triton_scan(*far, None if g is None else g.clamp(min=-1) * 60)
        (out.sum() + end.sum()).backward()
        assert all(t.isfinite().all() for t in (out, end, *(t.grad for t in far)))
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        triton_scan(q.double(), k, v)
    with pytest.raises(ValueError, match="chunk is"):
        triton_scan(q, k, v, chunk=48)
    with pytest.raises(ValueError, match="q, k"):
        triton_scan(q[:, :, :3], k, v, g)


class Compiled:
    """In a kernel's place: what would be launched is compiled, and its shared memory must fit the smaller cards."""

    def __init__(self, kernel, arch):
        self.fn, self.arch = kernel.fn, arch

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **sizes):
        arguments = dict(zip(self.fn.arg_names, args)) | sizes
        types = {F32: "*fp32", F16: "*fp16", BF16: "*bf16", int: "i32"}
        signature = {
            p.name: "constexpr" if p.is_constexpr else types[getattr(arguments[p.name], "dtype", int)]
            for p in self.fn.params
        }
        fixed = {p.name: arguments[p.name] for p in self.fn.params if p.is_constexpr}
        source = ASTSource(self.fn, signature, constexprs=fixed)
        options = {"num_warps": 8, "num_stages": 3}
        shared = triton.compile(
            source, target=GPUTarget("cuda", self.arch, 32), options=options
        ).metadata.shared
        print(self.fn.__name__, signature["N"], fixed, "shared", shared)
        assert shared <= 99 * 1024


def compile_all(arch):
    for name in [name for name in vars(triton_linear) if name.endswith("_kernel")]:
        setattr(triton_linear, name, Compiled(getattr(triton_linear, name), arch))
    for dtype, d, e in ((BF16, 128, 65),) if arch == 90 else ((F32, 20, 40),):
        for kind in ("none", "token", "channel") if arch == 90 else ("token", "channel"):
            tensors, weights = inputs(kind, 20, d, e, True, 0, dtype)
            if DEVICE == "cpu":
                with pytest.raises(ValueError, match="on a GPU"):
                    triton_scan(*tensors)
            results(lambda *a: triton_linear.Scan.apply(*a, 64), tensors, weights, "cpu")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "compile":
        compile_all(int(sys.argv[2]))
    else:
        compare(sys.argv[1])
        calls(sys.argv[1])
