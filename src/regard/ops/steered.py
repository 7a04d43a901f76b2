"""What a steering page sees of a model while it generates, and the streams that run beside it.

Letters: B texts, H heads, R query rows, n stored keys, E a head's width, d the model's, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """A pass of the same model beside the main one, on the same tokens at the same positions, with its own cache.

    name      under which its logits and records are known; "main" is the model's own pass
    hide      the role whose tokens no other token sees ("image": as if there were none, at unchanged positions)
    show      of the tokens that `hide` names, those numbers that stay visible: a function (memory) -> [B, n] bool
    pixels    (pixel values, generator) -> changed ones, or None: the same
    steered   whether the page's own edits act in it
    records   what is written down at the last token of the prompt, by layer: "z", "out", "mlp", "resid_post"
    once      it reads the prompt alone, and is not carried on while tokens are generated
    prefix    ids that stand before the prompt (after the first token)
    """

    name: str
    hide: str | None = None
    show: Callable[[Any], Tensor] | None = None
    pixels: Callable[[Tensor, torch.Generator], Tensor] | None = None
    steered: bool = False
    records: tuple[str, ...] = ()
    once: bool = False
    prefix: tuple[int, ...] = ()


@dataclass(eq=False)
class Steered:
    """Where a steering page acts: one call of one layer, in one stream.

    tower       "text" or "vision"
    layer       its number of `layers`
    phase       "prefill" or "decode"
    stream      "main", or the name of a stream of the page
    rows        [B, R] number of each query's token in its text, -1: padding
    heads       H
    keys        [B, n] column of each stored key among all tokens, padding counted; -1: none. Sliding layers drop keys
    role        (name) -> [B, n] bool: which stored keys have a role: "image", or one that `attach(roles=)` names
    row_role    (name) -> [B, R] bool: which queries have
    visible     [B, 1|H, R, n] bool: what each query sees; None: everything
    received    () -> [B, H, n] mean weight of each key over the queries that see it, before any edit (prefill)
    states      [B, R, d] the layer's input, for pages that read the residual
    grid        (rows, columns) of an image's tokens
    memory      what `prepare` gave for this prompt
    notes       a dict of this layer's own that lasts as long as the prompt
    seed        of whatever is drawn at random
    class_attention  (layer) -> [B, H, P] of the tower's class token on a text's visual tokens, for `prepare`
    early       (layer, normed=True) -> [B, V] what the head makes of a layer's output at the last token
    """

    layer: int
    layers: int
    phase: str
    stream: str = "main"
    tower: str = "text"
    rows: Tensor = None  # type: ignore[assignment]
    keys: Tensor = None  # type: ignore[assignment]
    role: Callable[[str], Tensor] = None  # type: ignore[assignment]
    row_role: Callable[[str], Tensor] = None  # type: ignore[assignment]
    visible: Tensor | None = None
    received: Callable[[], Tensor] = None  # type: ignore[assignment]
    states: Tensor | None = None
    grid: tuple[int, int] | None = None
    memory: Any = None
    notes: dict = field(default_factory=dict)
    seed: int = 0
    class_attention: Callable[[int], Tensor] = None  # type: ignore[assignment]
    early: Callable[..., Tensor] = None  # type: ignore[assignment]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 7919 * self.layer)


@dataclass(eq=False)
class Arranged:
    """One call of one layer, for a page with an attention of its own.

    q [B, H, N, D], k [B, G, n, D], v [B, G, n, E]    as the model has them, rotated; k and v of all that is stored
    q_at [B, N], k_at [B, n]    where the model's rotation put them
    real [B, n], asks [B, N]    which keys and queries are tokens and not padding
    labels                      (role) -> [B, n] integers, -1 where a token has no label
    turn                        (x [B, H, m, D], by [B, H, m]) -> x at positions `by` further on
    bare                        () -> (q, k) before rotation
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    q_at: Tensor
    k_at: Tensor
    real: Tensor
    asks: Tensor
    labels: Callable[[str], Tensor]
    turn: Callable[[Tensor, Tensor], Tensor]
    bare: Callable[[], tuple[Tensor, Tensor]]


# of one stream, what was recorded: quantity -> [layers, B, ...] at the last token of each prompt
Records = Mapping[str, Tensor]


def contrasted(logits: Tensor, other: Tensor, strength: float, cut: float) -> Tensor:
    """(1 + strength) logits - strength other, where the model's own probability is >= cut times the largest.

    The rest becomes -inf; cut = 0 keeps everything.

    >>> contrasted(torch.tensor([[2.0, 1.0, -4.0]]), torch.tensor([[2.0, 0.0, 0.0]]), 1.0, 0.1)
    tensor([[2., 2., -inf]])
    """
    mixed = (1 + strength) * logits - strength * other if strength else logits
    if not cut:
        return mixed
    floor = logits.max(-1, keepdim=True).values + torch.log(torch.tensor(cut, dtype=torch.float64)).to(logits)
    return mixed.masked_fill(logits < floor, -torch.inf)


def plainly_contrasted(
    row: Sequence[float], others: Sequence[Sequence[float]], strength: float, cut: float
) -> list[float]:
    """Probabilities of the next token by the definition, token by token, for references: each pass beside counts."""
    bar = max(row) + math.log(cut) if cut else -math.inf
    says = {t: x + math.fsum(strength * (x - y[t]) for y in others) for t, x in enumerate(row) if x >= bar}
    top = max(says.values())
    total = math.fsum(math.exp(x - top) for x in says.values())
    return [math.exp(says[t] - top) / total if t in says else 0.0 for t in range(len(row))]
