"""Layer-wise relevance propagation through CNNs of layers one after the other; and plainly, for references.

R_i = Σ_j x_i w_ij / z_j R_j,  z_j = Σ_i x_i w_ij + b_j;  with `positive` linear layers have w⁺ for w and no bias
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core.errors import Unsupported

PASSED = (nn.ReLU, nn.Dropout, nn.Identity)
SUMS = (nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Flatten)


def relevance(
    net: nn.Sequential, images: Tensor, classes: Tensor, positive: bool = True, eps: float = 1e-9
) -> Tensor:
    """[B, C, H, W] of each class [B] in an image [B, C, H, W], through layers one after the other."""
    layers = [layer for layer in net.modules() if not isinstance(layer, nn.Sequential)]
    inputs = [images.detach()]
    with torch.no_grad():
        for layer in layers:
            inputs.append(layer(inputs[-1]))
    logits = inputs.pop()
    r = logits * F.one_hot(classes, logits.shape[1])
    for layer, x in zip(reversed(layers), reversed(inputs), strict=True):
        r = r if isinstance(layer, PASSED) else back(layer, x, r, positive, eps)
    return r


def back(layer: nn.Module, x: Tensor, r: Tensor, positive: bool, eps: float) -> Tensor:
    """The relevance of what a layer took, x times the gradient of z · (R / z)."""
    if not isinstance(layer, SUMS):
        known = ", ".join(kind.__name__ for kind in (*SUMS, *PASSED))
        raise Unsupported(f"relevance through {type(layer).__name__}; known: {known}")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        if isinstance(layer, nn.Linear) and positive:
            z = F.linear(x, layer.weight.clamp(min=0))
        else:
            z = layer(x)
        (slope,) = torch.autograd.grad(z, x, (r / away(z.detach(), eps)).detach())
    return x.detach() * slope


def away(z: Tensor, eps: float) -> Tensor:
    """z with eps added away from 0, and 1 for a z of 0, to which nothing came."""
    z = z + torch.where(z >= 0, eps, -eps)
    return z.where(z != 0, 1.0)


def dense(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(matrix [out, in], bias [out]) of a layer that takes x, numbers flat; of a maximum the one that x has."""
    if isinstance(layer, nn.MaxPool2d):
        k, at = layer.kernel_size, torch.arange(x.numel()).view(x.shape)
        windows = at.unfold(1, k, k).unfold(2, k, k).reshape(-1, k * k).tolist()  # type: ignore[operator]
        chosen = [max(window, key=lambda n: x.flatten()[n].item()) for window in windows]
        matrix = torch.eye(x.numel(), dtype=torch.float64)[chosen]
        return matrix, torch.zeros(len(chosen), dtype=torch.float64)
    bias = layer(torch.zeros_like(x)[None]).flatten()
    ones = torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)
    return (layer(ones).flatten(1) - bias).mT, bias


def shared_out(layer: nn.Module, x: Tensor, r: Tensor, positive: bool, eps: float) -> Tensor:
    matrix, bias = dense(layer, x)
    if isinstance(layer, nn.Linear) and positive:
        matrix, bias = matrix * (matrix > 0), 0 * bias
    parts = matrix * x.flatten()  # [out, in]
    z = parts.sum(1) + bias
    z = torch.tensor([n + eps if n >= 0 else n - eps for n in z.tolist()], dtype=torch.float64)
    z[z == 0] = 1
    return (parts / z[:, None] * r[:, None]).sum(0)
