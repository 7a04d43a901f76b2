"""MSA-Conv: self-attention in the place of a convolution's products, on the same window, padding included.

    W(i) = the w x w places around i, d apart, of the image with zeros around it
    o_i  = Σ_j softmax_j(q_i·k_j / √C) v_j     over all w² of W(i); beyond the image k = 0 and v = 0

As in a convolution the padding counts: a place beyond the border has the score 0 and the value 0 and stays in the
softmax, so at a border the weights of the image sum to less than one. The window neither moves inwards, as in
neighbourhood attention, nor loses its padded places. No output hangs on the size of the image, and any size is taken.

Worked by hand, w = 3 on a 3 x 3 image of the values 1 to 9, all scores 0: the weights are 1/9, so the middle gets
45/9 = 5, the first corner (1 + 2 + 4 + 5)/9 and the place beside it (1 + 2 + 3 + 4 + 5 + 6)/9. Two apart the corner
reads the corners: (1 + 3 + 7 + 9)/9.

>>> import torch
>>> q, v = torch.zeros(1, 1, 9, 1), torch.arange(1.0, 10).view(1, 1, 9, 1)
>>> out = reference(q, q, v, Config(), Call("self", grid=(3, 3)))[0]
>>> (out.flatten()[[4, 0, 1]] * 9).tolist()
[45.0, 12.0, 21.0]
>>> (reference(q, q, v, Config(dilation=2), Call("self", grid=(3, 3)))[0][0, 0, 0] * 9).tolist()
[20.0]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, K, Out, Q, V, require
from regard.core.call import Call
from regard.core.grid import OnGrid, Sides
from regard.kinds.mechanism import Mechanism
from regard.ops import exact, heads_of
from regard.ops.grid import window_attention, window_of


@dataclass(frozen=True)
class Config:
    window: int = 3  # w, the side of the kernel
    dilation: int = 1  # d
    scale: float | None = None  # None: D ** -0.5

    def __post_init__(self) -> None:
        require(
            self.window > 0 and self.window % 2 == 1, "an odd window: it has a middle", window=self.window
        )
        require(self.dilation >= 1, "dilation >= 1", dilation=self.dilation)


def fits(cfg: Config, sides: Sides) -> None:
    """Any image will do."""


def local(cfg: Config) -> tuple[int, int]:
    """No place further away than half a window; all windows are alike."""
    return cfg.dilation * (cfg.window // 2), 1


def reference(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    q_h, k_h, v_h = exact(q, heads_of(k, q.shape[1]), heads_of(v, q.shape[1]))
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    out = []
    for i in range(q.shape[2]):
        near, there = window_of(i, call.sides, cfg.window, cfg.dilation)
        beyond = ~torch.tensor(there, device=q.device)[:, None]
        keys, values = (t[:, :, near].masked_fill(beyond, 0) for t in (k_h, v_h))  # [B, H, w², D]
        s = (keys @ q_h[:, :, i, :, None])[..., 0] * scale  # [B, H, w²]
        out.append((s.softmax(-1)[..., None] * values).sum(2))
    return torch.stack(out, dim=2).to(v.dtype), None


def fast(q: Q, k: K, v: V, cfg: Config, call: Call) -> tuple[Out, None]:
    scale = q.shape[-1] ** -0.5 if cfg.scale is None else cfg.scale
    return window_attention(q, k, v, call.sides, cfg.window, cfg.dilation, scale), None


def own_value(q: Q, k: K, v: V, call: Call) -> Tensor:
    """A window of one place reads that place."""
    return heads_of(v, q.shape[1])


METHOD = Mechanism(
    config=Config,
    reference=reference,
    fast=fast,
    patterns=("self",),
    unsupported=dict.fromkeys(
        ("causal_self", "cross", "causal_cross"), "a window is one of the image that attends to itself"
    ),
    grid=OnGrid(fits, local=local),
    order_aware=True,
    neutral_base=own_value,
    test_settings=({"dilation": 2, "scale": 0.4}, {"window": 5}, {"window": 7, "dilation": 2}),
    card=Card(
        title="MSA-Conv (Vision Transformer in Convolution)",
        paper="arXiv:2310.04134",
        year=2023,
        idea="a convolution whose products are attention over its window; padding stays in the softmax as zeros",
        cost="O(N·w²·(D + E)) time",
        state="none",
        needs=("qkv", "cnn-features"),
        lineage=("softmax", "fused_neighborhood_attention"),
        neutral={"window": 1},
        caveat=(
            "as in the released operator padded places stay in the softmax; it has one head and the scale C ** -0.5, "
            "here D ** -0.5 by head. What follows there belongs to a layer: dropout, the residual, a k x k convolution "
            "with its stride, a ReLU. Cyclic shifts of groups of features and inter-pooling are not here: no released "
            "code has them, and the abstract of the paper does not settle them. Windows are square and odd"
        ),
    ),
)
