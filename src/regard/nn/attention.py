"""Attention(dim, heads, mechanism=...): projections around any mechanism of the catalogue.

    q, k, v = short convolution of x W_q, x W_k, x W_v       (conv tokens; 0: none)
    q, k    = rotary positions                                (rope_theta; none in cross patterns)
    o       = mechanism(q, k, v; its parameters, x)           norm per head where it has no scale of its own
    out     = o W_o                                           dropout of it while training

Everything that a mechanism learns comes from its page's `init` and lives here as `params`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard import catalog
from regard.core import Method, Unsupported, require
from regard.core.call import check_pattern
from regard.core.deprecation import renamed, warn
from regard.core.mask import Mask
from regard.core.trees import tree_leaves, tree_map
from regard.kinds.mechanism import Mechanism, implementation, run, stores_keys
from regard.nn.layers import Learned, RMSNorm, ShortConvolution
from regard.nn.masks import both, fixed_mask, position_page, split_given
from regard.ops.packed import both_borders, run_texts
from regard.ops.rotary import rotate

RENAMED = {"q.": "q_proj.", "k.": "k_proj.", "v.": "v_proj.", "out.": "o_proj."}


class LayerState(NamedTuple):
    """What a causal layer carries on: tensors with the batch first. Never changed in place."""

    inner: Any  # the mechanism's own
    seen: Tensor  # [B] real tokens so far
    tail: Tensor | None = None  # [B, conv - 1, C], inputs of the short convolution
    token_mask: Tensor | None = None  # [B, tokens so far] bool, where keys are stored and some are padding

    def nbytes(self) -> int:
        return nbytes(self)

    @property
    def there(self) -> Tensor | None:
        """The old name of token_mask."""
        warn("LayerState.there", "LayerState.token_mask")
        return self.token_mask


def select_rows(state: Any, rows: Tensor) -> Any:
    """These rows of the batch."""
    return tree_map(lambda t: t.index_select(0, rows), state)


def nbytes(state: Any) -> int:
    """Bytes of the tensors of a state."""
    return sum(t.nbytes for t in tree_leaves(state))


class Attention(nn.Module):
    """A layer [B, N, C] -> [B, N, C] around one mechanism, with all that it learns.

    dim         C; heads must divide it unless head_dim is given
    mechanism   a name of the catalogue or `regard.method(...)`; config are its settings
    pattern     self, causal_self, cross, causal_cross; in cross patterns forward takes `memory` [B, M, C]
    kv_heads    G, for grouped heads; None: as many as heads
    rope_theta  base of the rotary positions of q and k, 0 for none; None: 10,000 in self patterns for mechanisms
                that do not know order by themselves, 0 for those that do, on grids, and in cross patterns
    conv        tokens of a short depthwise convolution on q, k and v (self patterns), 0 for none
    mask        who may see whom, beside the pattern, in every call: a mask page by name or with its settings, or a
                core Mask; it counts tokens as they stand in the text, padding included
    positions   a position page: where tokens stand for the rotary positions, read off `roles`, and its mask
    v_head_dim  E, the width of a head's values; None: head_dim, the width of its queries and keys
    dropout     share of the output's numbers that are dropped while training

    >>> Attention(64, 4, mechanism="softmax", pattern="cross", softcap=30.0).method.label
    'softmax(softcap=30.0)'
    """

    @renamed(rope="rope_theta")
    def __init__(
        self, dim: int, heads: int, mechanism: str | Method = "softmax", pattern: str = "causal_self", *,
        kv_heads: int | None = None, head_dim: int | None = None, rope_theta: float | None = None, conv: int = 0,
        bias: bool = False, impl: str = "auto", mask: str | Method | Mask | None = None,
        positions: str | Method | None = None, v_head_dim: int | None = None, dropout: float = 0.0, **config: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.method = configured(mechanism, config)
        self.pattern, self.heads, self.kv_heads, self.impl = pattern, heads, kv_heads or heads, impl
        page = self.page
        check_pattern(pattern, page.patterns, page.unsupported, page.card.title)
        implementation(page, impl)
        require(heads >= 1 and self.heads % self.kv_heads == 0, "heads are a multiple of kv_heads", heads=heads,
                kv_heads=self.kv_heads)  # fmt: skip
        require(head_dim or dim % heads == 0, "heads divide dim, or head_dim is given", dim=dim, heads=heads)
        require(conv >= 0 and (conv == 0 or "cross" not in pattern), "a short convolution is for self patterns",
                conv=conv, pattern=pattern)  # fmt: skip
        require(0 <= dropout < 1, "0 <= dropout < 1", dropout=dropout)
        self.head_dim = width = head_dim or dim // heads
        self.v_head_dim = values = v_head_dim or width
        self.positions = position_page(positions, pattern)
        self.mask = both(fixed_mask(mask, pattern), fixed_mask(self.positions, pattern))
        self.rope_theta = self.default_theta() if rope_theta is None else rope_theta
        require(self.positions is None or self.rope_theta, "positions are for rotary tables: rope_theta > 0",
                rope_theta=self.rope_theta)  # fmt: skip
        self.q_proj = nn.Linear(dim, heads * width, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * values, bias=bias)
        self.o_proj = nn.Linear(heads * values, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        channels = (heads + self.kv_heads) * width + self.kv_heads * values
        self.conv = ShortConvolution(channels, conv, causal=pattern == "causal_self") if conv else None
        self.norm = RMSNorm(heads, 1, values) if page.needs_norm else None
        self.dims = {"heads": heads, "kv_heads": self.kv_heads, "key": width, "value": values, "width": dim}
        self.params = Learned(self.method, self.dims)
        self.stores = pattern == "causal_self" and stores_keys(page, self.method.config)
        self.register_load_state_dict_pre_hook(rename_projections)

    @property
    def page(self) -> Mechanism:
        return self.method.page

    def default_theta(self) -> float:
        silent = "cross" in self.pattern or self.page.order_aware or self.page.grid is not None
        return 0.0 if silent else 1e4

    def state_numbers(self, n: int) -> int:
        """Numbers that the mechanism's state holds for one row after n tokens; 0 where it declares none."""
        size = self.page.state_size
        return 0 if size is None or self.pattern != "causal_self" else size(self.method.config, self.dims, n)

    @renamed(state="initial_state")
    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, mask: Tensor | Mask | Method | str | None = None,
        initial_state: Any = None, roles: Any = None, cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """out [B, N, C] and, for causal_self, the LayerState that carries on, None before the first token.

        mask [B, M], True = a token (of x, or of memory in cross patterns); or [B, 1|H, N, M] for pairs, M counting the
        keys of the state; or a core Mask, or a mask page.
        roles label the keys, those of the state first; they are read by the mechanism, the mask and the positions.
        cu_seqlens [S + 1]: S texts lie end to end in x [1, T, C], as in `attend`; cu_seqlens_k are those of memory.
        """
        cross, state = "cross" in self.pattern, initial_state
        require(cross == (memory is not None), "memory [B, M, C] is for cross patterns, and only those",
                pattern=self.pattern, memory=memory)  # fmt: skip
        require(state is None or self.pattern == "causal_self", "only causal_self carries a state",
                pattern=self.pattern)  # fmt: skip
        if cu_seqlens is not None or cu_seqlens_k is not None:
            return self.packed(x, memory, mask, state, roles, cu_seqlens, cu_seqlens_k)
        source = x if memory is None else memory
        token_mask, pairs, also = split_given(mask, self.pattern, *source.shape[:2])
        if x.shape[1] == 0:
            return x, state
        q, k, v, tail = self.project(x, source, token_mask, state)
        raw = (q, k) if self.page.needs_unrotated else None
        if self.rope_theta:
            at_k = self.where(source, token_mask, state, roles)
            at_q = self.where(x, None, None, roles) if cross else at_k
            q, k = rotate(q, at_q, self.rope_theta), rotate(k, at_k, self.rope_theta)
        seen, history = self.visible(pairs, token_mask, state, k.shape[2])
        seen = self.with_own_mask(both(self.mask, also), seen, q, k, state, roles)
        if self.norm is not None and q.dtype == torch.float16:
            # sums without a denominator leave float16 before the norm that follows
            q, k, v = q.float(), k.float(), v.float()
        inputs = ((x, memory) if cross else x) if self.page.reads_x(self.method.config) else None
        out, inner, _ = run(
            self.method, q, k, v, impl=self.impl, pattern=self.pattern, mask=seen, x=inputs, unrotated=raw,
            initial_state=None if state is None else state.inner,
            roles=roles if self.page.roles or isinstance(seen, Mask) else None,
            params=self.params.tensors(),
        )  # fmt: skip
        out = out if self.norm is None else self.norm(out).to(x.dtype)
        out = self.dropout(self.o_proj(out.transpose(1, 2).flatten(2)))
        if self.pattern != "causal_self" or inner is None:
            return out, None
        return out, LayerState(inner, self.count(x, token_mask, state), tail, history)

    def packed(
        self, x: Tensor, memory: Tensor | None, mask: Any, state: Any, roles: Any, cu_seqlens: Any, cu_seqlens_k: Any
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Texts that lie end to end in one row, each by itself."""
        if mask is not None or roles is not None:
            raise Unsupported(
                "a mask or roles beside cu_seqlens: the borders say which tokens belong together"
            )
        source = x if memory is None else memory
        require(
            x.shape[0] == source.shape[0] == 1, "packed texts are one row: x [1, T, C]", x=x, memory=memory
        )
        cuts = both_borders(self.pattern, cu_seqlens, cu_seqlens_k, x.shape[1], source.shape[1])
        memories = [None] * len(cuts[0]) if memory is None else memory.split(cuts[1], 1)
        texts = list(zip(x.split(cuts[0], 1), memories, strict=True))
        return run_texts(lambda text, state: self(*text, initial_state=state), texts, state, axis=1)

    def project(self, x: Tensor, source: Tensor, token_mask: Tensor | None, state: LayerState | None):
        """q, k, v [B, heads, tokens, width], and the inputs of the convolution that the next call needs."""
        q, k, v, tail = self.q_proj(x), self.k_proj(source), self.v_proj(source), None
        if self.conv is not None:
            sizes = [t.shape[-1] for t in (q, k, v)]
            mixed, tail = self.conv(
                torch.cat([q, k, v], -1), token_mask, None if state is None else state.tail
            )
            q, k, v = mixed.split(sizes, dim=-1)
        widths = (self.head_dim, self.head_dim, self.v_head_dim)
        q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t, width in zip((q, k, v), widths))
        return q, k, v, tail

    def where(self, x: Tensor, token_mask: Tensor | None, state: LayerState | None, roles: Any) -> Tensor:
        """[B, N] positions in the text, padding left out, or those of the position page."""
        if self.positions is not None:
            require(
                roles is not None,
                "a position page reads roles: forward(x, roles=...)",
                page=self.positions.name,
            )
            at = self.positions.page.positions(roles, self.positions.config)
            return (at if at.dim() == 2 else at[None]).expand(x.shape[0], -1)[:, -x.shape[1] :]
        if token_mask is None:
            at = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        else:
            at = (token_mask.long().cumsum(1) - 1).clamp(min=0)
        return at if state is None else at + state.seen[:, None]

    def count(self, x: Tensor, token_mask: Tensor | None, state: LayerState | None) -> Tensor:
        """[B] real tokens so far."""
        if token_mask is not None:
            new = token_mask.long().sum(1)
        else:
            new = x.new_full((x.shape[0],), x.shape[1], dtype=torch.long)
        return new if state is None else state.seen + new

    def visible(self, pairs: Tensor | None, token_mask: Tensor | None, state: LayerState | None, new: int):
        """(the mask that the mechanism gets, the history of padding that a layer which stores keys keeps)."""
        before = None if state is None else state.token_mask
        if token_mask is None and before is not None:
            token_mask = before.new_ones(before.shape[0], new)
        if token_mask is None:
            return pairs, None
        if not self.stores:
            return token_mask[:, None, None], None
        if before is None and state is not None:
            # what is stored was all text
            before = token_mask.new_ones(token_mask.shape[0], stored(state.inner))
        history = token_mask if before is None else torch.cat([before, token_mask], 1)
        there = history[:, None, None]
        return there if pairs is None else pairs & there, history

    def with_own_mask(
        self, mask: Mask | None, seen: Tensor | None, q: Tensor, k: Tensor, state: LayerState | None, roles: Any
    ) -> Tensor | Mask | None:  # fmt: skip
        """What this Mask shows of all keys, and `seen` too; the Mask itself where nothing else hides any."""
        if mask is None:
            return seen
        if state is not None and not self.stores:
            raise Unsupported(
                "a mask of the layer's own after a state of fixed size: what it hides is summed up there"
            )
        if seen is None:
            return mask
        keys = k.shape[2] + (0 if state is None else stored(state.inner))
        fixed = mask.dense(q.shape[2], keys, heads=self.heads, roles=roles, device=q.device)
        return fixed & seen


def stored(inner: Any) -> int:
    """Tokens in the state of a mechanism that stores keys."""
    return tree_leaves(inner)[0].shape[2]


def configured(mechanism: str | Method, config: dict) -> Method:
    """The mechanism with its settings."""
    method = catalog.method(mechanism) if isinstance(mechanism, str) else mechanism
    if not isinstance(method.page, Mechanism):
        known = ", ".join(catalog.list_methods(kind="mechanism"))
        raise Unsupported(f"{method.name} is a {method.page.kind} page, a layer takes mechanisms: {known}")
    return method.with_settings(**config) if config else method


def rename_projections(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Checkpoints of the first release call the projections q, k, v and out."""
    for old, new in RENAMED.items():
        for name in [n for n in state_dict if n.startswith(prefix + old)]:
            state_dict[prefix + new + name.removeprefix(prefix + old)] = state_dict.pop(name)
