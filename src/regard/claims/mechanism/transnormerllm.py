"""TransNormerLLM's claim: the recurrence is the parallel masked form at every position, and costs the same at each.

The parallel form is written here as it stands in the paper, with its N x N mask, and knows neither the page's state nor
its frames. The naive inference that the paper replaces keeps sums without decay and puts λ^t and λ^(-t) into queries
and keys: here into the page's own features, by its own decays, at the first layer, where decays are strongest. It gives
what the page gives for a text of a few tokens.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.claims.lab import generator, median_times, random_qkv, relative_difference, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.core.errors import present
from regard.methods.mechanisms.linear import transnormerllm as page
from regard.ops import Form

HEADS, WIDTH, LAYERS = 4, 32, 4
INPUT = HEADS * WIDTH
CHECKED, SHORT, LONG, FEW = 1024, 1024, 16384, 8
STEPS, WARM = 1050, 50


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, x)"""
    g = generator(seed)
    return *random_qkv(g, HEADS, n, WIDTH), torch.randn(1, n, INPUT, generator=g)


def params_of(cfg: page.Config) -> dict[str, Tensor]:
    with seeded(0):
        return page.init(cfg, {"heads": HEADS, "key": WIDTH, "value": WIDTH, "width": INPUT})


def parallel(q: Tensor, k: Tensor, v: Tensor, x: Tensor, layer: int, params: dict[str, Tensor]) -> Tensor:
    """SRMSNorm((φ(Q) φ(K)ᵀ ⊙ M) V) ⊙ U, head by head, with M [N, N] written out."""
    n, rows = q.shape[2], []
    age = torch.arange(n)[:, None] - torch.arange(n)
    for h in range(HEADS):
        decay = torch.exp(-8 * h / HEADS * (1 - layer / LAYERS) * age.clamp(min=0)).tril()
        a, b = F.silu(q[0, h]), F.silu(k[0, h])
        scores = a @ b.mT
        if layer == 0:
            scores = torch.zeros(n, n)
            # LRPE: each channel has an angle of its own
            for c, theta in enumerate(params["theta"][h]):
                scores = scores + torch.outer(a[:, c], b[:, c]) * torch.cos(theta * age)
        rows.append((scores * decay) @ v[0, h])
    o = torch.cat(rows, dim=-1)  # [N, H·E]
    normalised = o / (o.norm(dim=-1, keepdim=True) / o.shape[-1] ** 0.5)
    return (normalised * (x[0] @ params["gate"].flatten(1))).view(n, HEADS, WIDTH).transpose(0, 1)[None]


def step(
    inputs: tuple, t: int, cfg: page.Config, params: dict, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    q, k, v, x = inputs
    cut = slice(t, t + 1)
    call = Call(params=params, x=x[:, cut], initial_state=state)
    return page.METHOD.fast(q[:, :, cut], k[:, :, cut], v[:, :, cut], cfg, call)


def difference(layer: int) -> float:
    """Largest |recurrent - parallel| at any position, relative to the largest parallel number of that position."""
    cfg, inputs = page.Config(layer=layer, layers=LAYERS), drawn(CHECKED, seed=layer)
    params, state, rows = params_of(cfg), None, []
    for t in range(CHECKED):
        out, state = step(inputs, t, cfg, params, state)
        rows.append(out)
    wanted = parallel(*inputs, layer, params)
    error = (torch.cat(rows, dim=2) - wanted).abs().amax((1, 3)) / wanted.abs().amax((1, 3))
    return error.max().item()


def milliseconds(states: dict[int, Tensor], cfg: page.Config, params: dict) -> tuple[float, ...]:
    """Medians per token after each of the texts that have left `states`; the texts take turns token by token."""
    inputs = drawn(STEPS, seed=9)

    def tokens(state: Tensor | None) -> Iterator[None]:
        for t in range(STEPS):
            _, state = step(inputs, t, cfg, params, state)
            yield

    sides = {n: partial(next, tokens(state)) for n, state in states.items()}
    return tuple(1000 * seconds for seconds in median_times(sides, STEPS - WARM, WARM).values())


def undecayed(n: int, cfg: page.Config, params: dict) -> tuple[Tensor, Tensor, Form, Tensor]:
    """(λ^t φ(q), λ^(-t) φ(k), the page's form, its output) of a text of n tokens, in float32."""
    q, k, v, x = drawn(n, seed=0)
    call = Call(params=params, x=x)
    parts = page.form(q, k, v, cfg, call)
    decay = present(parts.log_decay, "the page's decay").view(-1, 1, 1)
    logs = decay * torch.arange(n)[:, None]  # log λ^t [H, N, 1]
    return parts.q * logs.exp(), parts.k * (-logs).exp(), parts, page.METHOD.fast(q, k, v, cfg, call)[0]


def naive_share(n: int, cfg: page.Config, params: dict) -> float:
    """Share of numbers that are finite after n tokens of the sums Σ λ^(-s) φ(k_s)ᵀ v_s."""
    _, k, parts, _ = undecayed(n, cfg, params)
    return (k.mT @ parts.v).isfinite().float().mean().item()


def naive_difference(n: int, cfg: page.Config, params: dict) -> float:
    """Of the naive form's outputs from the page's, relative to the largest."""
    q, k, parts, wanted = undecayed(n, cfg, params)
    return relative_difference(parts.finish((q @ k.mT).tril() @ parts.v, None)[0], wanted)


@torch.inference_mode()
def measure() -> Measured:
    with threads(1):
        differences = [difference(layer) for layer in range(LAYERS)]
        cfg = page.Config(layer=0, layers=LAYERS)
        params, ends = params_of(cfg), {}
        for n in (SHORT, LONG):
            q, k, v, x = drawn(n, seed=n)
            ends[n] = page.METHOD.fast(q, k, v, cfg, Call(params=params, x=x))[1]
        short, long = milliseconds(dict(ends), cfg, params)
    numbers: dict[str, Any] = {
        "relative_difference_by_layer": differences,
        "ms_per_token_at_1k": round(short, 4),
        "ms_per_token_at_16k": round(long, 4),
        "ratio": round(long / short, 3),
        "state_numbers": [ends[n].numel() for n in (SHORT, LONG)],
        "naive_finite_share_16k": naive_share(LONG, cfg, params),
        "naive_relative_difference_at_8": naive_difference(FEW, cfg, params),
        "recurrent_finite_16k": int(ends[LONG].isfinite().all()),
    }
    naive = numbers["naive_finite_share_16k"] < 1 and numbers["naive_relative_difference_at_8"] < 1e-4
    parts = {
        "the parallel form": max(differences) < 1e-4,
        "the same memory": ends[SHORT].numel() == ends[LONG].numel(),
        "finite": numbers["recurrent_finite_16k"] == 1,
        "the naive form is not": naive,
        "time of a token": abs(long / short - 1) <= 0.20,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="transnormerllm",
    statement=(
        "recurrent inference equals the parallel masked form at every position, and its time and memory per token do "
        "not grow with the context"
    ),
    bound=(
        "largest relative difference < 1e-4 in float32 over 1,024 positions of four layers; ms/token after 16k tokens "
        "within 20% of 1k with a state of the same size; the naive form with λ^(-t) is not finite at 16k"
    ),
    measure=measure,
)
