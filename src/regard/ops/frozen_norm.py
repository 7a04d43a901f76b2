"""A direction of the logits seen from before the final norm, whose scale is frozen: what is written there adds up.

    ⟨norm(x), u⟩ = Σ_c ⟨o_c, d⟩ (+ ⟨shift, u⟩)     x = Σ_c o_c,   d = (g ⊙ u) / √(mean x² + ε)

Of LayerNorm the mean is taken out of x and of g ⊙ u, which takes it out of every o_c.

>>> import torch
>>> x, u = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0])
>>> frozen_norm(u, x, eps=0)  # √12.5 = 3.5355
tensor([[0.2828, 0.0000]])
>>> (torch.tensor([[1.0, 4.0], [2.0, 0.0]]) @ frozen_norm(u, x, norm="layer", eps=0)[0]).tolist()  # of (-1/2, 1/2)
[-3.0, 2.0]
"""

from torch import Tensor

from regard.core import require

NORMS = ("rms", "layer")


def frozen_norm(
    direction: Tensor, residual: Tensor, gain: Tensor | None = None, norm: str = "rms", eps: float = 1e-6
) -> Tensor:
    """[B, width] of a direction [width] or [B, width], the residual [B, width] before the norm, its gain [width]."""
    require(norm in NORMS, f"norm is one of {NORMS}", norm=norm)
    same = direction.shape[-1] == residual.shape[-1]
    require(same, "a direction of the residual's width", direction=direction, residual=residual)
    seen = direction if gain is None else direction * gain
    if norm == "layer":
        seen = seen - seen.mean(-1, keepdim=True)
        residual = residual - residual.mean(-1, keepdim=True)
    return seen * (residual.square().mean(-1, keepdim=True) + eps).rsqrt()
