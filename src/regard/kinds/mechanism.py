"""Mechanisms: how values are mixed by queries and keys. What a page gives, and the one way to ask it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from regard.core import Kind, Method, Page, Unsupported, near, require
from regard.core.call import (
    Call,
    check_finite,
    check_mask,
    check_pattern,
    check_shapes,
    check_tokens,
    split_mask,
)
from regard.core.grid import OnGrid, grid_of
from regard.core.mask import Mask, causal
from regard.core.roles import AXES
from regard.core.trees import tree_leaves
from regard.ops.blocks import SHORT, Blocks, blocks_of, run_blocks
from regard.ops.linear import run_form
from regard.ops.precision import as_written
from regard.ops.transforms import asks_values

TRANSFERS = ("weights", "output", "blocks", "routes")
IMPLS = ("auto", "reference", "fast", "torch", "triton")
PAIRS = "a mask of pairs: this mechanism sums the keys for all queries at once; mask keys instead"


@dataclass(frozen=True, eq=False)
class Mechanism(Page):
    """A mixing of values by queries and keys, as pure functions:

    reference(q, k, v, cfg, call) -> (out, state), or (out, state, aux) with a dict of what else was computed

    reference   the equation; float64 stays float64.   fast   the same function and numbers, written independently
    form        for a linear page, form(q, k, v, cfg, call) -> ops.Form: features, decays, normaliser; `fast` follows
    choose      for a page that chooses blocks of keys, choose(at, cfg, call) -> which (ops.blocks.run); `fast` follows
    gate        for one that learned to choose them, gate(at, cfg, call) -> [B, H, I, J], the logits it chooses by, -inf
                where a block may not be read; gradients reach the params
    q           [B, H, N, D]; k [B, G, M, D] and v [B, G, M, E], H a multiple of G; out [B, H, N, E] in v's dtype
    call        a core Call: pattern, masks, initial state, params, the layer's input, roles; validated before
    state       what causal_self returns and `call.initial_state` brings back: segments, and single tokens, give the
                numbers of the whole. A tensor, or a tuple or dict of them; never changed in place

    Scores, sums and fixed-size states are float32 at least; products may be in the input's dtype. A row that sees
    nothing is zero. Autocast changes nothing inside.

    init            init(cfg, dims) -> params, dims = {"heads": H, "kv_heads": G, "key": D, "value": E, "width": C}
    unsupported     patterns without a meaning, with the reason
    pair_masks      whether queries may see different keys beyond causality
    needs_x         whether it reads the layer's input x: a bool, or a function of cfg
    needs_unrotated  whether it reads call.unrotated, queries and keys before rotary positions turned them; the state of
                    a page that chooses blocks is then (keys, values, unrotated keys)
    router          for a page that decides once for each text, router(q, real, cfg, params) -> [B, 2] logits, the
                    second for all keys, of a prompt's unrotated queries [B, H, N, D], of which `real` [B, N] are there
    decide          with it, decide(q, real, cfg, params) -> [B] bool, which texts read all; the third of its state
    later           with it, later(decided, place [1|B, n], newest [1|B, 1], cfg) -> [B, n] bool, which stored keys at
                    these places a single token reads after the prompt
    needs_norm      whether its outputs have no scale of their own (no denominator), so layers norm them per head
    order_aware     whether it knows the order of tokens by itself (a decay, a filter), so layers add no positions
    roles           roles that it reads
    grid            what a page of grids needs of one; call.grid has its sides. Such a page takes no masks
    for_tokens      for_tokens(cfg, n) -> the settings for n tokens, of a page whose settings fix their number, as
                    parameters for each place do. Another number is refused, and so are masks
    speed_settings  settings that change the speed, never the result
    prefills        whether it is made for prompts: attached to a model it leaves single tokens to the model. Pages that
                    choose blocks are
    block_masks     whether `fast` reads a mask as call.blocks: a bool, or a function of cfg. A Mask that leaves most
                    blocks empty is then never made a matrix
    knob            (setting, values): what a page that chooses blocks is calibrated by, values from those that read few
                    keys to those that read all
    together        together(cfg) -> how many queries, from multiples of it on, choose their keys together; None: each
                    by itself. No output depends on tokens after the last of those that chose with it
    neutral_base    what the card's neutral settings give: neutral_base(q, k, v, call) -> out; None: softmax attention
    state_size      state_size(cfg, dims, n) -> numbers held for one row of the batch after n tokens
    transfer        what a conversion matches of softmax attention: its "output", its "weights" where they sum to one,
                    or the largest of them in "blocks", for a page with a gate
    exempt          laws of regard.testing that do not hold for this method, with the reason
    """

    reference: Callable = None  # type: ignore[assignment]
    fast: Callable | None = None
    form: Callable | None = None
    choose: Callable | None = None
    gate: Callable | None = None
    init: Callable | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)
    pair_masks: bool = False
    needs_x: bool | Callable[[Any], bool] = False
    needs_unrotated: bool = False
    router: Callable | None = None
    decide: Callable | None = None
    later: Callable | None = None
    needs_norm: bool = False
    order_aware: bool = False
    roles: tuple[str, ...] = ()
    grid: OnGrid | None = None
    for_tokens: Callable[[Any, int], Any] | None = None
    speed_settings: tuple[str, ...] = ()
    prefills: bool = False
    block_masks: bool | Callable[[Any], bool] = False
    knob: tuple[str, tuple] | None = None
    together: Callable[[Any], int] | None = None
    neutral_base: Callable | None = None
    state_size: Callable | None = None
    transfer: str = "output"
    exempt: Mapping[str, str] = field(default_factory=dict)
    kind = "mechanism"

    def __post_init__(self) -> None:
        require(self.transfer in TRANSFERS, f"transfer is one of {TRANSFERS}", transfer=self.transfer)
        for transfer, name in (("blocks", "gate"), ("routes", "router")):
            fits = (self.transfer == transfer) == (getattr(self, name) is not None)
            require(fits, f'a page with a {name} has transfer="{transfer}"', transfer=self.transfer)
        if self.grid is not None and not self.roles:
            object.__setattr__(self, "roles", AXES[-min(self.grid.axes) :])
        if self.form is not None and self.fast is None:
            object.__setattr__(self, "fast", partial(run_form, self.form))
        if self.choose is not None:
            if self.fast is None:
                object.__setattr__(self, "fast", partial(run_blocks, self.choose))
            if self.together is None:
                object.__setattr__(self, "together", lambda cfg: cfg.block_q)
        for path in ("reference", "fast"):
            if (function := getattr(self, path)) is not None:
                object.__setattr__(self, path, as_written(function))

    def reads_x(self, cfg: Any) -> bool:
        """Whether it reads the layer's input under these settings."""
        return self.needs_x(cfg) if callable(self.needs_x) else self.needs_x


