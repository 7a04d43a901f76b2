"""BiFormer's claim: with all regions routing is full attention, with a few it finds what windows of as many keys miss.

Planted pairs: an image of 56 x 56 in 7 x 7 regions of 64 places. Each region has a direction, which its keys carry with
noise; its queries carry the directions of four regions that lie far off (three regions away or more). So full attention
puts most of its mass there. Routing reads 4 of 49 regions, 256 keys; the window is the strongest of as many: for each
query the 16 x 16 places nearest to it. Errors are those of the output against full attention, relative to its norm.

Beside the bound stand the same numbers where the pairs are harder to see (noise), where what is planted lies across
regions (shifted by half of one), where nothing is planted, and for regions chosen at random. All regions are read by
the routed path itself, not by the shortcut that the page takes for them.

Times are forward, on 8 heads of 32 channels in float32, the convolution of the values included, against SDPA on all
tokens: the time of the CPU on one core, and that of the clock on two. Of the latter a busy machine makes anything, as
cores wait for each other by spinning; OMP_WAIT_POLICY=PASSIVE in the environment lets them sleep.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.claims.lab import Ratios, difference, generator, paired_ratios, random_qkv, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.grid import biformer_bra as page
from regard.ops.grid import Axis, from_regions, nearest_attention, to_regions

SIDES, S, SIZE, TOP, WINDOW = (56, 56), 7, (8, 8), 4, 16
HEADS, WIDTH, TOKENS = 8, 32, 56 * 56
SCALE = (HEADS * WIDTH) ** -0.5
STRENGTH, FAR = (
    9.0,
    3,
)  # of a direction, so that a planted pair's score is 81/16; regions between those of a pair
ROUNDS = 21
QKV = tuple[Tensor, Tensor, Tensor]


def pairs(g: torch.Generator) -> Tensor:
    """[S², TOP]: for each region others that lie far off."""
    at = torch.cartesian_prod(torch.arange(S), torch.arange(S))
    apart = (at[:, None] - at).abs().amax(-1)
    return torch.rand(S * S, S * S, generator=g).masked_fill(apart < FAR, -1).topk(TOP).indices


def planted(seed: int, noise: float = 1.0, strength: float = STRENGTH, shift: int = 0) -> tuple[QKV, Tensor]:
    """q, k, v [1, HEADS, TOKENS, WIDTH] and the pairs; `shift` moves what is planted by so many places."""
    g = generator(seed)
    wanted = pairs(g)
    directions = strength * F.normalize(torch.randn(S * S, HEADS, WIDTH, generator=g), dim=-1)
    values = torch.randn(S * S, HEADS, WIDTH, generator=g)
    tokens = []
    for of_region, by in ((directions[wanted].sum(1), noise), (directions, noise), (values, 1.0)):
        smooth = of_region.transpose(0, 1)[:, :, None].expand(-1, -1, SIZE[0] * SIZE[1], -1)  # [H, S², p, D]
        image = (
            from_regions(smooth, SIDES, SIZE).unflatten(1, SIDES).roll((shift, shift), (1, 2)).flatten(1, 2)
        )
        tokens.append((image + by * torch.randn(HEADS, TOKENS, WIDTH, generator=g))[None])
    q, k, v = tokens
    return (q, k, v), wanted


def errors(qkv: QKV) -> tuple[float, float]:
    """Off full attention by so much, relative to its norm: (routing, the window)."""
    full = F.scaled_dot_product_attention(*qkv, scale=SCALE)
    routed = page.routed(*qkv, S, TOP, SIDES, SCALE)
    near = nearest_attention(*qkv, SIDES, [Axis(WINDOW)] * 2, SCALE)
    routed_off, near_off = (((out - full).norm() / full.norm()).item() for out in (routed, near))
    return routed_off, near_off


def random_regions(qkv: QKV) -> float:
    """The error of as many regions, chosen at random."""
    q, k, v = (to_regions(t[0], SIDES, SIZE) for t in qkv)
    at = torch.rand(S * S, S * S, generator=generator(9)).topk(TOP).indices.expand(HEADS, -1, -1)
    out = F.scaled_dot_product_attention(q, page.gathered(k, at), page.gathered(v, at), scale=SCALE)
    full = F.scaled_dot_product_attention(*qkv, scale=SCALE)
    return ((from_regions(out, SIDES, SIZE) - full).norm() / full.norm()).item()


def found(qkv: QKV, wanted: Tensor) -> float:
    """The share of the planted pairs that are routed."""
    q, k = (to_regions(t, SIDES, SIZE) for t in qkv[:2])
    routes = page.routes(q, k, TOP)[0]
    return (routes[:, :, None] == wanted[:, None]).any(1).float().mean().item()


def mass(qkv: QKV, wanted: Tensor) -> float:
    """The share of its weight that full attention gives to the planted pairs."""
    q, k = (to_regions(t[0], SIDES, SIZE).flatten(1, 2) for t in qkv[:2])
    by_region = (q @ k.mT * SCALE).softmax(-1).unflatten(-1, (S * S, -1)).sum(-1)  # [H, N, S²]
    rows = wanted.repeat_interleave(SIZE[0] * SIZE[1], 0).expand(HEADS, -1, -1)
    return by_region.gather(-1, rows).sum(-1).mean().item()


def speed(cores: int, clock: Callable[[], float]) -> Ratios:
    """Of routing, and of SDPA over it."""
    q, k, v = random_qkv(generator(), HEADS, TOKENS, WIDTH)
    dims = {"heads": HEADS, "kv_heads": HEADS, "key": WIDTH, "value": WIDTH, "width": HEADS * WIDTH}
    cfg = page.Config(regions=S, top_k=TOP)
    call = Call("self", params=page.init(cfg, dims), grid=SIDES)

    def routed() -> None:
        page.METHOD.fast(q, k, v, cfg, call)

    def full() -> None:
        F.scaled_dot_product_attention(q, k, v, scale=SCALE)

    with threads(cores), seeded(0):
        return paired_ratios(routed, full, ROUNDS, warm=3, clock=clock)


@torch.no_grad()
def measure() -> Measured:
    qkv, wanted = planted(0)
    all_regions = difference(
        page.routed(*qkv, S, S * S, SIDES, SCALE), F.scaled_dot_product_attention(*qkv, scale=SCALE)
    )
    share, hits, (routed, near) = mass(qkv, wanted), found(qkv, wanted), errors(qkv)
    one, two = speed(1, time.process_time), speed(2, time.perf_counter)
    numbers = {
        "difference_of_all_regions": all_regions,
        "mass_on_planted_pairs": share,
        "planted_pairs_routed": hits,
        "error_routed": routed,
        "error_window": near,
        "error_random_regions": random_regions(qkv),
        "error_routed_and_window_at_noise_2": list(errors(planted(1, noise=2.0)[0])),
        "error_routed_and_window_shifted": list(errors(planted(2, shift=4)[0])),
        "error_routed_and_window_unplanted": list(errors(planted(3, strength=0.0)[0])),
        "times_faster_one_core": one.of_medians,
        "milliseconds_one_core": [1000 * t for t in one.medians],
        "times_faster_two_cores": two.of_medians,
        "quartiles_two_cores": list(two.spread),
        "milliseconds_two_cores": [1000 * t for t in two.medians],
    }
    parts = {
        "all regions": all_regions < 1e-5,
        "pairs": hits >= 0.95,
        "error": routed <= 0.5 * near,
        "time of one core": one.of_medians >= 3,
        "time of two cores": two.of_medians >= 3,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="biformer_bra",
    statement=(
        "with all regions bi-level routing is full attention; with 4 of 49 it recovers planted pairs of distant "
        "regions that windows of as many keys miss, in a third of full attention's time"
    ),
    bound=(
        "difference of all regions < 1e-5; planted pairs routed >= 0.95; error of the output, k = 4 of 49, <= 0.5 of a "
        "window's; at least 3 times faster than SDPA on 56 x 56 tokens, forward, on one core and on two"
    ),
    measure=measure,
)
