"""What Compactor weighs: how far keys stand out from all others, and the attention of chunks that see both ways."""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.softmax import at_least_float32, row_blocks
from regard.ops.texts import at_places, slots_by_place
from regard.ops.topk import gather_rows
from regard.ops.view import View


def leverage(x: Tensor, real: Tensor, ridge: float) -> Tensor:
    """[B, G, n] x̄_jᵀ (X̄ᵀX̄ + ridge · I)⁻¹ x̄_j of rows x [B, G, n, D] about their mean; 0 where not `real`.

    In float64: the product squares what is already uneven between channels.

    >>> x = torch.tensor([[[[3.0, 0.0], [1.0, 2.0], [-1.0, 0.0], [9.0, 9.0]]]])
    >>> leverage(x, torch.tensor([[[True, True, True, False]]]), 1e-9)
    tensor([[[0.6667, 0.6667, 0.6667, 0.0000]]], dtype=torch.float64)
    """
    gone = ~real[..., None]
    x = x.double().masked_fill(gone, 0)
    mean = x.sum(2, keepdim=True) / real.sum(-1).clamp(min=1)[..., None, None]
    x = (x - mean).masked_fill(gone, 0)
    gram = x.mT @ x + ridge * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    # |L⁻¹ x|² with L Lᵀ = gram
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), x.mT, upper=False).square().sum(2)


def rounded(x: Tensor, bits: int = 13) -> Tensor:
    """x in so many bits, about four digits. Equal words have equal keys below the first attention of a model, and
    what undoing their rotation leaves of a difference shall not choose between them.

    >>> rounded(torch.tensor([0.7, 0.700001, 0.7001]), 13)
    tensor([0.7000, 0.7000, 0.7001])
    """
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def moments(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(mean, deviation), each [B, 1, 1], over all real tokens of all heads of a row: parts (x [B, g, n], real).

    >>> real = torch.ones(1, 1, 2, dtype=torch.bool)
    >>> moments([(torch.tensor([[[1.0, 2.0]]]), real), (torch.tensor([[[3.0, 9.0]]]), real[..., :1].expand(1, 1, 2))])
    (tensor([[[3.7500]]]), tensor([[[3.5940]]]))
    """
    parts = [(x, real.expand_as(x)) for x, real in parts]
    over_all = lambda xs: torch.stack([x.sum((1, 2), keepdim=True) for x in xs]).sum(0)  # noqa: E731
    count = over_all(real for _, real in parts)
    mean = over_all(x.masked_fill(~real, 0) for x, real in parts) / count.clamp(min=1)
    squares = over_all((x - mean).masked_fill(~real, 0).square() for x, real in parts)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt().clamp(min=1e-6)


def standardised(x: Tensor, real: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """x [B, G, n] less the mean, in deviations; 0 where not `real`."""
    return (x - mean).masked_fill(~real, 0) / deviation


def seen_both_ways(view: View, chunk: int, first: int = 0, last: int = 0) -> Tensor:
    """[B, G, n] what the tokens of this step are worth to each other; 0 for all others.

    Chunks of so many tokens attend to themselves, later tokens included, without a scale. A token is worth the
    attention that it receives from all queries of its chunk, a mean over the query heads that share its key, times
    |v|; and of that the mean over itself and its two neighbours. The first and last tokens of a text are left out.
    """
    length = view.length()
    start = (length - view.fresh()).clamp(min=first)
    count = (length - last - start).clamp(min=0)  # [1|B]
    width = min(chunk, int(count.max()))
    if width == 0:
        return view.v.new_zeros(len(view.v), view.groups, view.stored)
    size = ceil(int(count.max()) / width) * width
    place = view.rank() - start[:, None, None]
    there = view.hold() & (place >= 0) & (place < count[:, None, None])
    slots = slots_by_place(place, there, size)  # [b, g, size]
    worth = received(view, slots, query_slots(view, start, count, size), width)
    held = slots >= 0
    norm = at_least_float32(view.v).norm(dim=-1)
    norm = norm.gather(-1, slots.clamp(min=0).expand(*norm.shape[:2], -1))
    beside = F.avg_pool1d(torch.where(held, worth * norm, 0), 3, stride=1, padding=1)
    share = F.avg_pool1d(held.to(beside.dtype), 3, stride=1, padding=1)
    return view.by_cache_head(at_places(beside / share.clamp(min=0.1), place, there))


def query_slots(view: View, start: Tensor, count: Tensor, size: int) -> Tensor:
    """[b, 1, size] which query of this step is that of each of the tokens from `start` on; -1: none."""
    if view.order is None:
        rank = torch.arange(view.seen - view.new, view.seen, device=view.q.device)[None]
    else:
        rank = view.order[:, -view.new :]
    asking, place = view.asking(), rank - start[:, None]
    there = place < count[:, None]
    return slots_by_place(place[:, None], (there if asking is None else there & asking)[:, None], size)


def received(view: View, slots: Tensor, asking: Tensor, width: int) -> Tensor:
    """[B, G, size] attention that each token receives within its chunk of `width`, a mean over query heads."""
    k = at_least_float32(gather_rows(view.k, slots)).unflatten(2, (-1, width))
    q = at_least_float32(gather_rows(view.q, asking)).unflatten(2, (-1, width))
    q = q.unflatten(1, (k.shape[1], -1))  # [B, G, heads, chunks, width, D]
    held, asks = ((x >= 0).unflatten(2, (-1, width))[:, :, None] for x in (slots, asking))
    parts = []
    for some in row_blocks(k.shape[2], q.shape[:3].numel() * width**2):
        weights = q[:, :, :, some] @ k[:, :, None, some].mT
        weights = weights.masked_fill(~held[:, :, :, some, None], -torch.inf).softmax(-1)
        weights = torch.where(asks[:, :, :, some, :, None] & held[:, :, :, some, None], weights, 0)
        parts.append(weights.sum(-2).mean(2))  # [B, G, chunks, width]
    return torch.cat(parts, 2).flatten(2)
