"""Scores of the tokens of a grid, from its coarsest level down to itself: which of them show an object.

    T_l = LN(W (pool_l(x) + e_l) + b)              level l: means of 2^l x 2^l tokens, fewer at the last borders
    S_l = MLP(T_l ⊙ (1 + α_l Up(S_{l+1})))         Up: along straight lines, corners on corners

The MLP is four linear maps with GELU; after the first, half of the channels become their mean over the level. Written
twice: `slow_scores` as the equations say, of one image, for references, and `scores`, of a batch.

>>> up = slow_up(torch.tensor([[0.0, 3.0]]), (1, 4))
>>> (1 + 2 * up).tolist()  # what α = 2 multiplies four tokens by
[[1.0, 3.0, 5.0, 7.0]]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import require
from regard.ops.grid.image import as_image, as_tokens
from regard.ops.softmax import at_least_float32

Params = dict[str, Tensor]
LAST = ("score_2", "score_3", "score_4")


def drawn_scores(width: int, levels: int) -> Params:
    """What learned scores begin with."""
    require(width % 4 == 0, "the width is a multiple of 4", width=width)
    sizes = (width, width, width // 2, width // 4, 1)
    maps = {"memory": (width, width)}
    maps |= {f"score_{i}": (sizes[i], sizes[i - 1]) for i in range(1, 5)}
    params = {name: torch.empty(shape).uniform_(-1, 1) * shape[1] ** -0.5 for name, shape in maps.items()}
    params |= {f"{name}_bias": torch.zeros(shape[0]) for name, shape in maps.items()}
    params |= {"level": torch.randn(levels, width)}
    params |= {"memory_norm": torch.ones(width), "memory_norm_bias": torch.zeros(width)}
    # a single level is modulated by none
    return params | ({"alpha": torch.empty(levels - 1).uniform_(-0.3, 0.3)} if levels > 1 else {})


def slow_scores(image: Tensor, p: Params, levels: int, eps: float) -> Tensor:
    """S_0 [N] of an image [C, rows, columns]."""
    score = image.new_zeros(1, 1)
    for level in reversed(range(levels)):
        side = 2**level
        means = [[part.mean((1, 2)) for part in row.split(side, 2)] for row in image.split(side, 1)]
        sides, t = (len(means), len(means[0])), torch.stack([mean for row in means for mean in row])
        t = slow_linear(t + p["level"][level], p, "memory")
        t = t - t.mean(1, keepdim=True)
        t = t / (t.square().mean(1, keepdim=True) + eps).sqrt() * p["memory_norm"] + p["memory_norm_bias"]
        if level < levels - 1:
            t = t * (1 + p["alpha"][level] * slow_up(score, sides).flatten()[:, None])
        z = slow_gelu(slow_linear(t, p, "score_1"))
        half = z.shape[1] // 2
        z = torch.stack([torch.cat([row[:half], z[:, half:].mean(0)]) for row in z])
        z = slow_gelu(slow_linear(slow_gelu(slow_linear(z, p, "score_2")), p, "score_3"))
        score = slow_linear(z, p, "score_4").view(sides)
    return score.flatten()


def slow_up(score: Tensor, sides: tuple[int, int]) -> Tensor:
    """Scores [rows, columns] drawn out to these sides along straight lines, corners on corners."""

    def lines(few: int, many: int) -> Tensor:
        weights = torch.zeros(many, few, dtype=score.dtype, device=score.device)
        for i in range(many):
            at = i * (few - 1) / max(many - 1, 1)
            low = min(int(at), few - 1)
            weights[i, low] += 1 - (at - low)
            weights[i, min(low + 1, few - 1)] += at - low
        return weights

    rows, columns = (lines(few, many) for few, many in zip(score.shape, sides, strict=True))
    return rows @ score @ columns.mT


def slow_linear(x: Tensor, p: Params, name: str) -> Tensor:
    return x @ p[name].mT + p[f"{name}_bias"]


def slow_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def scores(x: Tensor, sides: tuple[int, ...], params: Params, levels: int, eps: float) -> list[Tensor]:
    """S_l [B, places of level l] of tokens [B, N, C], the finest first, in float32 at least."""
    image, found = as_image(at_least_float32(x), sides), []
    p = {name: t.to(image.dtype) for name, t in params.items()}
    for level in reversed(range(levels)):
        pooled = F.avg_pool2d(image, 2**level, ceil_mode=True, count_include_pad=False)
        t = F.linear(as_tokens(pooled) + p["level"][level], p["memory"], p["memory_bias"])
        t = F.layer_norm(t, t.shape[2:], p["memory_norm"], p["memory_norm_bias"], eps)
        if found:
            up = F.interpolate(found[-1], pooled.shape[2:], mode="bilinear", align_corners=True)
            t = t * (1 + p["alpha"][level] * as_tokens(up))
        local, shared = F.gelu(F.linear(t, p["score_1"], p["score_1_bias"])).chunk(2, dim=2)
        z = torch.cat([local, shared.mean(1, keepdim=True).expand_as(shared)], dim=2)
        for name in LAST:
            z = F.linear(z, p[name], p[f"{name}_bias"])
            z = z if name == LAST[-1] else F.gelu(z)
        found.append(as_image(z, pooled.shape[2:]))
    return [s.flatten(1) for s in reversed(found)]
