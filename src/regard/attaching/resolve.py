"""From the methods of `attach` to what acts, in the order in which it acts; what cannot act together is refused."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from regard import catalog
from regard.attaching.actors import Actor
from regard.attaching.converted import Converted
from regard.attaching.edits import Edits
from regard.attaching.masking import AttachedMask
from regard.attaching.observers import Observers
from regard.attaching.policy import CachePolicy
from regard.attaching.reduction import Reduction
from regard.attaching.replacement import MechanismOnKeys, MechanismReplacement, Replacement, acts_on_keys
from regard.attaching.sparse import SparsePrefill, is_sparse
from regard.attaching.steering import Steering
from regard.core import Edit, Method, Observer, Unsupported, show
from regard.core.composed import overlays
from regard.core.mask import Mask
from regard.core.spec import parse_spec
from regard.kinds.mask import build_mask

Attachable = str | Method | Mask | Converted | Edit | Observer | Actor


def actors_of(
    model: PreTrainedModel, methods: Attachable | Iterable[Attachable] | None, config: dict[str, Any]
) -> list[Actor]:
    """Masks, a mechanism, a cache policy, edits, other actors and observers, in this order."""
    items = [methods] if isinstance(methods, Attachable) else list(methods or [])
    if config and not any(isinstance(x, str) for x in items):
        raise ValueError(f"settings without a method's name: {', '.join(config)}")
    items = [catalog.method(x, **config) if isinstance(x, str) else x for x in beside_one_another(items)]
    by_kind: dict[str, list] = {
        kind: [] for kind in ("mask", "mechanism", "cache", "tokens", "steering", "edit", "actor", "observer")
    }
    for item in items:
        by_kind[kind_of(item)].append(item)
    caches = by_kind["cache"]
    if len(caches) > 1 and any(overlays(catalog.get(m.name)) for m in caches if "+" not in m.name):
        caches = [catalog.laid_over(caches)]
    policies = [CachePolicy(x) for x in caches]
    if len(policies) > 1:
        raise Unsupported(f"one cache method at a time, not {', '.join(p.name for p in policies)}")
    actors: list[Actor] = [as_mask(x) for x in by_kind["mask"]]
    if by_kind["mechanism"]:
        actors.append(replacement(model, by_kind["mechanism"], len(items) > 1, policies))
    actors += policies
    steering = [Steering(x) for x in by_kind["steering"]]
    # whoever changes weights computes heads' outputs anew, so edits of outputs come behind, and other steering too
    actors += [x for x in steering if x.changes_weights]
    if by_kind["edit"]:
        actors.append(Edits(by_kind["edit"]))
    actors += [Reduction(x) for x in by_kind["tokens"]]
    actors += [x for x in steering if not x.changes_weights]
    actors += by_kind["actor"]
    if by_kind["observer"]:
        actors.append(Observers(by_kind["observer"]))
    refuse_beside_removal(actors)
    refuse_two_decoders(actors)
    refuse_two_weights(actors)
    return actors


def beside_one_another(items: list) -> list:
    """The names of cache methods that are laid over one another as one name, so that they share their settings."""
    pages = {x: catalog.get(parse_spec(x)[0]) for x in items if isinstance(x, str)}
    names = [x for x in items if isinstance(x, str) and pages[x].kind == "cache"]
    if len(names) < 2 or not any(overlays(pages[x]) for x in names):
        return items
    return [x for x in items if x not in names] + ["+".join(names)]


def refuse_two_decoders(actors: list[Actor]) -> None:
    """Raise where two methods run passes beside the model's own, or mix its logits."""
    decode = [a.name for a in actors if isinstance(a, Steering) and a.controls_decoding]
    if len(decode) > 1:
        raise Unsupported(f"one decode control at a time, not {', '.join(decode)}")


def refuse_two_weights(actors: list[Actor]) -> None:
    """Raise where two would each compute a head's output from weights of its own: the last alone would count."""
    changing = [a.name for a in actors if isinstance(a, Steering) and a.changes_weights]
    changing += [a.name for a in actors if isinstance(a, Edits) and a.changes_weights and changing]
    if len(changing) > 1:
        raise Unsupported(f"one method that changes attention weights at a time, not {', '.join(changing)}")


def refuse_beside_removal(actors: list[Actor]) -> None:
    """Raise where tokens leave the forward beside what counts them, and for two methods that say which do."""
    reductions = [actor for actor in actors if isinstance(actor, Reduction)]
    if len(reductions) > 1:
        raise Unsupported(f"one tokens method at a time, not {', '.join(r.name for r in reductions)}")
    beside = [a.name for a in actors if not isinstance(a, Reduction) and (a.touches_rows or a.needs_rotary)]
    if reductions and reductions[0].removes and beside:
        raise Unsupported(
            f"{reductions[0].name} removes tokens, and {', '.join(beside)} counts rows or moves keys of the whole "
            'text; attach Reduction(method, how="mask"), which hides them'
        )


def kind_of(item: Any) -> str:
    """Which kind of actor this becomes."""
    if isinstance(item, Edit):
        return "edit"
    if isinstance(item, Observer):
        return "observer"
    if isinstance(item, Mask):
        return "mask"
    if isinstance(item, Converted) and item.method.page.kind == "mask":
        return "mask"
    if isinstance(item, Converted | Replacement):
        return "mechanism"
    if isinstance(item, Actor):
        return "actor"
    if not isinstance(item, Method):
        raise TypeError(f"attach takes masks, names, methods, edits and observers, not {show(item)}")
    if item.page.kind not in ("mask", "mechanism", "cache", "tokens", "steering"):
        raise Unsupported(
            f"{item.name} is a {item.page.kind}; attach takes masks, mechanisms, cache methods, tokens and steering "
            "methods, edits and observers"
        )
    return item.page.kind


def as_mask(item: Mask | Method | Converted) -> AttachedMask:
    if isinstance(item, Converted):
        own = {layer: item.method.with_settings(**settings) for layer, settings in item.by_layer.items()}
        masks = {layer: build_mask(method, causal=False) for layer, method in own.items()}
        return AttachedMask(build_mask(item.method, causal=False), item.method, masks)
    if isinstance(item, Mask):
        return AttachedMask(item)
    return AttachedMask(build_mask(item, causal=False), item)


def replacement(
    model: PreTrainedModel, items: list, beside: bool, policies: list[CachePolicy]
) -> Replacement:
    """The mechanism, which acts on the keys of the ledger where anything is attached beside it."""
    item = Converted(items[0]) if isinstance(items[0], Method) else items[0]
    if len(items) == 1 and isinstance(item, Converted) and is_sparse(item.method):
        return SparsePrefill(item, decodes=not policies)
    if not beside:
        return item if isinstance(item, Replacement) else MechanismReplacement(item)
    name = item.name if isinstance(item, Replacement) else item.method.name
    if len(items) > 1 or not isinstance(item, Converted) or not acts_on_keys(item.method):
        raise Unsupported(
            f"{name} takes the place of attention: no mask, cache method, edit, observer or second mechanism acts "
            "beside it (only beside a mechanism whose state stores keys)"
        )
    for policy in policies:
        if policy.page.attention is not None:
            raise Unsupported(f"{policy.name} has an attention of its own, and {name} would take its place")
    return MechanismOnKeys(item, prefill=bool(policies))
