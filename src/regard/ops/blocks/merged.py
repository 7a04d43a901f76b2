"""Attention over two sets of keys from attention over each, by the logarithms of their sums."""

from torch import Tensor
from torch.nn import functional as F

Part = tuple[Tensor, Tensor]  # out [B, H, N, E] in float32 at least, lse [B, H, N]


def merged(a: Part, b: Part) -> Part:
    """Both together; every query has seen a key in a, b may be empty: 0 and -inf."""
    share = (b[1] - a[1]).sigmoid()
    return a[0].lerp(b[0], share[..., None].to(a[0].dtype)), a[1] + F.softplus(b[1] - a[1])