KIND = Kind(
    name="mechanism",
    page=Mechanism,
    says="how values are mixed by queries and keys",
    verb="regard.attend(q, k, v, NAME); regard.nn.Attention(dim, heads, NAME); regard.attach(model, NAME)",
    room="methods/mechanisms",
    costs=True,
    checks="regard.testing.mechanism:check_mechanism_page",
)


def run(
    method: Method, q: Tensor, k: Tensor, v: Tensor, *, impl: str = "auto", **options: Any
) -> tuple[Tensor, Any, dict[str, Any]]:
    """(out, state, aux) of a mechanism, asked once and in full: see make_call for what may be asked."""
    path = implementation(method.page, impl)
    page, cfg = method.page, method.config
    lists = page.block_masks(cfg) if callable(page.block_masks) else page.block_masks
    backend = impl if impl in ("torch", "triton") else "auto"
    call = make_call(method, q, k, v, backend=backend, lists=lists and path is page.fast, **options)
    if k.shape[0] == 0 or k.shape[2] == 0 or (call.cross and q.shape[2] == 0):
        # no row, no query or no key, no output but zeros: a row that sees nothing; the sums are what they were
        return v.new_zeros(*q.shape[:3], v.shape[3]), call.initial_state, {}
    out, state, *aux = path(q, k, v, method.config, call)
    return out, state, aux[0] if aux else {}


def implementation(page: Mechanism, impl: str) -> Callable:
    """The path that `impl` names. What is asked for by name is never replaced."""
    require(impl in IMPLS, f"impl is one of {IMPLS}", impl=impl)
    if impl in IMPLS[2:] and page.fast is None:
        raise Unsupported("this mechanism has no fast path; ask for impl='auto' or 'reference'")
    if impl == "triton" and page.form is None:
        raise Unsupported("this mechanism has no Triton kernel; ask for impl='auto'")
    return page.reference if impl == "reference" or page.fast is None else page.fast


def make_call(
    method: Method, q: Tensor, k: Tensor, v: Tensor, *, pattern: str = "causal_self", mask: Any = None,
    initial_state: Any = None, params: Mapping[str, Tensor] | None = None, x: Any = None, roles: Any = None,
    unrotated: Any = None, backend: str = "auto", finite: bool = False, lists: bool = False,
) -> Call:  # fmt: skip
    """The Call of a mechanism, validated: the one place where what is asked is held to what the page can do.

    `lists`: a Mask becomes a list of blocks where that leaves enough unread. `finite` looks for NaN and infinity in q,
    k and v too, which reads them once.
    """
    page, cfg = method.page, method.config
    check_pattern(pattern, page.patterns, page.unsupported, page.card.title)
    check_shapes(q, k, v, pattern)
    require(
        initial_state is None or pattern == "causal_self", "only causal_self carries a state", pattern=pattern
    )
    keys = k.shape[2] + stored_tokens(page, cfg, initial_state)
    check_mask(mask, q, keys)
    check_tokens(page.for_tokens, cfg, keys, mask is not None)
    grid = grid_of(page.grid, cfg, roles, keys, mask is not None)
    blocks = blocks_for(mask, pattern, q, keys, roles) if lists and isinstance(mask, Mask) else None
    key_mask, pair_mask = (None, None) if blocks is not None else split_mask(mask, q, keys, roles)
    if pair_mask is not None and not page.pair_masks:
        raise Unsupported(PAIRS)
    check_x(page, cfg, x, q, k, pattern)
    unrotated = both_unrotated(page, unrotated, q, k, finite)
    for letter, t in (("q", q), ("k", k), ("v", v)) if finite else ():
        check_finite(letter, t)
    params = dict(params or {})
    if not torch.compiler.is_compiling():
        check_params(page, cfg, params, q, k, v, x)
    return Call(
        pattern, key_mask, pair_mask, blocks, initial_state, params, x, roles, unrotated, backend, grid
    )


