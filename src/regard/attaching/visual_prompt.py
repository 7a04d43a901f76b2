"""A prompt with images while it is reduced: where its visual tokens stand and what is left of them."""

from dataclasses import dataclass, field

from torch import Tensor

from regard.attaching.towers import Layout
from regard.core import require
from regard.ops import View


@dataclass(eq=False)
class Prompt:
    """A forward with images: where its visual tokens stand, which are left, and what the layer before saw.

    where    by text, the columns of its visual tokens; `alive` their numbers that are left
    columns  [B, n] what of the forward's N columns is still computed; None: all
    """

    where: list[Tensor]
    images: list[list[Layout]]
    alive: list[Tensor]
    new: int
    columns: Tensor | None = None
    view: View | None = None
    dropped: Tensor | None = None  # [B, N] bool: hidden from the layer that runs
    memory: list[dict] = field(default_factory=list)
    noted: set[int] = field(default_factory=set)  # ledger layers, by id, that know what is dropped


def at_index_of(hidden: Tensor, index: Tensor) -> Tensor:
    """[B, g, 1, n] bool of hidden [B, tokens] at true indices [b, g, n]; what came later is not hidden."""
    index = index.expand(len(hidden), -1, -1)
    inside = (index >= 0) & (index < hidden.shape[1])
    flat = index.clamp(0, hidden.shape[1] - 1).flatten(1)
    return (hidden.gather(1, flat).view(index.shape) & inside)[:, :, None]


def picked(x: Tensor, columns: Tensor, dim: int, new: int) -> Tensor:
    """x with the columns [B, n] of its dimension of `new` tokens; texts lie in the dimension before it, or are one."""
    if x.dim() == 1:
        x, dim = x[None], 1
    if x.shape[dim] != new:
        return x
    if x.shape[dim - 1] == 1 and len(columns) > 1:
        x = x.expand(*x.shape[: dim - 1], len(columns), *x.shape[dim:])
    shape = [1] * x.dim()
    shape[dim - 1], shape[dim] = columns.shape
    return x.take_along_dim(columns.view(shape), dim)


def shared_out(images: list[Layout], where: list[Tensor]) -> list[list[Layout]]:
    """The images of each text, in order: as many as its visual tokens take."""
    rest, found = list(images), []
    for text, tokens in enumerate(where):
        own: list[Layout] = []
        while sum(at.tokens for at in own) < len(tokens) and rest:
            own.append(rest.pop(0))
        held = sum(at.tokens for at in own)
        require(
            held == len(tokens),
            "a text holds the tokens of whole images",
            text=text,
            tokens=len(tokens),
            of_images=held,
        )
        found.append(own)
    require(not rest, "every image stands in a text", images=len(rest))
    return found
