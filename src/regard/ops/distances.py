"""Scores of distances (Transformer-XL, arXiv:1901.02860): what a query makes of how far away a key is.

    b_ij = q_i · W_r r_{i-j} · scale        r_d = (sin ω_f d, cos ω_f d), ω_f = base^(-f/F), f < F

There are only N + M distances, so q_i is asked about each of them once, and what it says is moved to the keys that
stand there. Hidden keys are not counted.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.call import Call
from regard.ops.softmax import at_least_float32, scores

BASE = 10_000.0


class Distances:
    """The scores of queries q [B, H, N, D], the last of as many keys, block by block; W_r [H, D, 2F] is learned."""

    def __init__(self, q: Tensor, w_r: Tensor, call: Call, *, scale: float, keys: int) -> None:
        self.q, self.scale, self.causal = q, scale, call.pattern == "causal_self"
        self.keys, self.mask, self.w_r = keys, call.key_mask, at_least_float32(w_r)
        # from the farthest key behind to the farthest ahead
        far = torch.arange(keys - 1, -1 if self.causal else -keys, -1, device=q.device, dtype=torch.float64)
        waves = self.w_r.shape[2] // 2
        angle = far[:, None] * BASE ** (-torch.arange(waves, device=q.device).double() / waves)
        self.r = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.w_r.dtype)  # [L, 2F]
        # W_r first meets what it has fewer of, queries or distances
        self.table = None if q.shape[2] <= q.shape[3] else (self.r @ self.w_r.mT).to(q.dtype)[None]

    def scores(self, rows: slice, upto: int) -> Tensor:
        """[B, H, rows, upto]: of these queries against the first keys; what causality hides is of no meaning."""
        n, m = self.q.shape[2], self.keys
        last = m - n + rows.stop
        cut = slice(m - last, None if self.causal else 2 * m - 1 - (m - n + rows.start))
        found = self.at(rows, slice(None) if self.mask is not None else cut)
        if self.mask is None:
            return shifted(found)[..., :upto]
        place = (self.mask.cumsum(-1) - 1).clamp(min=0)
        far = place[..., m - n :][..., rows, None] - place[..., None, :upto]
        far = far.clamp(min=0) if self.causal else far
        return found.gather(3, (m - 1 - far).expand(*found.shape[:3], -1))

    def at(self, rows: slice, cut: slice) -> Tensor:
        """[B, H, rows, L]: the scores of these queries at the distances of this part of r."""
        q = self.q[:, :, rows]
        if self.table is not None:
            return scores(q, self.table[:, :, cut], self.scale)
        turned = at_least_float32(q) @ self.w_r
        return turned @ self.r[cut].mT * self.scale


def shifted(x: Tensor) -> Tensor:
    """Row i of n moved to the left by n - 1 - i, so that what is at a distance stands at its key."""
    *lead, n, m = x.shape
    padded = pad(x, (1, 0)).reshape(*lead, m + 1, n)
    return padded[..., 1:, :].reshape(*lead, n, m)
