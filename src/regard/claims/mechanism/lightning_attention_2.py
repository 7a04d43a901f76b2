"""Lightning Attention-2's claim: blocks equal the quadratic definition, and a token costs the same at every length.

The definition is written here as it stands in the paper, (Q Kᵀ ⊙ M) V with M_ts = λ^(t-s) as a matrix, and its
gradients are autograd's. Speed is that of a training step, forward and backward, in float32: tokens per second at
1,024 and at 16,384 tokens, each next to torch's fused softmax attention on the same numbers.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from regard.claims.lab import difference, generator, median_times, random_qkv, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.linear import lightning_attention_2 as page

HEADS, WIDTH = 4, 64
SHORT, LONG = 1024, 16384
LENGTHS = (64, 65, 257, 700)
ROUNDS = 5


def quadratic(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    decay = torch.exp(log_decay[:, None, None] * age.clamp(min=0)).tril()  # M [H, N, N]
    return (q @ k.mT * decay) @ v


def drawn(n: int, seed: int = 0) -> list[Tensor]:
    return [(t * WIDTH**-0.5).requires_grad_() for t in random_qkv(generator(seed), HEADS, n, WIDTH)]


def worst_differences(cfg: page.Config) -> tuple[float, float]:
    """Largest |difference| of outputs, and of the gradients of q, k and v, over LENGTHS."""
    forward, backward = 0.0, 0.0
    for n in LENGTHS:
        qkv = q, k, v = drawn(n, seed=n)
        outputs = page.METHOD.fast(q, k, v, cfg, Call())[0], quadratic(q, k, v, page.log_decay(q, cfg))
        into = torch.randn(outputs[0].shape, generator=generator(n + 1))
        grads = [torch.autograd.grad(out, qkv, into) for out in outputs]
        forward = max(forward, difference(*outputs))
        backward = max(backward, *(difference(a, b) for a, b in zip(*grads, strict=True)))
    return forward, backward


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def lightning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return page.METHOD.fast(q, k, v, page.Config(layer=1, layers=4), Call())[0]


def steps(mix: Callable, n: int, *qkv: Tensor) -> None:
    """As many steps, forward and backward, as make up LONG tokens."""
    for _ in range(LONG // n):
        torch.autograd.grad(mix(*qkv).sum(), qkv)


def rates(mix: Callable, rounds: int) -> tuple[float, float]:
    """(tokens/s at SHORT, tokens/s at LONG), medians of rounds that alternate between the two."""
    sides = {n: partial(steps, mix, n) for n in (SHORT, LONG)}
    times = median_times(sides, rounds, arguments=lambda n: tuple(drawn(n)))
    return LONG / times[SHORT], LONG / times[LONG]


def measure() -> Measured:
    configs = [page.Config(d, layer=layer, layers=4) for d in ("paper", "slopes") for layer in (0, 3)]
    differences = [worst_differences(cfg) for cfg in configs]
    forward, backward = (max(column) for column in zip(*differences, strict=True))
    with threads(1):  # both sides on one core: a busy second one would measure the machine
        ours, theirs = rates(lightning, ROUNDS), rates(softmax, ROUNDS)
    kept, drop = ours[1] / ours[0], theirs[0] / theirs[1]
    numbers = {
        "difference_forward": forward,
        "difference_gradients": backward,
        "lightning_tokens_per_second_1k_16k": [round(r) for r in ours],
        "softmax_tokens_per_second_1k_16k": [round(r) for r in theirs],
        "lightning_16k_over_1k": round(kept, 3),
        "softmax_drop": round(drop, 2),
        "lightning_over_softmax_16k": round(ours[1] / theirs[1], 2),
    }
    parts = {
        "the definition": max(forward, backward) < 1e-5,
        "time of a token": abs(kept - 1) <= 0.25,
        "time of softmax": drop > 5,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="lightning_attention_2",
    statement=(
        "the block form equals the quadratic decay-masked definition, and training throughput per token stays flat "
        "with the length while softmax attention's falls"
    ),
    bound=(
        "largest difference < 1e-5 in float32, outputs and gradients, both decays; tokens/s of forward and backward at "
        "16k within 25% of 1k; softmax attention's fall by more than 5 times"
    ),
    measure=measure,
)
