"""What a KV-cache policy sees of one layer at one step; what it may answer is in kept.py.

Letters: B rows of the batch, H query heads, G heads of the cache, N queries of this step, n stored tokens.
Tables of the ledger (`index`, `real`) may have size 1 in place of B and G where all rows or heads agree.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.deprecation import moved, renamed_fields
from regard.core.errors import require
from regard.ops.softmax import masked_softmax, mix, one_pass, row_blocks, scores

__getattr__ = moved(__name__, {name: f"regard.ops.kept:{name}" for name in ("Kept", "keep_best")})


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
    beside: "tuple[View, ...]" = ()  # of all heads of the layer, where these are stored at different lengths
    # for keep and score in a sliding layer: what this step's queries attended to, and where in it these slots stood
    asked: "tuple[View, Tensor] | None" = None
    causal_order: bool = False  # slot i is token i and no query sees a later one
    cached_scores: Tensor | None = None  # of a single-query step, once they were computed
    # [B, seen] place of each token among the row's real ones, of padding that of the last before it; None: no padding
    order: Tensor | None = None
    positions: Tensor | None = None  # [1|B, seen] where the model puts each token; None: at its place
    heads: tuple[int, ...] = ()  # the cache heads of this view, where a layer keeps different lengths by head
    head_layers: tuple[
        int, ...
    ] = ()  # the layer of each of `heads`, where those of all layers are asked together
    # name -> [B, G, n] float32 that stay with their slot
    notes: Callable[[str], Tensor] = None  # type: ignore[assignment]
    memory: dict = field(default_factory=dict)  # this layer's own, over the steps of a sequence
    # what a layer hands on to those above it in this step, by a name of the page
    shared: dict[str, Tensor] = field(default_factory=dict)
    # a page with an attention of its own says how many bytes this step reads of the layer, in the place of all stored
    report_bytes: Callable[[int], None] = lambda n: None
    # (x [B, h, m, D], by [.., h, m]) -> x rotated further
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    output: Tensor | None = None  # [H, E, width] the output projection by head, for a page that reads it
    # keys that a query of a sliding layer sees, its own included; what lies before them never comes back
    window: int | None = None
    # of a single-query step; not init: a view with anything changed has weights of its own
    cached_weights: Tensor | None = field(default=None, init=False, repr=False)
    # the attention of this step is still to come and reads all of this: `received` may compute it on its way
    answering: bool = field(default=False, init=False, repr=False)
    cached_output: Tensor | None = field(default=None, init=False, repr=False)  # [B, H, N, E], once it did
    cached_received: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def stored(self) -> int:
        return self.k.shape[2]

    @property
    def new(self) -> int:
        return self.q.shape[2]

    @property
    def tokens_fed(self) -> int:
        """Tokens that this step brought; the queries are those of the last of them, mostly of all."""
        return self.new if self.fed is None else self.fed

    def over(self) -> bool:
        """Whether any row holds more real tokens than its budget."""
        if self.real is None:
            return self.stored > int(self.budget.min())
        return bool((self.real.sum(-1) > self.budget[:, None]).any())

    def over_by_one(self) -> bool:
        """Whether every row stores one slot more than its budget."""
        over = self.stored - 1
        return int(self.budget.min()) == over == int(self.budget.max())

    def fits(self) -> bool:
        """Whether every row's budget covers all the real tokens that it stores."""
        return bool((self.budget >= self.hold().sum(-1).amax(-1)).all())

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
        if self.cached_weights is not None and heads is None:
            return self.cached_weights
        weights = self.normalise(self.scores(rows, heads), rows, heads, owned=self.new > 1)
        if self.new == 1 and heads is None and not weights.requires_grad:
            self.cached_weights = weights
        return weights

    def normalise(
        self, s: Tensor, rows: slice = slice(None), heads: list[int] | None = None, owned: bool = False
    ) -> Tensor:
        """Mask and softmax of scores [B, heads, rows, n]; `owned`: nobody else reads them, they are overwritten."""
        seen, sinks = self.visible(rows), self.sinks
        if heads is not None:
            seen = seen if seen is None or seen.shape[1] == 1 else seen[:, heads]
            sinks = None if sinks is None else sinks[heads]
        return masked_softmax(s, seen, sinks, owned)

    def among_fed(self) -> Tensor | None:
        """[B, tokens fed] bool: which tokens of this step are real; None: all."""
        if self.order is None:
            return None
        fed = self.tokens_fed
        before = self.order[:, -fed - 1] if self.seen > fed else self.order.new_full((), -1)
        steps = self.order[:, -fed:]
        return steps > torch.cat([before.expand(len(steps))[:, None], steps[:, :-1]], 1)

    def asking(self) -> Tensor | None:
        """[B, N] bool: which queries of this step are of real tokens; None: all."""
        fed = self.among_fed()
        return None if fed is None else fed[:, -self.new :]

    def fresh(self) -> Tensor:
        """[1|B] real tokens that this step added."""
        fed = self.among_fed()
        return self.budget.new_tensor([self.tokens_fed]) if fed is None else fed.sum(-1)

    def newest_query(self) -> Tensor:
        """[B, H, 1, D] the query of each row's newest token: padding may follow it."""
        asking = self.asking()
        if asking is None:
            return self.q[:, :, -1:]
        last = (asking * torch.arange(1, self.new + 1, device=asking.device)).amax(-1) - 1
        return self.q.take_along_dim(last.clamp(min=0)[:, None, None, None], 2)

    def after(self, old: Tensor) -> Tensor:
        """[B, H, m + N, D]: older queries [B, H, m, D] and this step's, in a view whose padding comes first.

        Padding goes to the front of them all, so that every row ends with its newest token.
        """
        queries = torch.cat([old, self.q], 2)
        if self.order is None:
            return queries
        new = torch.arange(self.new, device=queries.device) >= self.new - self.fresh()[:, None]
        real = F.pad(new, (old.shape[2], 0), value=True)
        return queries.take_along_dim(real.to(torch.uint8).argsort(dim=-1, stable=True)[:, None, :, None], 2)

    def counts_one_by_one(self) -> bool:
        """Whether the model puts each token one position after the one before it."""
        if self.positions is None:
            return True
        order = torch.arange(self.seen, device=self.q.device)[None] if self.order is None else self.order
        real = self.order is None or torch.cat([order[:, :1] + 1, order.diff(dim=-1)], 1) > 0
        start = self.position_at(torch.zeros_like(self.length()[:, None]))
        return not bool(((self.positions - order != start) & real).any())

    def received(
        self, newest: int | None = None, through: Callable[[Tensor, slice], Tensor] | None = None
    ) -> Tensor:
        """[B, G, n] attention that each stored token receives from this step's queries, summed; never holds N x n.

        `newest`: from those of the row's last so many tokens only. Padding asks nothing. Layers that read these slots
        too vote with their last query: of a prompt, it may be all that is computed.
        through(weights [B, H, rows, first slots], rows): what is summed in the place of each block of weights.
        """
        counted = newest is None or isinstance(newest, int)
        require(counted, "newest is a number of queries (it was a slice of rows once)", newest=newest)
        plain = newest is None and through is None
        if plain and self.cached_received is not None:
            return self.cached_received
        received = sum(other.received(newest=1) for other in self.readers)
        if self.asked is not None:  # what has left the window since had its share of the attention
            before, at = self.asked
            whole = before.received(newest, through)
            received = received + whole.gather(-1, at.clamp(min=0).expand(*whole.shape[:2], -1)) * (at >= 0)
        else:
            received = self.by_cache_head(self._summed(newest, through)) + received
        if plain and not received.requires_grad:
            self.cached_received = received
        return received

    def _summed(self, newest: int | None, through: Callable | None) -> Tensor:
        """[B, H, n] weights summed over the queries that ask. Where all do, the attention itself takes one product more
        of each block: less than the pass of its own that it would be (docs/log.md).
        """
        rows, asks = self._asking_rows(newest)
        answers = self.answering and newest is None and one_pass(self.q)
        start, stop, _ = (slice(None) if answers else rows).indices(self.new)
        total, parts = torch.zeros((), device=self.q.device), list[Tensor]()
        for block in row_blocks(stop - start, self.q.shape[0] * self.q.shape[1] * self.stored):
            cut = slice(start + block.start, start + block.stop)
            last = self.stored - self.new + cut.stop if self.causal_order else self.stored
            weights = self.upto(last).weights(cut)
            if answers:
                parts.append(mix(weights, self.v[:, :, :last]))
            weights = weights if through is None else through(weights, cut)
            if asks is not None:
                weights = weights * asks[:, None, cut, None]
            summed = weights.sum(2) if last == self.stored else F.pad(weights.sum(2), (0, self.stored - last))
            total = summed + total
        if answers:
            self.cached_output = torch.cat(parts, 2)
        return total

    def _asking_rows(self, newest: int | None) -> tuple[slice, Tensor | None]:
        """The queries of the newest tokens: a slice that holds them, and which of all [B, N] they are (None: all)."""
        asking = self.asking()
        if asking is None:
            return slice(max(0, self.new - (newest or self.new)), None), None
        if newest is not None:
            asking = asking & (asking.flip(-1).cumsum(-1).flip(-1) <= newest)
        first = int(asking.any(0).int().argmax())
        return slice(first, None), asking

    def upto(self, last: int) -> "View":
        """This view without the slots from `last` on: those that no query of a causal block sees."""
        if last == self.stored:
            return self
        bias = None if self.bias is None else self.bias[..., :last]
        cut = lambda rows: None if (seen := self.visible(rows)) is None else seen[..., :last]  # noqa: E731
        return replace(self, k=self.k[:, :, :last], bias=bias, visible=cut)

    def age(self) -> Tensor:
        """[1|B, 1|G, n] how many tokens ago each stored token came; 0 for the newest of its row."""
        return self.length()[:, None, None] - 1 - self.rank()

    def rank(self) -> Tensor:
        """[1|B, 1|G, n] place among the real tokens of the text: 0 for the first, whatever padding lies between."""
        if self.order is None:
            held = self.real is None or bool((self.real | (self.index < 0)).all())
            require(held, "a view with padding is given `order`", real=self.real)
            return self.index
        return at_index(self.order, self.index)

    def length(self) -> Tensor:
        """[1|B] real tokens of the text so far."""
        return self.index.new_tensor([self.seen]) if self.order is None else self.order[:, -1] + 1

    def position(self) -> Tensor:
        """[1|B, 1|G, n] where the model's rotation puts each stored token. An image's tokens may share a position."""
        return self.rank() if self.positions is None else at_index(self.positions, self.index)

    def position_at(self, place: Tensor) -> Tensor:
        """[b, g] positions of the tokens at these places [b, g] among the real ones, stored or not."""
        if self.positions is None:
            return place
        if self.order is None:
            return at_index(self.positions, place[..., None]).squeeze(-1)
        # the first token of the row with so many before it
        index = torch.searchsorted(self.order, place.expand(len(self.order), -1).contiguous())
        return at_index(self.positions, index[..., None]).squeeze(-1)

    def tokens(self, slots: Tensor) -> Tensor:
        """What a page that only reads remembers of slots [b, h, m]; -1: none. `slots` gives them in a later step.

        Slots move where a sliding layer drops its oldest: there it is the true index of each token.
        """
        if self.window is None:
            return slots
        lead = [max(self.index.shape[i], slots.shape[i]) for i in (0, 1)]
        index = self._by_head(slots.shape[1]).expand(*lead, -1)
        return index.gather(-1, slots.clamp(min=0).expand(*lead, -1)).masked_fill(slots < 0, -1)

    def slots(self, tokens: Tensor) -> Tensor:
        """[b, h, m] where what `tokens` gave in an earlier step is stored now; -1: no longer."""
        if self.window is None:
            return tokens
        index = self._by_head(tokens.shape[1])
        place = torch.arange(self.stored, device=index.device).expand_as(index)
        where = index.new_full((*index.shape[:2], self.seen + 1), -1)  # [1|B, 1|h, seen], and one for none
        where = where.scatter(-1, index.masked_fill(index < 0, self.seen), place)
        where[..., -1] = -1
        lead = [max(index.shape[i], tokens.shape[i]) for i in (0, 1)]
        tokens = tokens.masked_fill((tokens < 0) | (tokens >= self.seen), self.seen)
        return where.expand(*lead, -1).gather(-1, tokens.expand(*lead, -1))

    def _by_head(self, heads: int) -> Tensor:
        """[1|B, 1|heads, n] the table of slots for so many heads, of the cache or of queries."""
        spread = 1 < self.index.shape[1] < heads
        return self.index.repeat_interleave(heads // self.index.shape[1], 1) if spread else self.index

    def unrotated_keys(self) -> Tensor:
        """[B, G, n, D] stored keys as if each stood at position 0; of a model that rotates none, as they are."""
        return self.k if self.rotate is None else self.rotate(self.k, -self.position())

    def unrotated_queries(self) -> Tensor:
        """[B, H, N, D] this step's queries as if each stood at position 0."""
        if self.rotate is None:
            return self.q
        last = torch.arange(self.seen - self.new, self.seen, device=self.q.device)[None]
        order = last if self.order is None else self.order[:, -self.new :]
        at = order if self.positions is None else self.positions[:, -self.new :]
        return self.rotate(self.q, -at[:, None])

    def hold(self) -> Tensor:
        """[1|B, 1|G, n] bool: the slot holds a real token."""
        return self.index >= 0 if self.real is None else self.real


def at_index(table: Tensor, index: Tensor) -> Tensor:
    """[b, g, n] entries of a table [1|B, seen] at the true indices [1|B, 1|G, n]; an empty slot reads the first."""
    batch = max(len(table), len(index))
    index = index.clamp(0, table.shape[1] - 1).expand(batch, -1, -1)
    return table.expand(batch, -1).gather(1, index.flatten(1)).view(index.shape)
