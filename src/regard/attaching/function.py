"""The attention function that an attachment registers: native where nothing acts, the actors' stages elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.caches import Caches
from regard.attaching.lazy_mask import LazyMask, Standins
from regard.attaching.rotary import Rotary
from regard.attaching.sites import ModuleSite, Sites
from regard.attaching.step import RoleRule, Step, text_labels
from regard.attaching.views import make_view, run
from regard.core import Unsupported, show
from regard.core.deprecation import moved
from regard.core.errors import present
from regard.ops import View, few_rows, mix
from regard.ops.clock import part

# (out [B, N, H, E], weights or None), which transformers expects of an attention function
AttentionOutput = tuple[Tensor, Tensor | None]
# options with numbers that this function computes with
KNOWN = ("position_bias", "s_aux")

__getattr__ = moved(__name__, {"Attended": "regard.attaching.function:AttentionOutput"})


@dataclass
class Context:
    """What the attention function and the hooks of one attachment have in common."""

    sites: Sites
    caches: Caches
    actors: Sequence[Actor]
    roles: Mapping[str, RoleRule]
    rotary: Rotary | None = None
    standins: Standins = field(default_factory=Standins)
    step: Step = field(default_factory=Step)
    tokenizer: Any = None  # for methods that have texts of their own
    stream: str = "main"  # which of the passes of a steering method runs
    layers_of_text: int = 0
    layers_of_tower: int = 0
    inputs: dict[int, Tensor] = field(default_factory=dict)  # of attention modules, from the hook to the call


def make_function(context: Context) -> Callable[..., AttentionOutput]:
    """The function `(module, query, key, value, attention_mask, ...) -> (out [B, N, H, E], weights or None)`."""

    def regard_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> AttentionOutput:
        options = dict(scaling=scaling, dropout=dropout, **kwargs)
        # else it is of another model that shares the configuration
        is_attached = module in context.sites
        site = context.sites.of(module) if is_attached else ModuleSite(type(module).__name__, "text", 0)
        mask = context.standins.lazy(attention_mask)
        call = AttentionCall(module, site, query, key, value, mask, options, context.step)
        if not is_attached:
            return native(call)
        if context.rotary is not None and context.rotary.probe is not None:
            return context.rotary.answer(query, key, value), None
        complete(context, call)
        out = dispatch(context, call)
        if call.layer is not None and call.turn.last:
            for actor in call.acting:
                actor.finish(call)
            call.layer.attended()
        return out

    return regard_attention


def complete(context: Context, call: AttentionCall) -> None:
    """Fill in what the attachment knows of the call's module."""
    module = call.module
    context.sites.count(call.site)
    call.layer, call.turn = context.caches.layer_of(call.q, call.k, call.v)
    call.layers = context.caches.layers
    refuse_options(call)
    chosen = call.options.pop("indices", None)
    if chosen is not None:
        if call.rule is None:
            raise Unsupported(f"{call.where} chooses its keys itself, beside a 4-D mask of your own")
        call.mask = LazyMask.of(call.rule.among(chosen))
    # many models do not pass it on
    if context.step.output_attentions:
        call.options["output_attentions"] = True
    call.x, call.rotary = context.inputs.pop(id(module), None), context.rotary
    if call.layer is not None and call.rotary is not None and call.turn.nth == 0:
        call.rotary.owners[call.layer] = module
        note_positions(call, call.rotary.positions(module))
    if any(actor.reads_roles for actor in context.actors):
        call.labels = text_labels(call.layer, context.step, context.roles, call.q.shape[2])


def note_positions(call: AttentionCall, new: tuple[Tensor, bool] | None) -> None:
    """Where the model puts this step's tokens; layers that begin with the very same table share what it becomes."""
    layer = present(call.layer, "positions are those of a stored text")
    if new is None:
        return
    at, several = new
    facts = (layer.seen, several, layer.positions, at, call.order)

    def noted() -> Tensor | None:
        layer.note_positions(new, call.order)
        return layer.positions

    layer.positions = call.step.places.once("positions", facts, noted)


def refuse_options(call: AttentionCall) -> None:
    """Raise for what a model hands to its attention beside the scores, and nothing here would compute."""
    name = type(call.module).__name__
    if call.options.get("block_indices") is not None:
        raise Unsupported(f"{name} hands over its own list of blocks, which is not supported")
    heads, queries = call.q.shape[1:3]
    for option, x in call.options.items():
        if option in KNOWN or not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        by_query = x.dim() == 4 and x.shape[1] in (1, heads) and x.shape[2] == queries
        if by_query or x.shape == (heads,):
            raise Unsupported(f"{name} hands {option} {show(x)} to its attention, which is not known here")


