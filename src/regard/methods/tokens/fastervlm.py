"""FasterVLM: of an image's tokens those stay that the vision tower's class token looks at most.

    s_p = 1/H Σ_h A_h[class, p]        A: softmax weights of the layer whose output is projected
    the k highest s_p stay, in the order of the image, and the rest never reaches the decoder

where p is a patch, h a head of the tower, and k the budget: `keep` of the image's tokens, a share or a number. The
score does not know the question, so that one pass of the tower, which runs anyway, is all that it costs.

>>> import torch
>>> seen = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.6, 0.0, 0.2, 0.2]])  # means 0.35, 0.25, 0.25, 0.15
>>> measure(seen, Config(keep=0.5)), measure(seen, Config(keep=1)), measure(seen, Config(keep=3))
(tensor([0, 1]), tensor([0]), tensor([0, 1, 2]))
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card
from regard.kinds.tokens import TokensPage
from regard.ops.images import Images, ImageView, Reduced, count_of, highest


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.25  # share, or number, of each image's tokens that stay
    layer: int | None = None  # of the tower, negative from the end; None: the one that is projected
    without_class: Literal["refuse", "received"] = (
        "refuse"  # "received": the mean that patches receive, there
    )

    def __post_init__(self) -> None:
        count_of(self.keep, 1)


def measure(attention: Tensor, cfg: Config | None = None) -> Tensor:
    """[k] numbers of the patches that stay, ascending, of weights [H, P]."""
    attention, cfg = attention if attention.dtype == torch.float64 else attention.float(), cfg or Config()
    return highest(attention.mean(0), count_of(cfg.keep, attention.shape[-1]))


def before(images: Images, cfg: Config) -> list[Reduced]:
    def of(view: ImageView) -> Reduced:
        layer = view.feature_layer if cfg.layer is None else cfg.layer
        return Reduced(measure(view.attended(layer, cfg.without_class), cfg))

    return [of(view) for view in images]


def reference(attention: Tensor, cfg: Config | None = None) -> Tensor:
    """By the definition: exact sums over heads, the best patch taken out one by one."""
    cfg, rows = cfg or Config(), [[Fraction(x) for x in head] for head in attention.tolist()]
    scores = {p: sum(column) for p, column in enumerate(zip(*rows, strict=True))}
    share = isinstance(cfg.keep, float) and cfg.keep <= 1
    taken: list[int] = []
    for _ in range(min(len(scores), ceil(Fraction(str(cfg.keep)) * (len(scores) if share else 1)))):
        taken.append(max(sorted(scores.keys() - taken), key=lambda p: scores[p]))  # the first of equal ones
    return torch.tensor(sorted(taken))


def cases(seed: int) -> Iterable[tuple]:
    """Many heads and one; equal scores; a single patch; budgets in shares, in tokens, above what there is; float32."""
    g = torch.Generator().manual_seed(seed)

    def drawn(heads: int, patches: int) -> Tensor:
        return torch.randn(heads, patches, generator=g, dtype=torch.float64).softmax(-1)

    yield (drawn(4, 64),)
    yield drawn(1, 63).float(), Config(keep=0.1)
    yield drawn(2, 1), Config(keep=0.01)
    yield drawn(3, 16), Config(keep=1.0)
    yield drawn(3, 16), Config(keep=40)
    steps = torch.randint(0, 3, (4, 24), generator=g) / 8  # exact in binary, so equal scores are equal
    yield steps, Config(keep=7)
    yield torch.full((2, 9), 0.125), Config(keep=0.5)


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 3},),
    card=Card(
        title="FasterVLM",
        paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
        year=2024,
        idea="the tokens that the vision tower's class token attends to most go to the decoder, the others do not",
        cost="one row of attention weights of one layer of the tower; the decoder reads k tokens for P",
        needs=("vision-language model", "a tower with a class token"),
        lineage=("fastv",),
        neutral={"keep": 1.0},
        caveat="budgets are rounded up where the released code takes a number of tokens, and of equal scores the "
        "earlier patch stays, where topk may take either. Kept tokens hold the positions that they had; the released "
        "code closes the gaps. Towers without a class token are refused unless without_class='received', which is not "
        "the paper's: on such towers the attention that patches receive can rank worse than chance",
    ),
)
