"""Attention(dim, heads, mechanism=...): projections around any mechanism of the catalogue.

    q, k, v = short convolution of x W_q, x W_k, x W_v       (conv tokens; 0: none)
    q, k    = rotary positions                                (rope; none in cross patterns)
    o       = mechanism(q, k, v; its parameters, x)           norm per head where it has no scale of its own
    out     = o W_o

Everything that a mechanism learns comes from its page's `init` and lives here as `params`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard import catalog
from regard.core import Mechanism, Method, Unsupported, require, unknown
from regard.core.shapes import PATTERNS
from regard.nn.layers import RMSNorm, ShortConvolution, rotate
from regard.ops.states import leaves, mapped


class LayerState(NamedTuple):
    """What a causal layer carries on: tensors with the batch first. Never changed in place."""

    inner: Any  # the mechanism's own
    seen: Tensor  # [B] real tokens so far
    tail: Tensor | None = None  # [B, conv - 1, C], inputs of the short convolution
    there: Tensor | None = None  # [B, tokens so far] bool, where keys are stored and some are padding

    def nbytes(self) -> int:
        return size_of(self)


def picked(state: Any, rows: Tensor) -> Any:
    """These rows of the batch."""
    return mapped(lambda t: t.index_select(0, rows), state)


def size_of(state: Any) -> int:
    """Bytes."""
    return sum(t.nbytes for t in leaves(state))


class Attention(nn.Module):
    """A layer [B, N, C] -> [B, N, C] around one mechanism, with all that it learns.

    dim        C; heads must divide it unless head_dim is given
    mechanism  a name of the catalogue or `regard.method(...)`; config are its settings
    pattern    self, causal_self, cross, causal_cross; in cross patterns forward takes `memory` [B, M, C]
    kv_heads   G, for grouped heads; None: as many as heads
    rope       base of the rotary positions of q and k, 0 for none; None: 10,000 in self patterns for mechanisms
               that do not know order by themselves, 0 for those that do and in cross patterns
    conv       tokens of a short depthwise convolution on q, k and v (self patterns), 0 for none

    >>> Attention(64, 4, mechanism="softmax", pattern="cross", softcap=30.0).method.label
    'softmax(softcap=30.0)'
    """

    def __init__(
        self, dim: int, heads: int, mechanism: str | Method = "softmax", pattern: str = "causal_self", *,
        kv_heads: int | None = None, head_dim: int | None = None, rope: float | None = None, conv: int = 0,
        bias: bool = False, impl: str = "auto", **config: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.method = configured(mechanism, config)
        self.pattern, self.heads, self.kv_heads = pattern, heads, kv_heads or heads
        page = self.page
        check_pattern(self.method, pattern)
        require(heads >= 1 and self.heads % self.kv_heads == 0, "heads are a multiple of kv_heads", heads=heads,
                kv_heads=self.kv_heads)  # fmt: skip
        require(head_dim or dim % heads == 0, "heads divide dim, or head_dim is given", dim=dim, heads=heads)
        require(conv >= 0 and (conv == 0 or "cross" not in pattern), "a short convolution is for self patterns",
                conv=conv, pattern=pattern)  # fmt: skip
        self.width = width = head_dim or dim // heads
        self.rope = self.default_rope() if rope is None else rope
        self.q = nn.Linear(dim, heads * width, bias=bias)
        self.k = nn.Linear(dim, self.kv_heads * width, bias=bias)
        self.v = nn.Linear(dim, self.kv_heads * width, bias=bias)
        self.out = nn.Linear(heads * width, dim, bias=bias)
        channels = (heads + 2 * self.kv_heads) * width
        self.conv = ShortConvolution(channels, conv, causal=pattern == "causal_self") if conv else None
        self.norm = RMSNorm(heads, 1, width) if page.normed else None
        self.dims = {"heads": heads, "kv_heads": self.kv_heads, "key": width, "value": width, "width": dim}
        self.params = nn.ParameterDict()
        for name, value in (page.init(self.method.config, self.dims) if page.init else {}).items():
            self.params[name] = nn.Parameter(value, requires_grad=value.is_floating_point())
        self.run = page.reference if impl == "reference" or page.fast is None else page.fast
        self.stores = self.state_numbers(1 << 20) != self.state_numbers((1 << 20) + 1)

    @property
    def page(self) -> Mechanism:
        return self.method.page

    def default_rope(self) -> float:
        return 0.0 if "cross" in self.pattern or self.page.ordered else 1e4

    def state_numbers(self, n: int) -> int:
        """Numbers that the mechanism's state holds for one row after n tokens; 0 where it declares none."""
        size = self.page.state_size
        return 0 if size is None or self.pattern != "causal_self" else size(self.method.config, self.dims, n)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, mask: Tensor | None = None,
        state: LayerState | None = None, roles: Any = None,
    ) -> tuple[Tensor, LayerState | None]:  # fmt: skip
        """out [B, N, C] and, for causal_self, the state that carries on.

        mask [B, M] bool, True = a token (of x, or of memory in cross patterns), or [B, 1|H, N, M] for pairs.
        """
        cross = "cross" in self.pattern
        require(cross == (memory is not None), "memory [B, M, C] is for cross patterns, and only those",
                pattern=self.pattern, memory=memory)  # fmt: skip
        require(state is None or self.pattern == "causal_self", "only causal_self carries a state",
                pattern=self.pattern)  # fmt: skip
        there = mask if mask is not None and mask.dim() == 2 else None
        q, k, v, tail = self.project(x, x if memory is None else memory, there, state)
        if self.rope:
            at = self.positions(x, there, state)
            q, k = rotate(q, at, self.rope), rotate(k, at, self.rope)
        seen, history = self.visible(mask, there, state, k.shape[2])
        inputs = ((x, memory) if cross else x) if self.page.x else None
        out, inner, *_ = self.run(
            q, k, v, self.method.config, pattern=self.pattern, mask=seen, state=None if state is None else state.inner,
            roles=roles, params=dict(self.params) or None, x=inputs,
        )  # fmt: skip
        out = out if self.norm is None else self.norm(out)
        out = self.out(out.transpose(1, 2).flatten(2))
        if self.pattern != "causal_self" or inner is None:
            return out, None
        return out, LayerState(inner, self.count(x, there, state), tail, history)

    def project(self, x: Tensor, source: Tensor, there: Tensor | None, state: LayerState | None):
        """q, k, v [B, heads, tokens, width], and the inputs of the convolution that the next call needs."""
        q, k, v, tail = self.q(x), self.k(source), self.v(source), None
        if self.conv is not None:
            sizes = [t.shape[-1] for t in (q, k, v)]
            mixed, tail = self.conv(torch.cat([q, k, v], -1), there, None if state is None else state.tail)
            q, k, v = mixed.split(sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in (q, k, v))
        return q, k, v, tail

    def positions(self, x: Tensor, there: Tensor | None, state: LayerState | None) -> Tensor:
        """[B, N] places in the text, padding left out."""
        if there is None:
            at = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        else:
            at = (there.long().cumsum(1) - 1).clamp(min=0)
        return at if state is None else at + state.seen[:, None]

    def count(self, x: Tensor, there: Tensor | None, state: LayerState | None) -> Tensor:
        new = (
            there.long().sum(1)
            if there is not None
            else x.new_full((x.shape[0],), x.shape[1], dtype=torch.long)
        )
        return new if state is None else state.seen + new

    def visible(self, mask: Tensor | None, there: Tensor | None, state: LayerState | None, new: int):
        """(the mask that the mechanism gets, the history of padding that a layer which stores keys keeps)."""
        if mask is not None and there is None:
            return mask, None
        before = None if state is None else state.there
        if self.stores and (there is not None or before is not None):
            there = torch.ones(state.seen.shape[0] if there is None else there.shape[0], new, dtype=torch.bool,
                               device=before.device) if there is None else there.bool()  # fmt: skip
            if before is None and state is not None:  # what is stored was all text
                before = there.new_ones(there.shape[0], stored(state.inner))
            there = there if before is None else torch.cat([before, there], 1)
            return there[:, None, None], there
        return (None if there is None else there.bool()[:, None, None]), None


def stored(inner: Any) -> int:
    """Tokens in the state of a mechanism that stores keys."""
    first = inner[0] if isinstance(inner, tuple | list) else inner
    return first.shape[2]


def configured(mechanism: str | Method, config: dict) -> Method:
    method = catalog.method(mechanism, **config) if isinstance(mechanism, str) else mechanism
    if not isinstance(method.page, Mechanism):
        known = ", ".join(catalog.find("mechanism"))
        raise Unsupported(f"{method.name} is a {method.page.kind} page, a layer takes mechanisms: {known}")
    return method.with_(**config) if config and not isinstance(mechanism, str) else method


def check_pattern(method: Method, pattern: str) -> None:
    if pattern not in PATTERNS:
        raise unknown("pattern", pattern, PATTERNS)
    if pattern not in method.page.patterns:
        reason = method.page.refuses.get(pattern, f"it can do {', '.join(method.page.patterns)}")
        raise Unsupported(f"{method.page.card.title} does not do {pattern}: {reason}")
