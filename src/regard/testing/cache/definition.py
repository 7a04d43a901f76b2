"""What a cache page does to one text, written out: the form in which a definition is given.

A `Definition` is asked about one text, layer by layer and forward by forward. Tokens are counted by place, 0 for the
first; there is no padding, no batch and no cache, only the queries, keys and values of all tokens so far. What it
answers are lists of tokens. `testing/cache/choice.py` holds pages to it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Merged = tuple[Tensor, Tensor, float]  # key [D], value [E], and how many tokens they stand for


@dataclass(frozen=True)
class Moment:
    """One layer of one text at one forward. Tensors are float64."""

    layer: int
    q: Tensor  # [H, n, D] of all tokens so far, at their places
    k: Tensor  # [G, n, D]
    v: Tensor  # [G, n, E]
    plain_q: Tensor  # [H, n, D] as projected, not rotated
    plain_k: Tensor  # [G, n, D]
    fed: int  # tokens of this forward, the last of the n
    scale: float
    budget: int  # tokens that may be held or read now
    # by KV head, ascending: tokens stored before, and those of this forward
    held: tuple[tuple[int, ...], ...]
    rotate: Callable[[Tensor, Tensor], Tensor]  # (x [m, D], positions [m]) -> x rotated on
    window: int | None = None  # tokens that a query of this layer sees, its own included

    @property
    def n(self) -> int:
        return self.q.shape[1]

    @property
    def decodes(self) -> bool:
        """Whether the forward is one token on a text that was begun."""
        return self.fed == 1 < self.n

    @property
    def new(self) -> range:
        """The tokens of this forward."""
        return range(self.n - self.fed, self.n)

    def kv_head(self, h: int) -> int:
        """The KV head that query head h reads."""
        return h * len(self.k) // len(self.q)

    def query_heads(self, g: int) -> list[int]:
        return [h for h in range(len(self.q)) if self.kv_head(h) == g]

    def seen(self, i: int, tokens: Iterable[int]) -> list[int]:
        """Those of the tokens that the query of token i sees."""
        return [j for j in tokens if j <= i and (self.window is None or i - j < self.window)]

    def lasting(self, g: int) -> list[int]:
        """Of what KV head g holds, the tokens that a later query may see."""
        return [j for j in self.held[g] if self.window is None or j > self.n - self.window]

    def scores(self, h: int, i: int, tokens: list[int]) -> Tensor:
        """[m] q_i · k_j, scaled, of query head h."""
        return self.k[self.kv_head(h)][tokens] @ self.q[h, i] * self.scale

    def weights(self, h: int, i: int, tokens: list[int]) -> Tensor:
        """[m] softmax of the scores over these tokens alone."""
        return self.scores(h, i, tokens).softmax(0)


@dataclass(frozen=True)
class Text:
    """The text so far.

    again  (token ids of a pass that follows it and is not stored) -> by layer its scores [H, m, n + m], -inf where a
           query does not see a key, over what is stored now
    """

    ids: list[int]
    again: Callable[[list[int]], list[Tensor]]


class Definition:
    """One page on one text; an instance goes through all layers and forwards of it, and remembers what it likes.

    moves  setting -> two settings of the page that differ in this one alone, and give different results
    more   further settings that are asked
    slides settings that are asked where every layer slides a window of 6 tokens; None: nothing is chosen there
    long   tokens of a text on which the page acts under its defaults
    """

    moves: ClassVar[Mapping[str, tuple[dict[str, Any], dict[str, Any]]]] = {}
    more: ClassVar[tuple[dict[str, Any], ...]] = ()
    slides: ClassVar[dict[str, Any] | None] = None
    phase: ClassVar[str] = "both"  # or "prefill": nothing goes where one token is fed
    long: ClassVar[int] = 40
    layers: ClassVar[int] = 3  # of the model that is asked
    # settings that the defaults are asked with: words as token ids, which a tokenizer would give
    words: ClassVar[Mapping[str, Any]] = {}
    families: ClassVar[
        Mapping[str, str]
    ] = {}  # setting -> the model on which it moves something, if not "llama"

    def __init__(self, cfg: Any, model: Any) -> None:
        self.cfg, self.model, self.memory = cfg, model, {}

    def own_budget(self) -> int | float:
        """The budget where none is set: tokens, or a share of the text."""
        return 1.0

    def reads(self, at: Moment) -> list[list[int]] | None:
        """By query head the tokens that this forward reads; None: all that is held."""
        return None

    def together(self, moments: list[Moment], text: Text) -> None:
        """Look at all layers of a forward, before any of them is asked."""

    def ranks(self, at: Moment, g: int) -> tuple[dict[int, float], list[int]] | None:
        """Of a page of scores: those of the tokens of KV head g that may go, and the tokens that stay before all."""
        return None

    def shares(self, at: Moment, ranked: list) -> list[int]:
        """Tokens of each KV head, of what `ranks` says of all."""
        return [at.budget] * len(ranked)

    def keeps(self, at: Moment) -> list[list[int]] | None:
        """By KV head the tokens that stay after this forward; None: all."""
        if self.phase == "prefill" and at.decodes:
            return None
        ranked: list[Any] = [self.ranks(at, g) for g in range(len(at.k))]
        if ranked[0] is None:
            return None
        shares = self.shares(at, ranked)
        return [best_of(score, always, n) for (score, always), n in zip(ranked, shares, strict=True)]

    def stores(self, at: Moment, g: int, held: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Of KV head g the tokens whose key [D] and value [E] are others from now on; `held` are those that stay."""
        return {}

    def merged(self, at: Moment) -> list[Merged | None] | None:
        """By KV head what stands in this forward for tokens that are gone; None: nothing does. Asked before `keeps`."""
        return None

    def answer(self, at: Moment, h: int, i: int, tokens: list[int]) -> Tensor:
        """[E] of query head h for token i, which sees these tokens: attention over them and over what was merged."""
        g, merged = at.kv_head(h), self.merged(at)
        s, v = at.scores(h, i, tokens), at.v[g][tokens]
        extra = None if merged is None else merged[g]
        if extra is not None:
            key, value, count = extra
            s, v = (
                torch.cat([s, (key @ at.q[h, i] * at.scale + math.log(count))[None]]),
                torch.cat([v, value[None]]),
            )
        return s.softmax(0) @ v


def best_of(score: Mapping[int, float], always: list[int], count: int) -> list[int]:
    """The tokens that stay of a head which may hold `count`: of those that always stay the newest, then the best."""
    first = sorted(always)[-count:] if count else []
    rest = {j: s for j, s in score.items() if j not in always}
    return sorted([*first, *largest(rest, count - len(first))])


def largest(score: Mapping[int, float], count: int) -> list[int]:
    """The tokens with the `count` largest scores, ascending; of equals the one that came first.

    >>> largest({3: 1.0, 5: 2.0, 7: 1.0}, 2)
    [3, 5]
    """
    return sorted(sorted(score, key=lambda j: (-score[j], j))[: max(0, count)])
