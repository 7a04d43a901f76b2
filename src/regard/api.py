"""attend: one call for every attention mechanism of the catalogue, with its inputs checked.

>>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
>>> out, state, aux = attend(q, k, v, "softmax", softcap=30.0)
>>> out.shape
torch.Size([1, 2, 5, 8])
>>> attend(q, k, v, "softmax", mask=catalog.method("window", window=2)).out.shape
torch.Size([1, 2, 5, 8])
>>> attend(q, k[..., :4], v, "softmax")
Traceback (most recent call last):
...
ValueError: softmax: must hold: queries and keys have the same width (q=8, k=4)
  q float32[1, 2, 5, 8], k float32[1, 2, 5, 4], v float32[1, 2, 5, 8], pattern 'causal_self'
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from regard import catalog
from regard.core import K, Method, Out, Q, Unsupported, V, require, show
from regard.core.deprecation import renamed, warn
from regard.core.mask import Mask
from regard.core.roles import Roles
from regard.kinds.mechanism import run
from regard.ops.packed import both_borders, run_packed


class Attended(NamedTuple):
    """What `attend` returns: the output [B, H, N, E], the state that carries on, and what else was computed."""

    out: Out
    final_state: Any
    aux: dict[str, Any]

    @property
    def state(self) -> Any:
        """The old name of final_state."""
        warn("Attended.state", "Attended.final_state")
        return self.final_state


@renamed(state="initial_state", name="mechanism")
def attend(
    q: Q,
    k: K,
    v: V,
    mechanism: str | Method = "softmax",
    pattern: str = "causal_self",
    mask: Tensor | Mask | Method | str | None = None,
    initial_state: Any = None,
    impl: str = "auto",
    *,
    roles: Roles | tuple[Roles, Roles] | None = None,
    params: Mapping[str, Tensor] | None = None,
    x: Tensor | tuple[Tensor, Tensor] | None = None,
    unrotated: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    **config: Any,
) -> Attended:
    """Mix the values v by queries q and keys k, by the mechanism of this name, with these settings.

    q is [B, H, N, D], k [B, G, M, D], v [B, G, M, E]; H is a multiple of G. `pattern` says who asks whom: self,
    causal_self (the last query is that of the last key), cross, causal_cross. In `mask` True means attend; it is a bool
    tensor, a core Mask, or a mask page of the catalogue by name or with its settings; in causal_self causality comes
    on top of it. `initial_state` is what an earlier call returned, for causal_self. impl "auto" is the fast path if
    there is one; "fast" never falls back, nor do "torch" and "triton", which say what the fast path of the linear
    family runs on. `params`, `x` and `roles` are for the mechanisms that read them; in cross patterns x is a pair, that
    of the queries and that of the keys. `unrotated`, queries and keys before rotary positions turned them, is for those
    that read these too; without it they take q and k.

    `cu_seqlens` [S + 1] says that S texts lie end to end in one row: q [1, H, T, D]; each is attended by itself.
    `cu_seqlens_k` are the borders of the keys in cross patterns. The state then has a batch of S, or is a list of S
    states where texts of unequal length store their keys. An empty text has no output, and the state that it came with.

    Raises ValueError, KeyError or Unsupported with the rule, the value, and the shapes of q, k and v.
    """
    method = configured(mechanism, config)
    options = {"pattern": pattern, "initial_state": initial_state, "params": params, "x": x}
    options |= {"impl": impl, "finite": True, "unrotated": unrotated}
    try:
        masking = {"mask": catalog.as_mask(mask, pattern), "roles": roles}
        if cu_seqlens is None and cu_seqlens_k is None:
            return Attended(*run(method, q, k, v, **options, **masking))
        return packed(method, q, k, v, cu_seqlens, cu_seqlens_k, options, masking)
    except (ValueError, TypeError, KeyError) as error:
        shapes = ", ".join(f"{letter} {show(t)}" for letter, t in (("q", q), ("k", k), ("v", v)))
        message = error.args[0] if error.args else error
        # a KeyError shows its message as a repr
        line = "; " if isinstance(error, KeyError) else "\n  "
        raise type(error)(f"{method.name}: {message}{line}{shapes}, pattern {pattern!r}") from error


def packed(
    method: Method, q: Q, k: K, v: V, cu_seqlens: Any, cu_seqlens_k: Any, options: dict, masking: dict
) -> Attended:
    """Texts that lie end to end in one row."""
    if options["unrotated"] is not None:
        raise Unsupported("unrotated queries and keys beside cu_seqlens: ask text by text")
    if any(value is not None for value in masking.values()):
        raise Unsupported("a mask or roles beside cu_seqlens: the borders say which tokens belong together")
    lengths, memories = both_borders(options["pattern"], cu_seqlens, cu_seqlens_k, q.shape[2], k.shape[2])

    def one(q: Q, k: K, v: V, **changes: Any) -> tuple[Tensor, Any]:
        return run(method, q, k, v, **{**options, **changes})[:2]

    state, x = options["initial_state"], options["x"]
    apart = method.page.mixes_rows
    return Attended(*run_packed(one, q, k, v, lengths, memories, initial_state=state, x=x, apart=apart), {})


def configured(mechanism: str | Method, config: dict[str, Any]) -> Method:
    """The mechanism with its settings, as a configured page."""
    require(
        isinstance(mechanism, str | Method),
        "a method is a name or regard.method(name, ...)",
        mechanism=mechanism,
    )
    method = catalog.method(mechanism) if isinstance(mechanism, str) else mechanism
    if method.page.kind != "mechanism":
        known = ", ".join(catalog.list_methods(kind="mechanism"))
        raise Unsupported(f"{method.name} is a {method.page.kind} page, attend takes mechanisms: {known}")
    return method if not config else method.with_settings(**config)
