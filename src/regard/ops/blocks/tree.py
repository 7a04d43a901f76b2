"""The best blocks of many, found by halving: a segment is judged by its first block, the best halves are kept.

A left half begins where its segment did, so a round scores the right ones only.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.softmax import at_least_float32

GATHERED = 1 << 20  # numbers of keys gathered at a time; changes the speed, never the result


def tree_search(q: Tensor, keys: "Keys", begin: int, width: Tensor, count: int) -> Tensor:
    """[B, H, I, count] blocks that queries [B, H, I, n, D] find in `width` [B, 1, I, 1] blocks from `begin` on.

    Ascending, -1 where there are fewer. So many rows at a time as keep what they gather in the cache, of one head where
    the text is long.
    """
    (batch, heads, rows), q = q.shape[:3], q.flatten(0, 1)
    width = width.expand(-1, heads, -1, -1).reshape(-1, rows, 1)
    many = max(1, GATHERED // (count * keys.block * keys.width))
    step = min(rows, many)
    found = []
    for texts in torch.arange(batch * heads, device=q.device).split(many // step):
        parts = zip(q[texts].split(step, 1), width[texts].split(step, 1), strict=True)
        found.append(torch.cat([descend(ask, keys, texts, begin, wide, count) for ask, wide in parts], dim=1))
    return torch.cat(found).unflatten(0, (batch, heads))


class Keys:
    """Keys in blocks, as the B·H texts that the query heads read."""

    def __init__(self, k: Tensor, heads: int, block: int) -> None:
        batch, groups, m, self.width = k.shape
        self.block, self.columns = block, -(-m // block)
        k = at_least_float32(k)
        k = F.pad(k, (0, 0, 0, -m % block)) if m % block else k
        self.flat = k.reshape(-1, block * self.width)
        head = torch.arange(heads, device=k.device) // (heads // groups)
        self.first = (torch.arange(batch, device=k.device)[:, None] * groups + head).flatten() * self.columns

    def peak(self, q: Tensor, texts: Tensor, at: Tensor) -> Tensor:
        """[T, I, m] the largest q·k over the queries [T, I, n, D] of a row and the keys of block `at` of its text."""
        blocks = at.clamp(max=self.columns - 1) + self.first[texts, None, None]
        keys = self.flat.index_select(0, blocks.flatten()).view(-1, at.shape[2] * self.block, self.width)
        return (q.flatten(0, 1) @ keys.mT).amax(1).view(*at.shape, self.block).amax(-1)


def descend(q: Tensor, keys: Keys, texts: Tensor, begin: int, width: Tensor, count: int) -> Tensor:
    """[T, I, count] what queries [T, I, n, D] find in `width` [T, I, 1] blocks from `begin` on."""
    j = torch.arange(count, device=q.device)
    few = width <= count  # nothing to search: all of them
    at = torch.where(few, j, width * j // count) + begin
    size = torch.where(few, (j < width).long(), width * (j + 1) // count - width * j // count)
    most = keys.columns - begin if torch.compiler.is_compiling() else int(width.max())
    longest = -(-most // count)
    score = keys.peak(q, texts, at) if longest > 1 else None
    while longest > 1:
        half = size // 2
        middle = at + half
        right = keys.peak(q, texts, middle)
        pairs = (at, middle), (half, size - half), (score, right)
        at, size, score = (torch.stack(pair, dim=-1).flatten(-2) for pair in pairs)
        kept = best(score.masked_fill(size == 0, -torch.inf), count)
        at, size, score = (t.gather(-1, kept) for t in (at, size, score))
        longest = -(-longest // 2)
    return at.masked_fill(size == 0, -1)


def best(score: Tensor, count: int) -> Tensor:
    """[..., count] where the highest of score [..., n] are, ascending; ties go to the lower index."""
    bar = score.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = score > bar, score == bar
    kept = above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    slot = (kept.cumsum(-1) - 1).masked_fill(~kept, count)
    place = torch.arange(score.shape[-1], device=score.device).expand(slot.shape)
    return place.new_zeros(*slot.shape[:-1], count + 1).scatter_(-1, slot, place)[..., :count]