def both_unrotated(
    page: Mechanism, given: Any, q: Tensor, k: Tensor, finite: bool
) -> tuple[Tensor, Tensor] | None:
    """Queries and keys before rotary positions, for a page that reads them: q and k where none are given."""
    rule = "unrotated queries and keys are for mechanisms that read them"
    require(given is None or page.needs_unrotated, rule, unrotated=given)
    if given is None:
        return (q, k) if page.needs_unrotated else None
    require(isinstance(given, tuple) and len(given) == 2, "unrotated is (queries, keys)", unrotated=given)
    for letter, like, x in zip("qk", (q, k), given, strict=True):
        alike = isinstance(x, Tensor) and x.shape == like.shape and x.dtype == like.dtype
        require(alike, f"unrotated {letter} has the shape and dtype of {letter}", unrotated=x, given=like)
        if finite:
            check_finite(f"unrotated {letter}", x)
    return given


def blocks_for(mask: Mask, pattern: str, q: Tensor, keys: int, roles: Any) -> Blocks | None:
    """The mask, causality included, as blocks; None where a dense mask serves better, or no values may be asked."""
    if keys < SHORT or not asks_values():
        return None
    mask = causal() & mask if pattern == "causal_self" else mask
    return blocks_of(mask, q.shape[2], keys, roles=roles, device=q.device, heads=q.shape[1])


def stores_keys(page: Mechanism, cfg: Any) -> bool:
    """Whether the state grows with the text, as stored keys do; its mask is then of all keys so far."""
    if page.state_size is None:
        return False
    dims = {"heads": 1, "kv_heads": 1, "key": 2, "value": 2, "width": 2}
    return page.state_size(cfg, dims, 9) != page.state_size(cfg, dims, 8)


def stored_tokens(page: Mechanism, cfg: Any, state: Any) -> int:
    """Keys in a state: tokens are the third axis of its first tensor where it stores them, else none."""
    return tree_leaves(state)[0].shape[2] if state is not None and stores_keys(page, cfg) else 0


def check_x(page: Mechanism, cfg: Any, x: Any, q: Tensor, k: Tensor, pattern: str) -> None:
    if not page.reads_x(cfg):
        require(x is None, "x, the layer's input, is for mechanisms that read it; this one does not", x=x)
        return
    require(x is not None, "this mechanism reads the layer's input: x=[B, N, C]", x=x)
    sides = (x,)
    if "cross" in pattern:
        pair = isinstance(x, tuple) and len(x) == 2
        require(pair, "in cross, x is (inputs of queries [B, N, C], inputs of keys [B, M, C])", x=x)
        require(
            x[0].shape[:2] == (q.shape[0], q.shape[2]),
            "x[0] [B, N, C] stands beside the queries",
            x=x[0],
            q=q,
        )
        sides = (x[1],)
    for side in sides:
        fits = isinstance(side, Tensor) and side.dim() == 3 and side.shape[:2] == (k.shape[0], k.shape[2])
        require(fits, "x [B, M, C] stands beside the keys", x=side, k=k)


def check_params(
    page: Mechanism, cfg: Any, params: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, x: Any
) -> None:
    """The params are those that init gives for these shapes, by name and by shape."""
    width = 0 if x is None else (x[1] if isinstance(x, tuple) else x).shape[-1]
    wanted = learned(page, cfg, q.shape[1], k.shape[1], k.shape[3], v.shape[3], width)
    missing = [name for name in wanted if name not in params]
    require(
        not missing,
        f"params holds {', '.join(wanted)}, as init gives them",
        missing=missing,
        names=list(params),
    )
    for name, value in params.items():
        if name not in wanted:
            message = near(name, wanted) if wanted else "it learns nothing"
            raise ValueError(f"{page.card.title} has no parameter {name!r} under {cfg}; {message}")
        require(
            tuple(value.shape) == wanted[name], f"params[{name!r}] has the shape {wanted[name]}", names=value
        )


@lru_cache(maxsize=4096)
def learned(
    page: Mechanism, cfg: Any, heads: int, kv_heads: int, key: int, value: int, width: int
) -> dict[str, tuple]:
    """Name -> shape of what init gives; nothing is computed or drawn."""
    if page.init is None:
        return {}
    dims = {"heads": heads, "kv_heads": kv_heads, "key": key, "value": value, "width": width}
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in page.init(cfg, dims).items()}
