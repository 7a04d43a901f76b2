"""VTC-CLS: what the vision tower's class token looks at, over several layers, says which tokens stay.

    s_p = Σ_{l = start .. f} 1/H Σ_h A_{l,h}[class, p]        (or the least, or the greatest of the layers)
    the k highest s_p stay, in the order of the image, before the projector

where A_{l,h} are the softmax weights of head h of the tower's layer l, f is the layer that is projected, and k the
budget. One layer alone can miss what another looks at; with start = f it is that layer's attention alone.

>>> import torch
>>> seen = torch.tensor([[[0.5, 0.3, 0.1, 0.1]], [[0.0, 0.3, 0.3, 0.4]]])  # [L, H, P]; sums 0.5, 0.6, 0.4, 0.5
>>> measure(seen, Config(keep=2)), measure(seen, Config(keep=2, ensemble="min"))  # least 0.0, 0.3, 0.1, 0.1
(tensor([0, 1]), tensor([1, 2]))
>>> measure(seen, Config(keep=2, ensemble="max"))  # greatest 0.5, 0.3, 0.3, 0.4
tensor([0, 3])
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.tokens import TokensPage
from regard.ops.images import Images, ImageView, Reduced, count_of, highest


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.25  # share, or number, of each image's tokens that stay
    start: int = -3  # first layer that counts, negative from the end; before the first: the first
    # s_p of what the layers give: their sum, the least or the greatest of them
    ensemble: Literal["sum", "min", "max"] = "sum"
    without_class: Literal["refuse", "received"] = (
        "refuse"  # "received": the mean that patches receive, there
    )

    def __post_init__(self) -> None:
        count_of(self.keep, 1)


def layers_of(view: ImageView, start: int) -> range:
    """Layers that count, negative from the end."""
    first = start if start < 0 else start - view.tower_layers
    rule = "start is a layer of the tower, not after the one that is projected"
    require(first <= view.feature_layer, rule, start=start, projected=view.feature_layer)
    return range(max(first, -view.tower_layers), view.feature_layer + 1)


def measure(attention: Tensor, cfg: Config | None = None) -> Tensor:
    """[k] numbers of the patches that stay, ascending, of weights [L, H, P]."""
    attention, cfg = attention if attention.dtype == torch.float64 else attention.float(), cfg or Config()
    by_layer = attention.mean(1)  # [L, P]
    scores = {"sum": by_layer.sum(0), "min": by_layer.amin(0), "max": by_layer.amax(0)}[cfg.ensemble]
    return highest(scores, count_of(cfg.keep, attention.shape[-1]))


def before(images: Images, cfg: Config) -> list[Reduced]:
    def of(view: ImageView) -> Reduced:
        weights = [view.attended(layer, cfg.without_class) for layer in layers_of(view, cfg.start)]
        return Reduced(measure(torch.stack(weights), cfg))

    return [of(view) for view in images]


def reference(attention: Tensor, cfg: Config | None = None) -> Tensor:
    """By the definition: exact sums over heads and layers, the best patch taken out one by one."""
    cfg, layers = cfg or Config(), []
    for heads in attention.tolist():
        layers.append([sum(map(Fraction, column)) for column in zip(*heads, strict=True)])
    joined: Callable = {"sum": sum, "min": min, "max": max}[cfg.ensemble]
    scores = {p: joined(column) for p, column in enumerate(zip(*layers, strict=True))}
    share = isinstance(cfg.keep, float) and cfg.keep <= 1
    taken: list[int] = []
    for _ in range(min(len(scores), ceil(Fraction(str(cfg.keep)) * (len(scores) if share else 1)))):
        taken.append(max(sorted(scores.keys() - taken), key=lambda p: scores[p]))  # the first of equal ones
    return torch.tensor(sorted(taken))


def cases(seed: int) -> Iterable[tuple]:
    """Each ensemble; one layer; equal scores; a single patch; budgets in shares and in tokens; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(2).softmax(-1)

    yield (drawn(2, 4, 64),)
    yield drawn(5, 4, 49), Config(keep=0.1, ensemble="min")
    yield drawn(5, 4, 49).float(), Config(keep=6, ensemble="max")
    yield drawn(1, 2, 10), Config(keep=0.5)
    yield drawn(3, 2, 1), Config(keep=0.25)
    yield drawn(3, 2, 12), Config(keep=1.0)
    steps = torch.randint(0, 3, (4, 2, 24), generator=g) / 8  # exact in binary, so equal scores are equal
    for ensemble in ("sum", "min", "max"):
        yield steps, Config(keep=7, ensemble=ensemble)


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 3, "start": 0, "ensemble": "max"},),
    card=Card(
        title="VTC-CLS",
        paper="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
        year=2024,
        idea="attention of the vision tower's class token, summed over its last layers, says which tokens stay",
        cost="one row of attention weights of each layer that counts; the decoder reads k tokens for P",
        needs=("vision-language model", "a tower with a class token"),
        lineage=("fastervlm",),
        neutral={"keep": 1.0},
        caveat="start and the number of tokens are mandatory in the released code; the default here, the projected "
        "layer and the one before it, is ours. The released code sums, takes one image at a time, and gives the kept "
        "tokens new positions without gaps: those that it computes from the image are not used. Here they hold the "
        "positions that they had. without_class='received' is not the paper's",
    ),
)
