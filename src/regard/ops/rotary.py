"""Rotary positions: pairs of channels turned by an angle that grows with the place."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions on x [B, H, N, D], halves paired as in Llama; positions [B, N]. An odd last channel stays."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = positions[:, None, :, None].to(wide) * frequency  # [B, 1, N, D/2]
    a, b, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)
