"""What a KV-cache policy sees of one layer at one step, and what it may answer.

Letters: B rows of the batch, H query heads, G heads of the cache, N queries of this step, n stored tokens.
Tables of the ledger (`index`, `real`) may have size 1 in place of B and G where all rows or heads agree.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.deprecation import renamed_fields
from regard.ops.softmax import at_least_float32, masked_softmax, row_blocks, scores
from regard.ops.topk import best, slots_of


@renamed_fields(turn="rotate", ordered="causal_order", known="cached_scores")
@dataclass
class View:
    """One layer, one step, after the new tokens were stored and (for keep and score) after their attention."""

    q: Tensor  # [B, H, N, D] as the model computed them, rotated where it rotates
    k: Tensor  # [B, G, n, D] stored keys, this step's included (MLA: expanded to the query heads)
    v: Tensor  # [B, G, n, E]
    index: Tensor  # [1|B, 1|G, n] position in the text of every stored token, padding counted; -1: empty slot
    real: Tensor | None  # [1|B, 1|G, n] True where a slot holds a token and not padding; None: everywhere
    scale: float
    seen: int  # tokens fed so far, padding and this step's included
    budget: Tensor  # [B] tokens that may stay or be read
    groups: int  # G
    layer: int = 0
    layers: int = 1
    phase: str = "prefill"  # or "decode": one new token on a cache that already holds some
    softcap: float | None = None
    sinks: Tensor | None = None  # [H] learned sink scores of the model (not the first tokens)
    bias: Tensor | None = None
    # queries -> [B, 1|H, rows, n] bool or None: all
    visible: Callable[[slice], Tensor | None] = lambda rows: None
    count: Tensor | None = None  # [B, G, n] tokens that a merged slot stands for; None: one each
    total_heads: int = 1  # cache heads of the whole model, over all layers
    # tokens that this step brought, of which it may ask with the last queries alone; None: as many as queries
    fed: int | None = None
    # of the layers that read these slots after the one that stored them, once all have read (for keep and score)
    readers: "tuple[View, ...]" = ()
    causal_order: bool = False  # slot i is token i and no query sees a later one
    cached_scores: Tensor | None = None  # of a single-query step, once they were computed
    heads: tuple[int, ...] = ()  # the cache heads of this view, where a layer keeps different lengths by head
    # name -> [B, G, n] float32 that stay with their slot
    notes: Callable[[str], Tensor] = None  # type: ignore[assignment]
    memory: dict = field(default_factory=dict)  # this layer's own, over the steps of a sequence
    # what a layer hands on to those above it in this step, by a name of the page
    shared: dict[str, Tensor] = field(default_factory=dict)
    # a page with an attention of its own says how many bytes this step reads of the layer, in the place of all stored
    report_bytes: Callable[[int], None] = lambda n: None
    # (x [B, h, m, D], by [.., h, m]) -> x rotated further
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def stored(self) -> int:
        return self.k.shape[2]

    @property
    def new(self) -> int:
        return self.q.shape[2]

    @property
    def tokens(self) -> int:
        """Tokens that this step brought; the queries are those of the last of them, mostly of all."""
        return self.new if self.fed is None else self.fed

    def over(self) -> bool:
        """Whether any row holds more real tokens than its budget."""
        if self.real is None:
            return self.stored > int(self.budget.min())
        return bool((self.real.sum(-1) > self.budget[:, None]).any())

    def fits(self, more: int = 0) -> bool:
        """Whether every row's budget, and `more`, covers all the real tokens that it stores."""
        return bool((self.budget + more >= self.hold().sum(-1).amax(-1)).all())

    def by_cache_head(self, x: Tensor) -> Tensor:
        """Sum a quantity of query heads over those that share a cache head: [B, H, ...] -> [B, G, ...]."""
        return x.unflatten(1, (self.groups, -1)).sum(2)

    def scores(self, rows: slice = slice(None), heads: list[int] | None = None) -> Tensor:
        """[B, heads, rows, n] scores before mask and softmax, float32; `heads` are query heads, None: all."""
        if self.cached_scores is not None:
            return self.cached_scores if heads is None else self.cached_scores[:, heads]
        q, k, bias = self.q[:, :, rows], self.k, self.bias
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., rows, :]
        if heads is not None:
            share = q.shape[1] // k.shape[1]
            q, k = q[:, heads], k[:, [h // share for h in heads]]
            bias = bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
        result = scores(q, k, self.scale, self.softcap, bias)
        if self.new == 1 and heads is None:
            self.cached_scores = result
        return result

    def visible_scores(self) -> Tensor:
        """[B, H, N, n] scores with -inf where a query does not see a slot."""
        seen = self.visible(slice(None))
        return self.scores() if seen is None else self.scores().masked_fill(~seen, -torch.inf)

    def weights(self, rows: slice = slice(None), heads: list[int] | None = None) -> Tensor:
        """[B, heads, rows, n] attention weights of these queries, float32, as the model itself would compute them."""
        return self.normalise(self.scores(rows, heads), rows, heads)

    def normalise(self, s: Tensor, rows: slice = slice(None), heads: list[int] | None = None) -> Tensor:
        """Mask and softmax of scores [B, heads, rows, n]."""
        seen, sinks = self.visible(rows), self.sinks
        if heads is not None:
            seen = seen if seen is None or seen.shape[1] == 1 else seen[:, heads]
            sinks = None if sinks is None else sinks[heads]
        return masked_softmax(s, seen, sinks)

    def received(self, rows: slice = slice(None)) -> Tensor:
        """[B, G, n] attention that each stored token receives from these queries, summed; never holds N x n.

        Layers that read these slots too vote with their last query: of a prompt, it may be all that is computed.
        """
        start, stop, _ = rows.indices(self.new)
        total = 0
        for block in row_blocks(stop - start, self.q.shape[0] * self.q.shape[1] * self.stored):
            cut = slice(start + block.start, start + block.stop)
            last = self.stored - self.new + cut.stop if self.causal_order else self.stored
            received = self.upto(last).weights(cut).sum(2)
            total = F.pad(received, (0, self.stored - last)) + total
        for other in self.readers if stop == self.new else ():
            total = other.weights(slice(other.new - 1, other.new)).sum(2) + total
        return self.by_cache_head(total)

    def upto(self, last: int) -> "View":
        """This view without the slots from `last` on: those that no query of a causal block sees."""
        if last == self.stored:
            return self
        bias = None if self.bias is None else self.bias[..., :last]
        cut = lambda rows: None if (seen := self.visible(rows)) is None else seen[..., :last]  # noqa: E731
        return replace(self, k=self.k[:, :, :last], bias=bias, visible=cut)

    def age(self) -> Tensor:
        """[1|B, 1|G, n] how many tokens ago each stored token came; 0 for the newest."""
        return self.seen - 1 - self.index

    def rank(self) -> Tensor:
        """[1|B, 1|G, n] position among the real tokens of the text: 0 for the first that is not padding."""
        if self.real is None:
            return self.index
        return self.index - self.first()[:, None, None]

    def first(self) -> Tensor:
        """[1|B] index of the first real token of each row (left padding comes before it)."""
        start = self.memory.get("first")
        if start is None:
            hidden = self.index.new_full((), self.seen)
            start = torch.where(self.hold(), self.index, hidden).amin(-1).amin(-1)
            self.memory["first"] = start
        return start

    def hold(self) -> Tensor:
        """[1|B, 1|G, n] bool: the slot holds a real token."""
        return self.index >= 0 if self.real is None else self.real


@dataclass(frozen=True)
class Kept:
    """The answer of `keep`: slots [1|B, 1|G, m] ascending, -1 = empty, and tokens merged from dropped ones.

    merged = (k [B, G, e, D], v [B, G, e, E], count [B, G, e]): each stands for `count` tokens and enters the
    softmax with that weight.
    """

    slots: Tensor
    merged: tuple[Tensor, Tensor, Tensor] | None = None


def keep_best(view: View, score: Tensor, always: Tensor | None = None) -> Kept | None:
    """Keep the best-scored real tokens within each row's budget; those marked in `always` go first. None: all stay."""
    if not view.over():
        return None
    score = at_least_float32(score)
    if always is not None:
        score = torch.where(always, torch.finfo(score.dtype).max, score)
    score = torch.where(view.hold(), score, -torch.inf)
    budget = view.budget if score.shape[0] > 1 else view.budget[:1]
    return Kept(slots_of(best(score, budget[:, None])))
