"""Queries and keys as a model made them before its rotary positions, for pages that read them.

A model hands over what it turned already, and a cache holds it so; turned back by the model's own tables it is what it
was. Where no rotary table reaches a layer nothing was turned. A layer whose vectors cannot be turned back is refused.
"""

from torch import Tensor

from regard.attaching.actors import AttentionCall
from regard.core import Unsupported
from regard.ops import at_index


def unrotated(
    what: str, call: AttentionCall, k: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(q [B, H, N, D], k [B, G, n, D]) of a call's queries and these keys.

    index [1|B, 1|G, n] says which tokens the keys are of; None: those of the queries.
    """
    rotary = call.rotary
    at = None if rotary is None else rotary.positions(call.module)
    if rotary is None or at is None:
        return call.q, k
    here, several = at
    if several:
        raise Unsupported(
            f"{what} at {call.where}: a token of this model has several positions, and what it was before its rotation "
            "cannot be told from one of them"
        )
    layer = call.layer
    if layer is None or layer.positions is None or index is None:
        there, owner = here[:, None], call.module
    else:
        there, owner = at_index(layer.positions, index), rotary.owners.get(layer, call.module)
    try:
        q = rotary.rotate(call.module, call.q, -here[:, None], queries=True)
        return q, rotary.rotate(owner, k, -there)
    except Unsupported as refusal:
        raise Unsupported(
            f"{what} at {call.where}: it reads what is before rotary positions, and {refusal}"
        ) from refusal
