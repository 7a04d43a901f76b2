"""The parts around a mechanism: a norm, rotary positions, a short convolution, a gated channel mixer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core import Method


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, in float32 at least."""

    def __init__(self, *shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(*shape)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class Learned(nn.ParameterDict):
    """What a page learns, as its init gives it."""

    def __init__(self, method: Method, dims: dict[str, int]) -> None:
        super().__init__()
        # with underscores: a parameter is an attribute here, and may have any name
        self._method, self._dims = method, dims
        for name, value in self.drawn().items():
            self[name] = nn.Parameter(value, requires_grad=value.is_floating_point())

    def drawn(self) -> dict[str, Tensor]:
        """Initial values, drawn anew."""
        init = self._method.page.init
        return {} if init is None else init(self._method.config, self._dims)

    def tensors(self) -> dict[str, Tensor]:
        return {name: self[name] for name in self}


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ShortConvolution(nn.Module):
    """x + a depthwise convolution over neighbouring tokens of x [B, N, C]: causal, or centred.

    `tail` [B, kernel - 1, C] are the inputs of the last real tokens before x. Padding [B, N] False is left out.
    """

    def __init__(self, channels: int, kernel: int, causal: bool) -> None:
        super().__init__()
        self.kernel, self.causal = kernel, causal
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-1, 1) * kernel**-0.5)

    def forward(
        self, x: Tensor, token_mask: Tensor | None, tail: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x = x if token_mask is None else x * token_mask[..., None].to(x.dtype)
        left = self.kernel - 1 if self.causal else (self.kernel - 1) // 2
        if tail is None:
            tail = x.new_zeros(x.shape[0], left, x.shape[2])
        wide = torch.cat([tail, x], dim=1)
        padded = F.pad(wide, (0, 0, 0, self.kernel - 1 - left))
        mixed = F.conv1d(padded.mT, self.weight.to(x.dtype), groups=x.shape[2]).mT
        return x + mixed, self.last(wide, token_mask, left) if self.causal else None

    def last(self, wide: Tensor, token_mask: Tensor | None, keep: int) -> Tensor:
        """The last `keep` real tokens of tail and text; where padding follows the text, they end before it."""
        if token_mask is None or keep == 0:
            return wide[:, wide.shape[1] - keep :]
        n = token_mask.shape[1]
        # past the last real token
        end = keep + (torch.arange(1, n + 1, device=token_mask.device) * token_mask).amax(1)
        at = end[:, None] - keep + torch.arange(keep, device=token_mask.device)
        return wide.gather(1, at[..., None].expand(-1, -1, wide.shape[2]))
