"""Tokens in their places: what lies in blocks is the text, not the padded row.

Blocks begin at places of the text, the count of real tokens before, so that padding anywhere, and a prompt that comes
in parts, leave every block where it was. Hidden keys go behind the others, and so do their queries: they are padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Unsupported
from regard.core.call import Call
from regard.ops.topk import gather_rows

BY_HEAD = "keys hidden by head: all heads choose blocks of one text"


@dataclass(frozen=True, eq=False)
class Placed:
    """Queries [B, H, n, D], keys and values [B, G, M, ...] in order of place.

    start    [B] place of the first row of q, a multiple of the block of queries where the text asks itself
    length   [B] keys that are there, the first ones
    q_there  [B, n] bool: rows of q that are queries; None: all are.   k_there  [B, M] bool, the same of the keys
    causal   whether the query of place p sees keys up to place p
    came     [B, N] the row of q that each query of the call went to; None: they are its last N rows
    unrotated  queries and keys before rotary positions turned them, in the same order, where the call has them
    """

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor
    q_there: Tensor | None
    k_there: Tensor | None
    causal: bool
    queries: int
    came: Tensor | None = None
    unrotated: tuple[Tensor, Tensor] | None = None

    def back(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] in the call's order, of [B, H, n, ...]; what was hidden is zero."""
        if self.came is None:
            return x[:, :, x.shape[2] - self.queries :]
        rows = gather_rows(x if x.dim() == 4 else x[..., None], self.came[:, None])
        rows = rows.masked_fill((self.came < 0)[:, None, :, None], 0)
        return rows if x.dim() == 4 else rows[..., 0]

    def asked(self) -> tuple[Tensor, Tensor | None]:
        """(places [B, 1, N, 1] of the call's queries, 0 for hidden ones, and which are hidden; None: no one is)."""
        if self.came is None:
            last = self.start + self.q.shape[2]
            place = last[:, None] + torch.arange(-self.queries, 0, device=last.device)
            return place[:, None, :, None], None
        hidden = (self.came < 0)[:, None, :, None]
        return (self.start[:, None] + self.came)[:, None, :, None].masked_fill(hidden, 0), hidden

    def rows(self, block: int) -> int:
        """Blocks of queries."""
        return -(-self.q.shape[2] // block)

    def columns(self, block: int) -> int:
        """Blocks of keys."""
        return -(-self.k.shape[2] // block)

    def first(self, block: int) -> Tensor:
        """[B, 1, I, 1] place of the first query of each block."""
        return (self.start[:, None] + torch.arange(self.rows(block), device=self.q.device) * block)[
            :, None, :, None
        ]

    def last(self, block: int, rows: int) -> Tensor:
        """[B, 1, I, 1] bool: blocks of queries that hold any of the last `rows` of the text."""
        end = self.length[:, None, None, None] if self.causal else self.queries
        return self.first(block) + block > end - rows

    def allowed(self, block_q: int, block_k: int) -> Tensor:
        """[B, 1, I, J] bool: blocks that hold a key which some query of the block may see."""
        at = torch.arange(self.columns(block_k), device=self.q.device) * block_k
        seen = (at < self.length[:, None])[:, None, None]
        if not self.causal:
            return seen.expand(-1, -1, self.rows(block_q), -1)
        return seen & (at < self.first(block_q) + block_q)


def placed(q: Tensor, k: Tensor, v: Tensor, call: Call, block: int) -> Placed:
    """The tokens of a call in their places, query blocks beginning at multiples of `block`; keys are all so far."""
    causal = call.pattern == "causal_self"
    if call.pair_mask is not None:
        raise Unsupported("a mask of pairs: blocks of keys are chosen by the data; mask keys instead")
    if call.key_mask is not None:
        return moved(q, k, v, call, block, causal)
    n, m = q.shape[2], k.shape[2]
    before = m - n if causal else 0
    lead = before % block
    there = None if lead == 0 else (torch.arange(n + lead, device=q.device) >= lead).expand(len(q), -1)
    start = torch.full((len(q),), before - lead, device=q.device)
    length = torch.full((len(q),), m, device=q.device)
    ahead = lambda x: F.pad(x, (0, 0, lead, 0)) if lead else x  # noqa: E731
    raw = None if call.unrotated is None else (ahead(call.unrotated[0]), call.unrotated[1])
    return Placed(ahead(q), k, v, start, length, there, None, causal, n, unrotated=raw)


def moved(q: Tensor, k: Tensor, v: Tensor, call: Call, block: int, causal: bool) -> Placed:
    """The same where keys are hidden: real ones first, by row of the batch."""
    mask = call.key_mask
    if mask is None or mask.shape[1] != 1:
        raise Unsupported(BY_HEAD)
    real = mask[:, 0].expand(len(q), -1)
    order = torch.argsort(~real, dim=-1, stable=True)
    k, v = (gather_rows(t, order[:, None]) for t in (k, v))
    raw_q, raw_k = call.unrotated or (None, None)
    raw_k = None if raw_k is None else gather_rows(raw_k, order[:, None])
    length = real.sum(-1)
    there = torch.arange(k.shape[2], device=k.device) < length[:, None]
    n = q.shape[2]
    if call.cross:
        raw = None if raw_k is None else (raw_q, raw_k)
        return Placed(q, k, v, torch.zeros_like(length), length, None, there, causal, n, unrotated=raw)
    before = real[:, : real.shape[1] - n].sum(-1)
    start = before // block * block
    came = real.cumsum(-1)[:, real.shape[1] - n :] - 1 - start[:, None]
    came = came.masked_fill(~real[:, real.shape[1] - n :], -1)
    # a graph is told no number of the data: the most that there may be
    most = min(block - 1, k.shape[2] - n)
    room = n + (most if torch.compiler.is_compiling() else int((before - start).max()))
    went = came.new_full((len(q), room + 1), -1)
    went.scatter_(1, came.masked_fill(came < 0, room), torch.arange(n, device=q.device).expand(len(q), -1))
    went = went[:, :room]
    to_place = lambda x: gather_rows(x, went[:, None]).masked_fill((went < 0)[:, None, :, None], 0)  # noqa: E731
    raw = None if raw_k is None else (to_place(raw_q), raw_k)
    return Placed(to_place(q), k, v, start, length, went >= 0, there, causal, n, came, raw)
