"""The lowerings of a mask: a predicate asked at one place of a text, made into whatever a backend wants. True = attend.

    dense        booleans for n queries and m keys
    at           booleans at any true indices, as a cache needs that dropped keys
    row          the keys that one query reads
    blocks       which tiles are empty, partial or full
    blind        the queries that see no key
    flex         mask_mod of FlexAttention;   block_mask   its BlockMask

Indices are true indices, the position of a token in its text, never slots.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from regard.core.coordinates import Coordinates, Sides, Tiles
from regard.core.deprecation import moved
from regard.core.errors import require
from regard.core.roles import Roles
from regard.core.tiling import Question, Tiled


@dataclass(frozen=True, eq=False)
class Blocks:
    """The tiles of a mask: kind[b, h, I, J] is 0 for an empty tile, 1 for a partial one, 2 for a full one.

    `full`, `partial` and `empty` list them as rows (b, h, I, J); a tile cut by the border is full if all of it is seen.

    >>> from regard.core.mask import causal
    >>> found = causal().blocks(5, block=2)
    >>> [t[:, 2:].tolist() for t in (found.empty, found.partial, found.full)]
    [[[0, 1], [0, 2], [1, 2]], [[0, 0], [1, 1]], [[1, 0], [2, 0], [2, 1], [2, 2]]]
    """

    kind: Tensor
    n: int
    m: int
    block: int

    @property
    def empty(self) -> Tensor:
        return (self.kind == 0).nonzero()

    @property
    def partial(self) -> Tensor:
        return (self.kind == 1).nonzero()

    @property
    def full(self) -> Tensor:
        return (self.kind == 2).nonzero()

    @property
    def density(self) -> float:
        """The share of tiles that are read."""
        return (self.kind > 0).double().mean().item()


class Lowering(ABC):
    """What a mask can be made into. The lowerings give [B, H, N, M] with 1 where rows or heads do not differ.

    `needs` names the roles that it reads. `heads` is None, or the number of query heads for which the heads differ.
    """

    needs: tuple[str, ...]
    heads: int | None

    @abstractmethod
    def __call__(self, at: Coordinates) -> Tensor:
        """Booleans: whether the query may attend to the key."""

    def cover(self, at: Tiles) -> tuple[Tensor, Tensor] | None:
        """(some, all): whether any pair of a tile may be seen, whether every pair surely is; None: nobody knows."""
        return None

    def dense(
        self, n: int, m: int | None = None, *, batch: int | None = None, heads: int | None = None,
        roles: Roles | Sides | None = None, offset: int | None = None, device: Any = None,
    ) -> Tensor:  # fmt: skip
        """Booleans [B or 1, H or 1, n, m]. `offset` is the true index of query 0.

        By default that is m - n, so that the last query is that of the last key, and 0 where `roles` is a pair, one
        Roles for the queries and one for the keys: two texts, each counted from its own start. Where there are more
        queries than keys the first stand before the text, at indices below 0, and have no labels.

        >>> from regard.core.mask import causal
        >>> causal().dense(2, 4).int()[0, 0]
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
        >>> causal().dense(3, 2).int()[0, 0]
        tensor([[0, 0],
                [1, 0],
                [1, 1]], dtype=torch.int32)
        """
        q, k = self._indices(n, m, offset, roles, device)
        return self._evaluate(q, k, roles, batch, heads)

    def at(
        self,
        q_index: Tensor,
        k_index: Tensor,
        *,
        roles: Roles | Sides | None = None,
        heads: int | None = None,
    ) -> Tensor:
        """Booleans [B, G or H, N, n] at any true indices: queries [N], [B, N] or [B, H, N], keys [n], [B, n] or
        [B, G, n]. An index of -1 is nobody: an empty slot, which no mask shows, not even an inverted one.
        """
        q, k = _per_head(q_index).unsqueeze(-1), _per_head(k_index).unsqueeze(-2)
        wide = self._check_heads(heads) or heads or max(q.shape[1], k.shape[1])
        q, k = _spread(q, wide), _spread(k, wide)
        seen = self._evaluate(q.clamp(min=0), k.clamp(min=0), roles, None, heads)
        return seen & (q >= 0) & (k >= 0)

    def row(self, t: int, m: int | None = None, *, roles: Roles | Sides | None = None) -> Tensor:
        """The keys, in order, that the query of true index t reads of m (t + 1): [B or 1, H or 1, r], -1 where fewer.

        >>> from regard.core.mask import causal, window
        >>> (causal() & window(4)).row(1)
        tensor([[[0, 1]]])
        """
        seen = self.dense(1, t + 1 if m is None else m, roles=roles, offset=t)[:, :, 0]
        most = int(seen.sum(-1).max()) if seen.numel() else 0
        keys = torch.argsort(~seen, dim=-1, stable=True)[..., :most]
        return keys.masked_fill(~seen.gather(-1, keys), -1)

    def blocks(
        self, n: int, m: int | None = None, block: int = 64, *, roles: Roles | Sides | None = None,
        offset: int | None = None,
    ) -> Blocks:  # fmt: skip
        """Which tiles of block x block are empty, partial or full, one row of tiles at a time: never n x m at once.

        >>> from regard.core.mask import causal
        >>> causal().blocks(4, block=2).kind[0, 0]
        tensor([[1, 0],
                [2, 1]], dtype=torch.int8)
        """
        require(block >= 1, "block >= 1", block=block)
        require(n >= 1, "n >= 1", n=n)
        m = n if m is None else m
        asked = Question(self, n, m, block, block, self._start(n, m, offset, roles), self._sides(roles))
        return Blocks(asked.kinds(), n, m, block)

    def tiled(
        self, n: int, m: int, block_q: int, block_k: int, *, roles: Roles | Sides | None = None,
        offset: int | None = None, most: float = 1.0, device: Any = None,
    ) -> Tiled | None:  # fmt: skip
        """The tiles that are read, and the masks inside partial ones; None where more than `most` of all are read."""
        asked = Question(
            self, n, m, block_q, block_k, self._start(n, m, offset, roles), self._sides(roles), device
        )
        return asked.tiled(most)

    def blind(
        self, n: int, m: int | None = None, *, roles: Roles | Sides | None = None, offset: int | None = None
    ) -> Tensor:
        """The queries that see no key at all, as rows (b, h, query): what a softmax would turn into NaN.

        >>> from regard.core.mask import causal
        >>> (~causal()).blind(3)
        tensor([[0, 0, 2]])
        """
        seen = [strip.any(-1) for strip in self._strips(n, n if m is None else m, 256, roles, offset)]
        return (~torch.cat(seen, dim=2)).nonzero()

    def flex(
        self, *, roles: Roles | Sides | None = None, offset: int = 0, k_index: Tensor | None = None,
        heads: int | None = None,
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:  # fmt: skip
        """mask_mod(b, h, q, k) for FlexAttention; `k_index` [B, G, n] is the true index of stored keys."""
        heads = self._check_heads(heads) or heads
        sides = self._sides(roles)
        if k_index is None:
            return lambda b, h, q, k: self(Coordinates(b, h, q + offset, k, sides))
        stored = _per_head(k_index)
        require(
            stored.shape[1] == 1 or heads,
            "heads says how many query heads share the stored keys",
            k_index=stored,
        )
        share = (heads or 1) // stored.shape[1]

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            rows = stored[b] if stored.shape[0] > 1 else stored[0]
            true = (rows[h // share] if stored.shape[1] > 1 else rows[0])[k]
            return self(Coordinates(b, h, q + offset, true.clamp(min=0), sides)) & (true >= 0)

        return mask_mod

    def block_mask(
        self, n: int, m: int | None = None, *, heads: int | None = None, roles: Roles | Sides | None = None,
        offset: int | None = None, block: int = 128, device: Any = "cpu",
    ) -> BlockMask:  # fmt: skip
        """FlexAttention's BlockMask of this mask."""
        m = n if m is None else m
        predicate = self.flex(roles=roles, offset=self._start(n, m, offset, roles), heads=heads)
        batch = self._batch(self._sides(roles), None) if self.needs else None
        return create_block_mask(predicate, batch, self.heads, n, m, device=device, BLOCK_SIZE=block)

    def _evaluate(self, q: Tensor, k: Tensor, roles: Any, batch: int | None, heads: int | None) -> Tensor:
        sides = self._sides(roles, q, k)
        b = torch.arange(self._batch(sides, batch), device=q.device).view(-1, 1, 1, 1)
        h = torch.arange(self._check_heads(heads) or 1, device=q.device).view(1, -1, 1, 1)
        # a rule of queries alone, or of keys alone, says it for all pairs
        every = torch.ones_like(q, dtype=torch.bool) & torch.ones_like(k, dtype=torch.bool)
        return self(Coordinates(b, h, q, k, sides)) & every

    def _strips(self, n: int, m: int, block: int, roles: Any, offset: int | None) -> Iterator[Tensor]:
        q, k = self._indices(n, m, offset, roles, None)
        for strip in q.split(block, dim=2):
            yield self._evaluate(strip, k, roles, None, None)

    def _indices(
        self, n: int, m: int | None, offset: int | None, roles: Any, device: Any
    ) -> tuple[Tensor, Tensor]:
        """True indices of n queries [1, 1, n, 1] and m keys [1, 1, 1, m]."""
        m = n if m is None else m
        start = self._start(n, m, offset, roles)
        if device is None:
            side = roles[1] if isinstance(roles, tuple) else roles
            device = side[side.names[0]].device if side is not None and side.names else None
        q = torch.arange(start, start + n, device=device).view(1, 1, -1, 1)
        return q, torch.arange(m, device=device).view(1, 1, 1, -1)

    def _start(self, n: int, m: int, offset: int | None, roles: Any) -> int:
        """The true index of query 0."""
        require(offset is None or offset >= 0, "offset >= 0, the true index of query 0", offset=offset)
        if offset is not None:
            return offset
        start = 0 if isinstance(roles, tuple) else m - n
        rule = "every query has its labels: no more queries than keys, or an offset"
        require(not self.needs or start >= 0, rule, queries=n, keys=m)
        return start

    def _sides(self, roles: Roles | Sides | None, q: Tensor | None = None, k: Tensor | None = None) -> Sides:
        sides = roles if isinstance(roles, tuple) else (roles, roles)
        for side, index, tokens in zip(sides, (q, k), ("queries", "keys"), strict=True):
            for name in self.needs:
                if side is None or name not in side:
                    reason = "no roles were given" if side is None else f"given: {', '.join(side) or 'none'}"
                    raise KeyError(f"{self!r} needs the role {name!r} of the {tokens}; {reason}")
            if self.needs and side is not None and index is not None:
                check_labelled(side, index)
        return sides

    def _batch(self, sides: Sides, batch: int | None) -> int:
        rows = max([1, *(side.batch for side in sides if side is not None)]) if self.needs else 1
        require(
            batch is None or rows in (1, batch), "roles have the rows of the batch", roles=rows, batch=batch
        )
        return rows

    def _check_heads(self, heads: int | None) -> int | None:
        same = self.heads is None or heads in (None, self.heads)
        require(same, "the heads of the mask are the heads of the layer", mask=self.heads, layer=heads)
        return self.heads


def check_labelled(roles: Roles, index: Tensor) -> None:
    """Every token at these indices has its labels; not looked at while torch.compile traces."""
    if index.numel() and not torch.compiler.is_compiling():
        top, length = int(index.max()), roles.length
        require(top < length, "every token has its labels: index < labelled", index=top, labelled=length)


def _per_head(index: Tensor) -> Tensor:
    """[n], [B, n] or [B, G, n] as [B, G, n]."""
    require(index.dim() in (1, 2, 3), "an index is [n], [B, n] or [B, heads, n]", index=index)
    return index.view(1, 1, -1) if index.dim() == 1 else index[:, None] if index.dim() == 2 else index


def _spread(index: Tensor, heads: int) -> Tensor:
    """KV heads repeated for the query heads that share them."""
    kv_heads = index.shape[1]
    if kv_heads in (1, heads):
        return index
    require(heads % kv_heads == 0, "query heads are a multiple of KV heads", heads=heads, kv_heads=kv_heads)
    return index.repeat_interleave(heads // kv_heads, dim=1)


__getattr__ = moved(__name__, {"Place": "regard.core.lowering:Coordinates"})
