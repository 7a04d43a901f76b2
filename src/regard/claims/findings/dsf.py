"""The dynamical systems framework's claim: a mixer of fixed state is a linear system, and softmax attention its limit.

Three measurements in float64 on random inputs.

replay       every causal mechanism of the catalogue is asked for (Λ, B, C, D) of its own decode step (ops.statespace);
             the replay of new values, h_i = Λ_i h_{i-1} + B_i u_i, must be what its fast path gives for the whole text.
             A mechanism whose state grows has no finite replay, and one that norms its own outputs is not linear in
             its values (measurements of its fast path decide): both are reported as refused. One whose first call
             is not its tokens one after the other is asked under the settings that its page tries.
one system   linear attention is a selective SSM, written here on its own, with A = 0 (Λ = I), B_i = φ(k_i) and
             C_i = φ(q_i) / Σ_{j<=i} φ(q_i)·φ(k_j).
Taylor       φ_p has the 1 + D + ... + D^p features of the series of e^{q·k/√D} up to degree p: the state grows as D^p
             and the outputs approach softmax attention. Scores have a spread of 0.5; a degree of one has negative
             weights where scores are below -1, so it may be far off.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.claims.lab import difference, generator, random_qkv, relative_difference
from regard.core import Unsupported
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.kinds.mechanism import Mechanism
from regard.ops import elu_plus_one, explicit, linear, lower_right, taylor
from regard.ops.statespace import System, export, flat, of_features
from regard.testing.case import Case, Inputs

TOKENS, CLOSE = 9, 1e-5


def system_of(case: Case, inputs: Inputs) -> System:
    """The export of a mechanism's decode step, on the queries, keys and layer inputs of `inputs`."""

    def step(i: int, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        one = inputs.span(slice(i, i + 1))
        q, k, x = (None if t is None else t.expand(len(v), *t.shape[1:]) for t in (one.q, one.k, one.x))
        return case.run(case.page.reference, replace(one, q=q, k=k, v=v[:, :, None], x=x), state=state)

    return export(step, TOKENS, (inputs.v.shape[1], inputs.v.shape[3]))


def replayed(case: Case) -> float:
    """Largest |replay - fast path| over the largest output, for values that the export has not seen."""
    inputs = case.inputs(TOKENS, batch=1)
    new = replace(inputs, v=case.inputs(TOKENS, batch=1, seed=1).v)
    result = system_of(case, inputs).replay(new.v[0].transpose(0, 1).flatten(1))  # [N, H·E]
    wanted = case.run(case.page.fast or case.page.reference, new)[0][0].transpose(0, 1).flatten(1)
    return relative_difference(result, wanted)


def cases_of(page: Mechanism) -> Iterator[Case]:
    """The page's own settings first, then its test settings: where tokens do not simply follow, some do."""
    for settings in ({}, *page.test_settings) if "decode" in page.exempt else ({},):
        yield Case(page, page.configure(**settings), "causal_self")


def grows(case: Case) -> bool:
    """Whether the fast path's state has more numbers after all tokens than after half of them."""
    inputs, path = case.inputs(TOKENS, batch=1), case.page.fast or case.page.reference
    half, whole = (case.run(path, inputs.span(slice(0, n)))[1] for n in (TOKENS // 2, TOKENS))
    return flat(whole).shape[1] > flat(half).shape[1]


def additive(case: Case) -> bool:
    """Whether the fast path gives for a sum of values the sum of what it gives for each."""
    inputs, path = case.inputs(TOKENS, batch=1), case.page.fast or case.page.reference
    other = case.inputs(TOKENS, batch=1, seed=1).v
    a, b, both = (case.run(path, replace(inputs, v=v))[0] for v in (inputs.v, other, inputs.v + other))
    return torch.allclose(a + b, both, rtol=1e-6, atol=1e-6)


def verdict(page: Mechanism) -> tuple[float | None, str]:
    """(difference, settings), or (None, why there can be no system); infinitely far off where there should be one."""
    reasons = []
    for case in cases_of(page):
        try:
            difference = replayed(case)
        except Unsupported as refusal:
            if "decode" not in page.exempt and not grows(case) and additive(case):
                return math.inf, str(refusal)
            reasons.append(str(refusal))
            continue
        if difference < CLOSE or "decode" not in page.exempt:
            return difference, "" if case.cfg == page.config() else repr(case.cfg)
        reasons.append("its first call is not its tokens one after the other")
    return None, reasons[0]


def every_mechanism() -> dict[str, tuple[float | None, str]]:
    pages = {name: page for name, page in catalog.every() if isinstance(page, Mechanism)}
    return {name: verdict(page) for name, page in pages.items() if "causal_self" in page.patterns}


def selective_ssm(u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y [N, E] of u [N, E]: h_i = e^{-Δ_i A} h_{i-1} + Δ_i B_i u_i and y_i = C_i h_i; A [D], B and C [N, D], Δ [N]."""
    h, rows = u.new_zeros(len(a), u.shape[1]), []
    for u_i, step_i, b_i, c_i in zip(u, step, b, c, strict=True):
        h = (-step_i * a).exp()[:, None] * h + step_i * torch.outer(b_i, u_i)
        rows.append(c_i @ h)
    return torch.stack(rows)


def drawn(heads: int, n: int, width: int, seed: int = 0) -> list[Tensor]:
    return list(random_qkv(generator(seed), heads, n, width, dtype=torch.float64))


def one_system() -> float:
    """Largest |linear attention - selective SSM|."""
    q, k, v = drawn(1, 64, 8)
    page = catalog.method("linear_attention").page
    wanted = page.fast(q, k, v, page.configure(eps=0.0), Call())[0][0, 0]
    phi_q, phi_k = elu_plus_one(q[0, 0]), elu_plus_one(k[0, 0])
    c = phi_q / (phi_q * phi_k.cumsum(0)).sum(-1, keepdim=True)
    result = selective_ssm(v[0, 0], torch.ones(64), torch.zeros(8), phi_k, c)
    return difference(result, wanted)


def shared_op() -> dict[str, float]:
    """Largest |replay - ops.linear| for each kind of decay, with the system written down instead of asked for."""
    heads, n, width = 2, 32, 4
    q, k, v = (t.abs() for t in drawn(heads, n, width))
    gates = -drawn(heads, n, width, seed=1)[0].abs()
    kinds = {"none": None, "fixed": gates[0, :, 0, 0], "per token": gates[..., 0], "per channel": gates}
    differences = {}
    for name, g in kinds.items():
        for normalise in (False, True):
            system = of_features(q, k, g, normalise=normalise)
            y = torch.stack([system.replay(v[0, :, :, e].mT) for e in range(width)], dim=-1)  # [N, H, E]
            wanted = linear(q, k, v, g, normalise=normalise, eps=0.0)[0][0].transpose(0, 1)
            differences[name + ", normalised" * normalise] = difference(y, wanted)
    return differences


def taylor_errors(spread: float) -> list[float]:
    """|Taylor attention - softmax attention| / |softmax attention| for degrees 1 to 4; D = 4, so s has this spread."""
    q, k, v = drawn(2, 64, 4)
    q = q * spread
    wanted = explicit(q, k, v, scale=0.5, mask=lower_right(64, 64))
    errors = []
    for degree in range(1, 5):
        phi_q, phi_k = (taylor(t * math.sqrt(0.5), degree) for t in (q, k))
        result = linear(phi_q, phi_k, v, normalise=True, eps=0.0)[0]
        errors.append(((result - wanted).norm() / wanted.norm()).item())
    return errors


def measure() -> Measured:
    verdicts = every_mechanism()
    replays = {name: off for name, (off, _) in verdicts.items() if off is not None}
    op, same, errors = shared_op(), one_system(), taylor_errors(0.5)
    falling = all(late < early for early, late in pairwise(errors))
    worst = max(replays.values(), default=1.0)
    parts = {
        "linear attention": "linear_attention" in replays,
        "softmax": "softmax" not in replays,
        "replays": max(worst, *op.values()) < CLOSE,
        "one system": same < CLOSE,
        "taylor": falling,
    }
    numbers = {
        "exported": [f"{n}: {d:.1e}" for n, d in replays.items()],
        "worst_replay": worst,
        "refused": [f"{name}: {why}" for name, (off, why) in verdicts.items() if off is None],
        "under_settings": [
            f"{name}: {settings}" for name, (d, settings) in verdicts.items() if d is not None and settings
        ],
        "worst_replay_of_the_shared_op": max(op.values()),
        "selective_ssm_difference": same,
        "taylor_errors_degree_1_to_4": errors,
        "taylor_errors_at_half_and_twice_the_spread": [taylor_errors(0.25), taylor_errors(1.0)],
        "taylor_features_at_width_4": [5, 21, 85, 341],
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="dsf",
    statement=(
        "every mixer of the catalogue with a state of fixed size that is linear in its values exports (Λ, B, C, D) "
        "whose replay gives its output, linear attention is a selective SSM with Λ = I, and Taylor features approach "
        "softmax attention as their degree grows"
    ),
    bound=(
        "largest replay difference < 1e-5 for each mixer of fixed state; linear attention and selective SSM differ by "
        "< 1e-5; the error to softmax falls from each degree to the next, 1 to 4"
    ),
    measure=measure,
)
