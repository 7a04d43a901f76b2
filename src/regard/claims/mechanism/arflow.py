"""ARFlow's claim for its operator: image by image is the dense form, and a step costs the same late as early.

The dense form is written out here, image by image over all images before, with no state: it shares nothing with the
page. A step of sampling is one new image with the state of the earlier ones; its time is a median of alternating runs
over several trajectories, each from its first step on, on one core.
"""

import time
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.api import attend
from regard.catalog import method
from regard.claims.lab import generator, random_qkv, relative_difference, seeded, threads
from regard.core.claim import Claim, Measured

ARFLOW = method("arflow")
HEADS, KEY, WIDTH = 8, 64, 128
TOKENS = 256  # of an image
STEPS, EARLY, LATE = 33, 2, 32
TRAJECTORIES = 15


def inputs(images: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict, Tensor]:
    g, n = generator(), images * tokens
    qkv = list(random_qkv(g, HEADS, n, KEY, dtype=dtype))
    with seeded(0):
        dims = {"heads": HEADS, "kv_heads": HEADS, "key": KEY, "value": KEY, "width": WIDTH}
        params = ARFLOW.page.init(ARFLOW.config, dims)
    return qkv, params, torch.randn(1, n, WIDTH, generator=g, dtype=dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, x: Tensor, tokens: int) -> Tensor:
    """Every image against every earlier one through its own weights, decayed by the mean gates of those between."""
    q, k, v = (t.unflatten(2, (-1, tokens)) for t in (q, k, v))
    g = (F.logsigmoid(x @ gate).mT / 16).unflatten(2, (-1, tokens))  # [B, H, images, T]
    rows = []
    for n in range(q.shape[2]):
        s = q[:, :, n] @ k[:, :, n].mT * KEY**-0.5
        row = s.softmax(-1) @ v[:, :, n]
        for m in range(n):
            between = g[:, :, m + 1 : n].mean(-1).sum(-1)[..., None]  # [B, H, 1]
            weight = (g[:, :, n].cumsum(-1) + between).exp()[..., None]
            row = row + weight * (q[:, :, n] @ k[:, :, m].mT * KEY**-0.5) @ v[:, :, m]
        rows.append(row)
    return torch.cat(rows, dim=2)


def off_dense(dtype: torch.dtype) -> float:
    """Largest difference from the dense form, all images at once or one by one, relative to the largest output."""
    tokens, images = 64, 6
    (q, k, v), params, x = inputs(images, tokens, dtype)
    wanted = dense(q.double(), k.double(), v.double(), params["w_gate"].double(), x.double(), tokens)
    options = {"params": params, "tokens_per_image": tokens}
    whole = attend(q, k, v, "arflow", x=x, **options).out
    state, rows = None, []
    for i in range(images):
        cut = slice(i * tokens, (i + 1) * tokens)
        out, state, _ = attend(
            *(t[:, :, cut] for t in (q, k, v)), "arflow", initial_state=state, x=x[:, cut], **options
        )
        rows.append(out)
    return max(relative_difference(out.double(), wanted) for out in (whole, torch.cat(rows, dim=2)))


def change_of_noisier() -> tuple[float, float]:
    """Largest change of the images before and from the edited one on, when the last but one of six is edited."""
    tokens, images = 64, 6
    (q, k, v), params, x = inputs(images, tokens)
    options = {"params": params, "tokens_per_image": tokens}
    base = attend(q, k, v, "arflow", x=x, **options).out
    edited = [t.clone() for t in (q, k, v, x)]
    start = 4 * tokens
    for t in edited:
        t.narrow(-2, start, tokens).add_(1.0)
    *qkv, x = edited
    change = (attend(*qkv, "arflow", x=x, **options).out - base).abs()
    return change[:, :, :start].max().item(), change[:, :, start:].max().item()


def step_times() -> tuple[float, float]:
    """Median milliseconds of steps EARLY and LATE, counted from 1, over the trajectories."""
    (q, k, v), params, x = inputs(1, TOKENS)
    taken: dict[int, list[float]] = {EARLY: [], LATE: []}
    with torch.no_grad():
        for _ in range(TRAJECTORIES):
            state = None
            for step in range(1, STEPS):
                start = time.perf_counter()
                _, state, _ = attend(q, k, v, "arflow", initial_state=state, params=params, x=x)
                if step in taken:
                    taken[step].append(time.perf_counter() - start)
    early, late = (1000 * median(times) for times in taken.values())
    return early, late


def measure() -> Measured:
    exact, single = off_dense(torch.float64), off_dense(torch.float32)
    earlier, later = change_of_noisier()
    with threads(1):
        early, late = step_times()
    numbers = {
        "off_dense_float64": exact,
        "off_dense_float32": single,
        "change_of_noisier_images": earlier,
        "change_of_edited_and_cleaner": later,
        "step_2_ms": early,
        "step_32_ms": late,
        "step_32_over_step_2": late / early,
    }
    parts = {
        "the dense form": max(exact, single) < 1e-5,
        "earlier images stay": earlier == 0 and later > 0,
        "time of a step": abs(late / early - 1) <= 0.2,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="arflow",
    statement=(
        "evaluating the hybrid attention image by image gives the dense block-causal gated attention, editing a "
        "cleaner image leaves noisier ones exactly as they were, and a sampling step costs the same late as early"
    ),
    bound=(
        "difference from the dense form < 1e-5 of the largest output; change of earlier images == 0; time of step 32 "
        "within 20 % of step 2"
    ),
    measure=measure,
)
