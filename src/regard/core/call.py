"""A call: what a mechanism or a block is asked beside its tensors and settings, built and validated once.

`kinds.mechanism.make_call` builds it for `regard.attend`, `regard.nn` and attached models alike, so that a page never
checks again: the pattern is one that the page can do, shapes agree, masks are split into those of keys and those of
pairs, and params are those that the page's `init` names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import Unsupported, present, require, unknown
from regard.core.mask import Mask
from regard.core.roles import Roles
from regard.core.shapes import PATTERNS


@dataclass(frozen=True, eq=False)
class Call:
    """What is asked.

    pattern        self: N = M, all see all; causal_self: query i sees keys up to its own, the last query is that of the
                   last key; cross: keys of another text; causal_cross: query i uses queries <= i and all keys
    key_mask       [B|1, H|1, M] bool, True = there; None: every key is. A hidden key is as if it were not there. With a
                   state of stored keys M counts them too, first
    pair_mask      [B|1, H|1, N, M] bool, True = attend, where queries see different keys; None: they do not
    blocks         ops.blocks.Blocks: the mask as a list of blocks of keys, causality included, in the place of a
                   pair_mask for pages that read such lists; None: the mask is not said so
    initial_state  what an earlier call of causal_self returned, None at the start of a text; never changed in place
    params         {name: tensor} as the page's init gives them; gradients reach them
    x              [B, M, C], the layer's input at the keys, for pages that read it; in cross patterns a pair, that of
                   the queries [B, N, C] and that of the keys
    roles          Roles of the keys, or (of the queries, of the keys), for pages that read them
    unrotated      (q [B, H, N, D], k [B, G, M, D]) before rotary positions turned them, for pages that read them; q and
                   k themselves where nothing did
    grid           the sides of the grid that the tokens fill, row by row, for pages of grids
    backend        what the kernels that are shared run on: "auto", "torch" or "triton"
    """

    pattern: str = "causal_self"
    key_mask: Tensor | None = None
    pair_mask: Tensor | None = None
    blocks: Any = None
    initial_state: Any = None
    params: Mapping[str, Tensor] = field(default_factory=dict)
    x: Tensor | tuple[Tensor, Tensor] | None = None
    roles: Roles | tuple[Roles, Roles] | None = None
    unrotated: tuple[Tensor, Tensor] | None = None
    backend: str = "auto"
    grid: tuple[int, ...] | None = None

    @property
    def cross(self) -> bool:
        """Whether the keys are those of another text."""
        return "cross" in self.pattern

    @property
    def x_of_keys(self) -> Tensor:
        """[B, M, C]"""
        x = self.x[1] if isinstance(self.x, tuple) else self.x
        return present(x, "x is the layer's input", x=self.x)

    @property
    def x_of_queries(self) -> Tensor:
        """[B, N, C]; the layer's input where a text asks itself."""
        x = self.x[0] if isinstance(self.x, tuple) else self.x
        return present(x, "x is the layer's input", x=self.x)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of the grid, of a call whose page is one of grids."""
        return present(self.grid, "the page is one of grids")

    @property
    def before_rotation(self) -> tuple[Tensor, Tensor]:
        """(q, k) before rotary positions, of a call whose page reads them."""
        return present(self.unrotated, "the page reads unrotated queries and keys")

    def with_(self, **changes: Any) -> "Call":
        return replace(self, **changes)


def split_mask(
    mask: Tensor | Mask | None, q: Tensor, keys: int, roles: Any = None
) -> tuple[Tensor | None, Tensor | None]:
    """(key_mask, pair_mask) of a mask over all keys: of keys where every query sees the same ones, else of pairs."""
    if mask is None:
        return None, None
    if isinstance(mask, Mask):
        mask = mask.dense(q.shape[2], keys, heads=q.shape[1], roles=roles, device=q.device)
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(*mask.shape[:3], keys)
    alike = mask.shape[2] == 1
    if not alike and not torch.compiler.is_compiling():
        alike = bool((mask == mask[:, :, :1]).all())
    return (mask[:, :, 0], None) if alike else (None, mask)


def check_pattern(
    pattern: str, patterns: tuple[str, ...], unsupported: Mapping[str, str], title: str
) -> None:
    if pattern not in PATTERNS:
        raise unknown("pattern", pattern, PATTERNS)
    if pattern not in patterns:
        reason = unsupported.get(pattern, f"it can do {', '.join(patterns)}")
        raise Unsupported(f"{title} does not do {pattern}: {reason}")


def check_tokens(for_tokens: Callable | None, cfg: Any, tokens: int, masked: bool) -> None:
    """A page whose settings fix the number of tokens is asked that number of them, and without a mask."""
    if for_tokens is None:
        return
    if masked:
        raise Unsupported("a mask beside a fixed number of tokens: all of them are there")
    fits = tokens == 0 or for_tokens(cfg, tokens) == cfg
    require(fits, "as many tokens as the settings say", tokens=tokens, settings=cfg)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, pattern: str) -> None:
    """q [B, H, N, D], k [B, G, M, D], v [B, G, M, E], floating point, of one dtype and device, H a multiple of G."""
    named = {"q": q, "k": k, "v": v}
    for letter, t in named.items():
        require(isinstance(t, Tensor), "q, k and v are tensors", **{letter: t})
        axes = "[B, H, N, D]" if letter == "q" else f"[B, G, M, {'D' if letter == 'k' else 'E'}]"
        require(t.dim() == 4, f"{letter} is {axes}", **{letter: t})
        require(t.is_floating_point(), "q, k and v are floating point", **{letter: t})
    for what in ("dtype", "device"):
        values = {letter: getattr(t, what) for letter, t in named.items()}
        require(len(set(values.values())) == 1, f"q, k and v have one {what}", **values)
    rows = {letter: t.shape[0] for letter, t in named.items()}
    require(len(set(rows.values())) == 1, "q, k and v have the same batch rows", **rows)
    (_, heads, n, width), (_, groups, m, _) = q.shape, k.shape
    require(groups == v.shape[1], "keys and values have the same heads", k=groups, v=v.shape[1])
    require(m == v.shape[2], "there are as many values as keys", keys=m, values=v.shape[2])
    require(width == k.shape[3], "queries and keys have the same width", q=width, k=k.shape[3])
    require(groups and heads % groups == 0, "query heads are a multiple of KV heads", H=heads, G=groups)
    require(pattern != "self" or n == m, "self has as many queries as keys", queries=n, keys=m)
    require(
        pattern != "causal_self" or n <= m, "causal_self has no more queries than keys", queries=n, keys=m
    )


def check_mask(mask: Any, q: Tensor, keys: int) -> None:
    """A bool tensor that broadcasts to [B, H, N, M], M counting the keys of a state, or a Mask."""
    if mask is None or isinstance(mask, Mask):
        return
    require(
        isinstance(mask, Tensor), "a mask is a bool tensor or a Mask such as causal() & window(8)", mask=mask
    )
    require(mask.dtype == torch.bool, "a mask is bool, True = attend", mask=mask)
    sizes = (*q.shape[:3], keys)
    fits = mask.dim() <= 4 and all(
        axis in (1, size) for axis, size in zip(reversed(mask.shape), reversed(sizes), strict=False)
    )
    rule = "a mask broadcasts to [B, H, N, M], M counting the keys of the state"
    require(fits, rule, mask=mask, B=sizes[0], H=sizes[1], N=sizes[2], M=keys)


def check_finite(letter: str, t: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    # a sum that is finite has finite terms, and asks for nothing but reading them
    total = t.detach().sum(dtype=torch.float32 if t.dtype == torch.float16 else None)
    if bool(total.isfinite()) or bool(t.isfinite().all()):
        return
    at = tuple((~t.isfinite()).nonzero()[0].tolist())
    raise ValueError(f"{letter} holds {t[at].item()}, first at {list(at)}")
