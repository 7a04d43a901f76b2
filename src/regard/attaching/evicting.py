"""What a cache policy is asked with once a step was attended to, and what of it waits for the layers above."""

from dataclasses import replace
from typing import Any

from regard.attaching.actors import AttentionCall
from regard.attaching.views import make_view
from regard.core import require
from regard.kinds.cache import Ranked
from regard.ops import View


def voted(views: list[View]) -> View:
    """The view of the layer that stores the slots, with those of the layers that read them after it."""
    return replace(views[0], readers=tuple(views[1:])) if len(views) > 1 else views[0]


def without_what_left(call: AttentionCall) -> View:
    """What is stored once the window has left its oldest slots behind: nothing is kept in their place."""
    group, whole = call.slots, call.stored
    k, v = group.k(), group.v()
    if k.shape[1] != call.k.shape[1] or k.shape[-1] != call.k.shape[-1]:  # latents, expanded for the call
        require(group.index is None, "a sliding layer of latents keeps its whole window", window=whole.window)
        k, v = (x[:, :, x.shape[2] - group.n :] for x in (call.k, call.v))
    new = make_view(replace(call, k=k, v=v))
    return replace(
        whole, k=k, v=v, index=new.index, real=new.real, bias=new.bias, visible=new.visible, count=new.count,
        cached_scores=None, asked=(whole, whole.slots(new.index)),
    )  # fmt: skip


def light(call: AttentionCall) -> AttentionCall:
    """A call that waits for the layers above: the slots and who reads them, without its tensors."""
    gone = call.q[:, :, :1].clone()
    return replace(call, q=gone, k=gone, v=gone, options={}, x=None, view=without_queries(call.stored))


def without_queries(said: Any) -> Any:
    """A view that waits for the layers above, or what was said of it: what is stored, without what the step asked."""
    if isinstance(said, Ranked):
        return replace(said, view=without_queries(said.view))
    view: View = said
    return replace(
        view,
        q=view.q[:, :, :1].clone(),
        visible=lambda rows: None,
        bias=None,
        readers=(),
        asked=None,
        cached_scores=None,
    )
