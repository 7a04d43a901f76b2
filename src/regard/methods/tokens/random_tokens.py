"""Random tokens: a share of the visual tokens, drawn at random. What every other way of choosing must beat.

    u_p ~ U(0, 1);  the k tokens of highest u_p stay, in the order of the image

where p is a visual token and k the budget: every set of k tokens is as likely as any other. The same image at the same
place of a prompt draws the same, so that what a table says can be said again.

>>> import torch
>>> measure(torch.tensor([0.3, 0.9, 0.1, 0.5]), Config(keep=0.5))
tensor([1, 3])
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card
from regard.kinds.tokens import TokensPage
from regard.ops.images import Images, ImageView, Reduced, count_of, highest


@dataclass(frozen=True)
class Config:
    keep: float | int = 0.25  # share, or number, of each image's tokens that stay
    seed: int = 0  # another one is another draw

    def __post_init__(self) -> None:
        count_of(self.keep, 1)


def measure(draws: Tensor, cfg: Config | None = None) -> Tensor:
    """[k] numbers of the tokens that stay, ascending, of draws [P]."""
    cfg = cfg or Config()
    return highest(draws, count_of(cfg.keep, len(draws)))


def before(images: Images, cfg: Config) -> list[Reduced]:
    def of(view: ImageView) -> Reduced:
        g = torch.Generator().manual_seed(view.seed + 104729 * cfg.seed)
        return Reduced(measure(torch.rand(view.tokens, generator=g), cfg).to(view.features.device))

    return [of(view) for view in images]


def reference(draws: Tensor, cfg: Config | None = None) -> Tensor:
    """By the definition: a token stays if fewer than k others come before it."""
    given, cfg = draws.tolist(), cfg or Config()
    count = count_of(cfg.keep, len(given))
    ranks = [sum(y > x or (y == x and j < i) for j, y in enumerate(given)) for i, x in enumerate(given)]
    return torch.tensor([i for i, rank in enumerate(ranks) if rank < count])


def cases(seed: int) -> Iterable[tuple]:
    """Shares and numbers of tokens; one token; all; equal draws."""
    g = torch.Generator().manual_seed(seed)
    yield (torch.rand(64, generator=g),)
    yield torch.rand(63, generator=g), Config(keep=0.1)
    yield torch.rand(1, generator=g), Config(keep=0.1)
    yield torch.rand(12, generator=g), Config(keep=1.0)
    yield torch.rand(12, generator=g), Config(keep=5)
    yield torch.randint(0, 3, (20,), generator=g) / 4, Config(keep=9)


METHOD = TokensPage(
    config=Config,
    before=before,
    measure=measure,
    reference=reference,
    cases=cases,
    test_settings=({"keep": 3},),
    card=Card(
        title="Random tokens",
        paper="none: a control",
        year=2024,
        idea="visual tokens stay by chance: what every choice has to beat",
        cost="P random numbers; the decoder reads k tokens for P",
        needs=("vision-language model",),
        neutral={"keep": 1.0},
        caveat="strong where neighbours say the same; one draw is one sample, so average over seeds",
    ),
)