def dispatch(context: Context, call: AttentionCall) -> AttentionOutput:
    """A mechanism instead of attention, the model's own attention, or the stages of what acts here."""
    for actor in context.actors:
        actor.check_call(call)
    call.acting = [actor for actor in context.actors if actor.acts_on(call)]
    for actor in call.acting:
        out = actor.replace(call)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    if not call.acting and (call.layer is None or call.layer.plain):
        return native(call)
    return by_groups(call)


def native(call: AttentionCall) -> AttentionOutput:
    """What the model does by itself: transformers' SDPA with the mask it would have had, or explicit weights."""
    mask, options = call.mask, call.options
    explicit = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    explicit = explicit or bool(options.get("output_attentions"))
    explicit = explicit or (call.own_mask and mask is not None and mask.dtype != torch.bool)
    if not explicit:
        sdpa_mask = mask.rule.native() if isinstance(mask, LazyMask) else mask
        if call.rule is not None and sdpa_mask is None and not call.rule.bidirectional:
            # no mask says causal here; modules of some models (BigBird-Pegasus) do not say that they are
            options = {**options, "is_causal": True}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](call.module, call.q, call.k, call.v, sdpa_mask, **options)
    if options.get("dropout") and call.module.training:
        raise Unsupported(
            f"attention dropout in {type(call.module).__name__}, which needs explicit weights; call model.eval()"
        )
    view = make_view(replace(call, layer=None, group=None))
    if options.get("output_attentions"):
        weights = view.weights()
        return mix(weights, call.v).transpose(1, 2).contiguous(), weights
    return run(view).transpose(1, 2).contiguous(), None


def by_groups(call: AttentionCall) -> AttentionOutput:
    """The stages of every actor, one group of heads at a time."""
    if call.options["dropout"] and call.module.training:
        raise Unsupported("attention dropout under a cache method or an edit; call model.eval()")
    groups = [] if call.layer is None else call.layer.shown(call.fed)
    if len(groups) < 2:
        out, weights = run_stages(replace(call, group=groups[0] if groups else None))
        return out.transpose(1, 2).contiguous(), weights
    if any(actor.touches_rows for actor in call.acting):
        raise Unsupported("edits and observers on a cache whose heads hold different lengths")
    share, parts = call.q.shape[1] // sum(len(g.heads) for g in groups), {}
    for group in groups:
        heads = [h * share + i for h in group.heads for i in range(share)]
        options = {n: x[heads] if n == "s_aux" and x is not None else x for n, x in call.options.items()}
        k, v = group.kv()
        cut = replace(call, q=call.q[:, heads], k=k, v=v, options=options, group=group, heads=tuple(heads))
        parts.update(zip(heads, run_stages(cut)[0].unbind(1)))
    return torch.stack([parts[h] for h in range(call.q.shape[1])], dim=2), None


def run_stages(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Rewrite, narrow, select, attend, edit, observe, evict: [B, H, N, E], and weights where the model wants them."""
    for actor in call.acting:
        if actor.rewrites:
            actor.rewrite(call, make_view(call))
    for actor in call.acting:
        call = actor.narrow(call)
    call.view = read = make_view(call)
    with part("scoring"):
        for actor in call.acting:
            read = actor.select(call, read)
    out, weights = attend(call, read)
    for actor in call.acting:
        out = actor.edit(call, read, out)
    for actor in call.acting:
        actor.observe(call, read, out)
    if call.options.get("output_attentions") and (weights is None or touched(call)):
        weights = call.weights(read)
    with part("scoring"):
        for actor in call.acting:
            actor.evict(call, read)
    return out, weights


def attend(call: AttentionCall, read: View) -> tuple[Tensor, Tensor | None]:
    """[B, H, N, E] over what is read, by the actor that has an attention of its own, and the weights if known."""
    for actor in call.acting:
        out = actor.attend(call, read)
        if out is not None:
            return out, None
    if read.cached_output is not None:
        return read.cached_output, None
    if untouched(call, read) and (touched(call) or not few_rows(call.q, call.k)):
        # rows that no edit touches stay as the model has them
        out, weights = native(call)
        return out.transpose(1, 2), weights
    return run(read), None


def touched(call: AttentionCall) -> bool:
    return any(actor.touches_rows for actor in call.acting)


def untouched(call: AttentionCall, read: View) -> bool:
    """Whether the model's own attention, under its own mask, reads just this."""
    whole = read is call.view and read.cached_scores is None and not (call.rule and call.rule.narrowings)
    return whole and (call.layer is None or call.layer.plain)
