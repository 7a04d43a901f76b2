"""What a page that reduces visual tokens sees, and what it may answer.

Letters: P visual tokens of one image as the decoder is given them, of a text all its images' in order; N tokens of the
text; d width of the decoder; H heads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core.errors import Unsupported, require


@dataclass(frozen=True, eq=False)
class ImageView:
    """One image of a prompt, before the decoder sees it.

    features           [P, d] its tokens, after the projector
    grid               (rows, columns) of the tokens, rows * columns = P; None: they lie on no grid
    question           [Q, d] embeddings of the text's tokens that are of no image
    number, of         which of the prompt's images it is, from 0, and how many there are
    seed               of whatever is drawn at random: the same image in the same place draws the same
    padding            [P] share of each token's pixels that is padding; None: nothing is
    class_attention    (layer) -> [H, P] weights of the tower's class token on the patches at this layer (negative from
                       the end), pooled as the projector pools; Unsupported where the tower has no class token
    received           (layer) -> [H, P] mean weight that the patches receive from all queries
    tower_keys         (layer) -> [P, H·D] keys of the patches in the tower's attention, of all heads, pooled likewise
    tower_layers       how many layers the tower has
    feature_layer      the layer that is projected, negative from the end
    relevance          what the question has to do with the image, for pages that share a budget; None: unknown
    """

    features: Tensor
    grid: tuple[int, int] | None = None
    question: Tensor | None = None
    number: int = 0
    of: int = 1
    seed: int = 0
    padding: Tensor | None = None
    class_attention: Callable[[int], Tensor] = None  # type: ignore[assignment]
    received: Callable[[int], Tensor] = None  # type: ignore[assignment]
    tower_keys: Callable[[int], Tensor] = None  # type: ignore[assignment]
    tower_layers: int = 1
    feature_layer: int = -1
    relevance: float | None = None

    @property
    def tokens(self) -> int:
        return len(self.features)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def attended(self, layer: int, without_class: str) -> Tensor:
        """[H, P] `class_attention`; in a tower without a class token `received`, unless that is to "refuse"."""
        try:
            return self.class_attention(layer)
        except Unsupported:
            if without_class == "refuse":
                raise
            return self.received(layer)


@dataclass(frozen=True, eq=False)
class Reduced:
    """What stays of an image. keep [k] token numbers, ascending; features [k, d] in their place, None: as they were."""

    keep: Tensor
    features: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerView:
    """One decoder layer of a prompt's prefill, after it ran, in one text.

    layer, layers     its number, and how many there are
    alive             [n] numbers, ascending, among the text's visual tokens, of those that this layer saw
    image             [P] of which image each visual token of the text is, from 0
    padding           [P] share of padding of each, 0 .. 1
    states            [N, d] its output at the tokens that it saw, `visual` [N] bool: which of them are visual tokens
    question          [N] bool: text tokens after the last image;  the last token of all is states[-1]
    weights           (rows) -> [H, R, n] attention of this layer on the alive visual tokens, by rows: "last" (the last
                      token), "question", "visual" (the alive visual tokens themselves)
    scores            (rows) -> [H, R, n] before softmax and mask
    whole             () -> [H, N, N] attention weights of all tokens, for methods that rank by a graph over them
    seed              of whatever is drawn at random
    memory            what the page noted at earlier layers of this prompt; a dict of its own for each text
    """

    layer: int
    layers: int
    alive: Tensor
    image: Tensor
    states: Tensor
    visual: Tensor
    question: Tensor
    weights: Callable[[str], Tensor]
    scores: Callable[[str], Tensor]
    whole: Callable[[], Tensor]
    padding: Tensor | None = None
    seed: int = 0
    memory: dict = field(default_factory=dict)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1009 * self.layer)


Images = Sequence[ImageView]
Settings = Mapping[str, object]


def count_of(keep: float | int, tokens: int) -> int:
    """How many of so many tokens a budget keeps: a whole number is tokens, one in (0, 1] (a float) a share, rounded up.

    >>> count_of(0.25, 64), count_of(16, 64), count_of(100, 64), count_of(1.0, 64)
    (16, 16, 64, 64)
    >>> count_of(0, 64)
    Traceback (most recent call last):
    ...
    ValueError: must hold: a budget keeps a visual token or more (keep=0)
    """
    require(keep > 0, "a budget keeps a visual token or more", keep=keep)
    if (isinstance(keep, float) and not keep.is_integer()) or (keep == 1.0 and isinstance(keep, float)):
        require(keep <= 1, "a share of visual tokens is in (0, 1]", keep=keep)
        return min(tokens, max(1, math.ceil(keep * tokens - 1e-9)))
    return min(tokens, int(keep))


def grid_rows(rows: int, columns: int, count: int) -> int:
    """Rows of a coarser grid of `count` places whose cells are about as high as wide, none of more than `columns`.

    >>> grid_rows(4, 4, 4), grid_rows(2, 6, 3), grid_rows(1, 8, 5)
    (2, 1, 1)
    """
    wanted = math.floor(math.sqrt(count * rows / columns) + 0.5)
    return max(math.ceil(count / columns), min(rows, count, wanted))


def highest(scores: Tensor, count: int) -> Tensor:
    """[count] indices of the highest of [n] scores, ascending; of equal ones the earlier.

    >>> highest(torch.tensor([0.5, 2.0, 0.5, 1.0]), 3)
    tensor([0, 1, 3])
    """
    require(scores.dim() == 1, "a score for each token", scores=tuple(scores.shape))
    order = scores.float().argsort(descending=True, stable=True)
    return order[:count].sort().values
