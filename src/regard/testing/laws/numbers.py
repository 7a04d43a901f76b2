"""Batches, precisions, neutral settings, compilation."""

from dataclasses import replace

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.trees import tree_leaves
from regard.ops import explicit, lower_right, per_query_head
from regard.testing.case import (
    Broken,
    Case,
    E,
    H,
    Inputs,
    NotApplicable,
    gradients,
    hold,
    same,
    same_states,
    stores,
)


def check_batch(case: Case, n: int = 7) -> None:
    """A row of a batch is what it is alone, and rows may change places."""
    inputs = case.inputs(n, n + 2, batch=3)
    for label, path in case.paths.items():
        out = case.run(path, inputs)[0]
        for b in range(3):
            alone = case.run(path, inputs.rows(slice(b, b + 1)))[0]
            case.same(f"{label}: row {b} of a batch of 3 = that row alone", out[b : b + 1], alone)
        case.same(
            f"{label}: rows in another order", case.run(path, inputs.rows([2, 0, 1]))[0], out[[2, 0, 1]]
        )


def check_neutral(case: Case) -> None:
    """The card's neutral settings change nothing: softmax attention, or what the page names as its base."""
    page = case.page
    if not page.card.neutral:
        raise NotApplicable("the card states no neutral settings")
    neutral = replace(case, cfg=page.configure(**page.card.neutral))
    inputs = neutral.inputs(9, 11)
    wanted = (page.neutral_base or softmax)(inputs.q, inputs.k, inputs.v, Call(case.pattern))
    for label, path in case.paths.items():
        base = "softmax attention" if page.neutral_base is None else "its base"
        case.same(f"{label}: neutral settings = {base}", neutral.run(path, inputs)[0], wanted)


