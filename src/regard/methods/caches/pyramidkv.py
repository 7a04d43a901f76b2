"""PyramidKV: low layers hold many tokens, high layers few, and the mean over layers is the budget.

    b_{L-1} = w + r / β                            r = b - w of the budget b beside the w tokens that stay anyhow
    b_0     = w + 2 r - r / β                      at most the whole text; the top layer then gets what is left
    b_l     = b_0 - l (b_0 - b_{L-1}) / (L-1)      layer l of L: Σ_l b_l = L b

where attention spreads over the whole context in low layers and gathers on a few tokens in high ones (Cai et al., 2024:
information funnels upwards), so that equal budgets starve the former and waste the latter.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.cache import CachePage, allocating
from regard.ops import View


@dataclass(frozen=True)
class Config:
    beta: float = (
        20.0  # how many times smaller the top layer's part is than an equal one; 1: all parts are equal
    )

    def __post_init__(self) -> None:
        require(self.beta >= 1, "beta >= 1", beta=self.beta)


def part(layer: int, layers: int, mean: Tensor, sure: Tensor, text: Tensor, beta: float) -> Tensor:
    """[B] tokens of one layer, where `sure` of the `mean` stay in every layer and no layer needs more than the text.

    What is rounded off below is made up for above, so that all layers together have `layers` times the mean.

    >>> numbers = [torch.tensor([x]) for x in (110, 10, 1000)]
    >>> [int(part(layer, 4, *numbers, beta=20.0)) for layer in range(4)]  # 195 + 10 ... 5 + 10
    [205, 141, 79, 15]
    """
    rest = (mean - sure).double()
    most = (2 * rest - rest / beta).minimum((text - sure).double())
    step = (2 * most - 2 * rest) / max(1, layers - 1)
    below, here = (sure * i + most * i - step * (i * (i - 1) / 2) for i in (layer, layer + 1))
    return ((here + 1e-6).floor() - (below + 1e-6).floor()).long()


def allocate(view: View, score: Tensor, cfg: Config) -> Tensor:
    """[B, G] the same for all heads of a layer."""
    sure = (score == torch.finfo(score.dtype).max).sum(-1).amax(-1).minimum(view.budget)
    text = view.length() if view.window is None else view.length().clamp(max=view.window)
    tokens = part(view.layer, view.layers, view.budget, sure, text, cfg.beta)
    return tokens[:, None].expand(score.shape[:2])


METHOD = CachePage(
    config=Config,
    wrap=lambda page, cfg: allocating("pyramidkv", page, partial(allocate, cfg=cfg)),
    over="snapkv",
    patterns=("causal_self",),
    card=Card(
        title="PyramidKV",
        paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (arXiv:2406.02069)",
        year=2024,
        idea="budgets fall linearly from the first layer to the last, as attention gathers on fewer and fewer tokens",
        cost="nothing beyond the method below",
        state="as many tokens as the method below, in parts that fall with the layer",
        needs=("decoder-lm",),
        lineage=("snapkv",),
        neutral={"beta": 1.0},
        caveat="the paper's window counts in the budget here. Released code gives every layer the same as long as the "
        "prompt is shorter than twice the budget beside the window, and rounds the step between layers down, so that "
        "the mean exceeds the budget; here it is the budget, whatever the prompt. A layer that slides a window within "
        "the budget keeps all of it, so where only some layers slide one the mean is the budget but roughly",
    ),
)
