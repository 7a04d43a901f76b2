"""DiNA's claim: it is NA on interleaved sub-grids, full attention at k = n, and reaches all of an image in few layers.

Sub-grids are taken out by strides and asked as images of their own, with the same table of offsets. Full attention
is torch's own under a bias made here from all pairs of pixels. How far layers reach is counted on the pixels that the
operator reads, found by giving it equal scores and each pixel's own direction as value: a 56 x 56 image, as in the
first stage of DiNAT at 224 pixels, k = 7, where layers take turns between 1 and 56 // 7 = 8.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.claims.lab import difference, generator, random_qkv, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.methods.mechanisms.grid import dinat as page

HEADS, WIDTH = 4, 32
KERNEL, SIDE, MOST = 7, 56, 64
CASES = ((3, 2, (9, 11)), (3, 4, (14, 12)), (5, 3, (17, 15)), (7, 2, (14, 21)))  # kernel, dilation, image
WORD = 64  # pixels in a whole number


def drawn(sides: tuple[int, int], kernel: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    g = generator(kernel)
    qkv = list(random_qkv(g, HEADS, sides[0] * sides[1], WIDTH))
    return qkv, {"bias": torch.randn(HEADS, 2 * kernel - 1, 2 * kernel - 1, generator=g)}


def mixed(qkv: list[Tensor], cfg: page.Config, sides: tuple[int, int], params: dict[str, Tensor]) -> Tensor:
    return page.METHOD.fast(*qkv, cfg, Call("self", grid=sides, params=params))[0]


def off_sub_grids(kernel: int, dilation: int, sides: tuple[int, int]) -> float:
    """Largest difference from NA on each of the dilation² images of every dilation-th row and column."""
    qkv, params = drawn(sides, kernel)
    whole = mixed(qkv, page.Config(kernel, dilation), sides, params).unflatten(2, sides)
    most = 0.0
    for y, x in itertools.product(range(dilation), repeat=2):
        part = [t.unflatten(2, sides)[:, :, y::dilation, x::dilation] for t in qkv]
        out = mixed([t.flatten(2, 3) for t in part], page.Config(kernel), part[0].shape[2:4], params)
        most = max(most, difference(out, whole[:, :, y::dilation, x::dilation].flatten(2, 3)))
    return most


def off_full(side: int) -> float:
    """Of k = n from torch's attention, offsets of all pairs of pixels counted here."""
    sides = (side, side)
    (q, k, v), params = drawn(sides, side)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    down, right = (place - place[:, None] + side - 1).unbind(-1)
    wanted = scaled_dot_product_attention(q, k, v, params["bias"][:, down, right][None])
    plain = mixed([q, k, v], page.Config(side, bias=False), sides, {})
    return max(
        difference(mixed([q, k, v], page.Config(side), sides, params), wanted),
        difference(plain, scaled_dot_product_attention(q, k, v)),
    )


def read(dilation: int) -> Tensor:
    """[N, N] bool: which pixels of the image each pixel reads."""
    n = SIDE * SIDE
    q, parts = torch.zeros(1, 1, n, 1), []
    for values in torch.eye(n).split(448, dim=1):
        cfg = page.Config(KERNEL, dilation, bias=False)
        parts.append(mixed([q, q, values[None, None]], cfg, (SIDE, SIDE), {})[0, 0] > 0)
    return torch.cat(parts, dim=1)


def layers_to_all(reads: list[Tensor]) -> int:
    """Layers, those given in turns, until every pixel depends on every other; a bit for each that it depends on."""
    n = len(reads[0])
    near = [m.nonzero()[:, 1].view(n, -1) for m in reads]
    own = torch.arange(n)
    reached = torch.zeros(n, n // WORD, dtype=torch.int64)
    reached[own, own // WORD] = torch.ones_like(own).bitwise_left_shift(own % WORD)
    for layer in range(MOST):
        columns = near[layer % len(near)].unbind(1)
        before, reached = reached, torch.zeros_like(reached)
        for column in columns:
            reached |= before[column]
        if bool((reached == -1).all()):
            return layer + 1
    return MOST + 1


def measure() -> Measured:
    with threads(1), torch.no_grad():
        grids = max(off_sub_grids(*case) for case in CASES)
        full = max(off_full(side) for side in (5, 7, 12))
        near, sparse = read(1), read(SIDE // KERNEL)
        layers = {"na": layers_to_all([near]), "dina": layers_to_all([near, sparse])}
    keys = {int(n) for m in (near, sparse) for n in m.sum(1).unique()}
    numbers = {
        "difference_from_sub_grids": grids,
        "difference_from_full_attention": full,
        "keys_of_a_query": sorted(keys),
        "layers_to_all_na": layers["na"],
        "layers_to_all_dina": layers["dina"],
    }
    parts = {
        "sub-grids": grids < 1e-5,
        "full attention": full < 1e-5,
        "keys": keys == {KERNEL**2},
        "reach": layers["dina"] < layers["na"] <= MOST,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="dinat",
    statement=(
        "dilated neighbourhood attention is neighbourhood attention on interleaved sub-grids, full attention at k = n, "
        "and with dilations that take turns reaches the whole image in fewer layers"
    ),
    bound=(
        "difference < 1e-5 from NA on the sub-grids, and from full attention at k = n, d = 1, both with offsets; every "
        "query has k² keys; on 56 x 56 with k = 7 layers until all reach all: 1 and 8 in turns < 1 alone"
    ),
    measure=measure,
)