def softmax(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    lower = lower_right(q.shape[2], k.shape[2]) if call.pattern == "causal_self" else None
    return explicit(q, k, v, scale=q.shape[-1] ** -0.5, mask=lower)


def check_extremes(case: Case, n: int = 9) -> None:
    """Scores of 1e4 stay finite in low precision and in float32, forward and backward.

    In float16 they are below 4e4, which it holds; products before they are scaled it does not. What is too large for
    the dtype itself, as sums that nothing divides may be, is not asked for.
    """
    lower = [t for t in case.dtypes if t != torch.float64]
    if not lower:
        raise NotApplicable("it runs in float64 only")
    for dtype in lower:
        inputs = case.inputs(n, n + 2)
        by = 100.0 if dtype != torch.float16 else min(100.0, (4e4 / largest_score(inputs)) ** 0.5)
        big = replace(inputs, q=inputs.q * by, k=inputs.k * by).to(dtype)
        for label, path in case.paths.items():
            exact, found = (named_parts(gradients(case, path, x)) for x in (big.to(torch.float64), big))
            large = {name: too_large(exact[name], t.dtype) for name, t in found.items()}
            # where one of them leaves the dtype, so may what the others are made of
            fits = not any(bool(t.any()) for t in large.values())
            for name, t in found.items():
                if fits or name == "the output":
                    finite(f"{label}: scores of 1e4 in {plain(dtype)}: {name}", t.masked_fill(large[name], 0))


def largest_score(inputs: Inputs) -> float:
    """The largest |q k| / √D of a query and a key."""
    k = per_query_head(inputs.k, inputs.q.shape[1])
    return (inputs.q @ k.mT).abs().max().item() * inputs.q.shape[-1] ** -0.5


def named_parts(results: tuple) -> dict[str, Tensor]:
    """What `gradients` gave, every floating tensor under what it is."""
    out, state, grads = results
    states = {f"state tensor {i}": leaf for i, leaf in enumerate(tree_leaves(state))}
    parts = {"the output": out, **states, **{f"the gradient of {name}": g for name, g in grads.items()}}
    return {name: t for name, t in parts.items() if t.is_floating_point()}


def too_large(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a number that is finite comes near the largest of a dtype, which its parts may pass, or above it."""
    return exact.isfinite() & (exact.abs() > torch.finfo(dtype).max / 16)


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def finite(label: str, t: Tensor) -> None:
    wrong = (~t.isfinite()).nonzero()
    if len(wrong):
        at = wrong[0].tolist()
        value = t[tuple(at)].item()
        raise Broken(f"{label} is {value} at {at}", at=at, found=value)


def check_precision(case: Case, n: int = 33) -> None:
    """What comes out has the dtype of what went in, near the float64 result on the same numbers."""
    bounds = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.003}
    for dtype in case.dtypes:
        inputs, bound = case.inputs(n, n + 2).to(dtype), max(bounds[dtype], case.tol)
        wanted = case.run(case.page.reference, inputs.to(torch.float64))[0]
        for label, path in case.paths.items():
            out, state = case.run(path, inputs)
            hold(
                out.dtype == dtype,
                f"{label}: {plain(dtype)} in, {plain(out.dtype)} out",
                found=plain(out.dtype),
            )
            if case.pattern == "causal_self" and not stores(case):
                low = [
                    leaf.dtype for leaf in tree_leaves(state) if leaf.dtype in (torch.bfloat16, torch.float16)
                ]
                hold(not low, f"{label}: {plain(dtype)} in, a state of sums in {plain(dtype)}, not float32")
            error = ((out.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
            message = f"{label}: {plain(dtype)} is off by {error:.2g} of the float64 result; bound {bound:g}"
            hold(error <= bound, message, found=error, wanted=bound, dtype=plain(dtype))


def check_autocast(case: Case, n: int = 9) -> None:
    """Autocast around it changes nothing: outputs, states, their dtypes, and gradients; and backward runs under it."""
    inputs = case.inputs(n, n + 2).to(torch.float32)
    for label, path in case.paths.items():
        wanted = gradients(case, path, inputs)
        for dtype in (torch.bfloat16, torch.float16):
            law = f"{label} under autocast to {plain(dtype)}"
            actual = gradients(case, path, inputs, around=lambda: torch.autocast("cpu", dtype))  # noqa: B023
            kinds = [[leaf.dtype for leaf in tree_leaves(part[:2])] for part in (actual, wanted)]
            hold(kinds[0] == kinds[1], f"{law}: dtypes of output and state are {kinds[0]}, not {kinds[1]}")
            same(f"{law}: the output", actual[0], wanted[0], tol=0)
            same_states(law, actual[1], wanted[1], tol=0)
            for name, g in wanted[2].items():
                same(f"{law}: the gradient of {name}", actual[2][name], g, tol=0)
            with torch.autocast("cpu", dtype):
                for name, g in gradients(case, path, inputs)[2].items():
                    finite(f"{law}, backward too: the gradient of {name}", g)


def check_frozen(case: Case, n: int = 9) -> None:
    """With parameters that do not learn, as in a frozen model, gradients of the tokens are the same in float32."""
    if not case.params(H, H, E):
        raise NotApplicable("it has no parameters")
    inputs = case.inputs(n, n + 2).to(torch.float32)
    for label, path in case.paths.items():
        _, _, wanted = gradients(case, path, inputs)
        _, _, frozen = gradients(case, path, inputs, learn=False)
        for name, g in frozen.items():
            same(f"{label}, parameters frozen: the gradient of {name}", g, wanted[name], tol=1e-4)


def check_compiles(case: Case) -> None:
    """torch.compile traces the path that attend runs, in one graph, at a length and again at another one."""
    name, path = list(case.paths.items())[-1]
    # one row: a graph does not change with the batch, and its time does
    asked = case.inputs(9, 11, batch=1), case.inputs(14, 17, batch=1)
    # settings that fix the number of tokens are others at another length: a graph for each
    dynamic = None if case.page.for_tokens is None else False
    if dynamic is None:
        any_number_of_tokens(asked[0])
    torch._dynamo.reset()
    traced = torch.compile(
        lambda inputs: case.run(path, inputs)[0], backend="eager", fullgraph=True, dynamic=dynamic
    )
    try:
        # shapes that are kept for later calls, of which there are few, take a third of the time
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            outs = [traced(inputs) for inputs in asked]
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise AssertionError(
            f"{name} is traced in one graph: {reason[0] if reason else type(error)}"
        ) from error
    finally:
        torch._dynamo.reset()
    for inputs, out in zip(asked, outs, strict=True):
        case.same(f"{name}: compiled = eager", out, case.run(path, inputs)[0])


def any_number_of_tokens(inputs: Inputs) -> None:
    """What torch.compile learns when a second length is asked is known at the first: one trace instead of two."""
    for t in (inputs.q, inputs.k, inputs.v, inputs.x, inputs.y):
        if t is not None:
            torch._dynamo.maybe_mark_dynamic(t, t.dim() - 2)


def check_pure(case: Case, n: int = 7) -> None:
    """Asked twice it says the same, and its inputs are left as they were."""
    inputs = case.inputs(n, n + 2)
    for label, path in case.paths.items():
        kept = inputs.map(torch.clone)
        first, again = (case.run(path, inputs)[0] for _ in range(2))
        same(f"{label}: the same question twice", again, first, tol=0)
        for name, t in inputs.tensors().items():
            hold(torch.equal(t, kept.tensors()[name]), f"{label}: {name} is changed in place", of=name)
