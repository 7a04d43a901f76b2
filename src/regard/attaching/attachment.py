"""`with regard.attach(model, method) as attached:` puts masks, methods, edits and observers on a Hugging Face model.

Five things are registered together and all undone on exit: an attention function, a mask function, ledger cache
layers, a pre-hook on attention modules (cache, rotary tables) and a pre-hook on the model (input ids).
"""

import itertools
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from regard.attaching.caches import Caches
from regard.attaching.converted import swap_weights
from regard.attaching.edits import Edits
from regard.attaching.function import Context, make_function
from regard.attaching.masking import AttachedMask
from regard.attaching.observers import Observers, Record
from regard.attaching.policy import CachePolicy
from regard.attaching.replacement import Replacement
from regard.attaching.resolve import Attachable, actors_of
from regard.attaching.rotary import Rotary
from regard.attaching.selected import selection
from regard.attaching.sites import ATTENTION, Sites, refuse_unreachable, towers
from regard.attaching.step import RoleRule, Step, named
from regard.attaching.streams import Streams
from regard.attaching.towers import image_token
from regard.attaching.turning import is_rotary_table
from regard.core import Unreachable, Unsupported, show

NUMBERS = itertools.count()
# how to come to the model inside what wraps it, and the attribute that such a wrapper has: PEFT, torch.compile, DDP
WRAPPERS = {"get_base_model()": "get_base_model", "_orig_mod": "_orig_mod", "module": "module"}


class attach:
    """Attach methods to a model for the length of a `with` block.

    model    a transformers model whose code calls the attention interface; others raise Unreachable by name
    methods  a method's name, which may bring settings ("kivi:bits=4"), a configured `regard.method(...)`, a Mask,
             Edit, Observer or Actor, or a list of them; None attaches the bare machinery (the ledger cache and native
             attention)
    where    "text", "vision" or None for all towers; what changes the cache, the mask or the mechanism goes to the
             text tower by itself
    roles    name -> function(input_ids [B, N]) -> bool or int labels [B, N], for sites and masks that name roles
    tokenizer  for methods that ask with texts of their own
    config   settings of the method, where `methods` is its name

    What acts together: any number of masks, edits and observers, and one cache method. A mask narrows what queries
    see beside the model's own mask, at the true indices of tokens, also where a cache method evicts. A mechanism whose
    state stores keys takes the place of attention beside all of these, and leaves single tokens to a cache method if
    there is one; a mechanism with a state of fixed size is attached alone.

    >>> from regard.testing.zoo import build
    >>> model, inputs = build("llama")
    >>> with attach(model, "streaming_llm", sinks=1, window=3) as attached:
    ...     out = model(**inputs)
    >>> attached.stored()  # slots by layer and KV head
    [[4, 4], [4, 4], [4, 4]]
    >>> attached = attach(model, "streaming_llm", sinks=1, window=3).open()
    >>> attached
    <attach streaming_llm(sinks=1, window=3) to LlamaForCausalLM: attached, 0 forwards>
    >>> attached.close()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        methods: Attachable | Iterable[Attachable] | None = None,
        *,
        where: str | None = None,
        roles: dict[str, RoleRule] | None = None,
        strict: bool = True,
        tokenizer: Any = None,
        **config: Any,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            inner = [
                f"; attach to its {name}" for name, attribute in WRAPPERS.items() if hasattr(model, attribute)
            ]
            raise TypeError(
                f"attach takes a transformers PreTrainedModel, not {show(type(model).__name__)}{''.join(inner[:1])}"
            )
        self.model, self.strict = model, strict
        self.actors = actors_of(model, methods, config)
        for actor in self.actors:
            actor.check(model)
        on_text = any(isinstance(a, CachePolicy | Replacement | AttachedMask) for a in self.actors)
        on_text = on_text and not any(actor.reads_tower for actor in self.actors)
        self.where = where or ("text" if on_text and not model.config.is_encoder_decoder else None)
        roles = {**own_roles(model), **(roles or {})}
        self.context = Context(Sites(model), Caches(model, self.actors), self.actors, roles)
        self.context.tokenizer = tokenizer
        self.context.layers_of_text, self.context.layers_of_tower = layer_counts(model)
        self.records: dict[str, list[Record]] = {}
        for actor in self.actors:
            if isinstance(actor, Observers):
                self.records = actor.records
        self.streams = streams_of(model, self.actors, lambda: self.context.step)
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> "attach":
        if self._undo:
            raise Unsupported(
                "this attachment was entered already; leave it first, or make a second attach(...)"
            )
        reachable = towers(self.model, self.where)
        if self.strict:
            refuse_unreachable(self.model, reachable)
        for actor in self.actors:
            if isinstance(actor, CachePolicy):
                actor.calibrate(self.model)
        # what is found out by running the model is found out before anything acts on it
        for actor in self.actors:
            actor.look(self.model)
        if self.streams is not None:
            self.streams.look(self.model)
        try:
            self._switch(reachable)
            self._hook()
            for actor in self.actors:
                if isinstance(actor, Replacement):
                    self._undo.extend(swap_weights(self.model, actor.changed_weights))
        except BaseException:
            self._leave()
            raise
        return self

    def open(self) -> "attach":
        """Attach without a `with` block, until `close`."""
        return self.__enter__()

    def close(self) -> None:
        """Leave the model as it was; once is enough. NeverFired where something attached changed nothing."""
        if self._undo:
            self.__exit__(None, None, None)

    def __repr__(self) -> str:
        methods = ", ".join(str(getattr(actor, "method", actor.name)) for actor in self.actors) or "nothing"
        state, forwards = "not attached", self.context.step.number + 1
        if self._undo:
            state = f"attached, {forwards} forward{'s' * (forwards != 1)}"
        return f"<attach {methods} to {type(self.model).__name__}: {state}>"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        forwards = self.context.step.number + 1
        if kind is None and forwards:
            for actor in self.actors:
                actor.check_fired(forwards)

    def _leave(self) -> None:
        self.context.caches.release()
        while self._undo:
            self._undo.pop()()

    def _switch(self, reachable: list[tuple[str, PreTrainedModel]]) -> None:
        name = f"regard/{next(NUMBERS)}"  # never contains sdpa, flash, flex_attention or "paged|"
        AttentionInterface.register(name, uncompiled(make_function(self.context)))
        AttentionMaskInterface.register(name, self.context.standins.mask)
        self._undo.append(lambda: AttentionInterface._global_mapping.pop(name, None))
        self._undo.append(lambda: AttentionMaskInterface._global_mapping.pop(name, None))
        for _, module in reachable:
            config, old = module.config, module.config._attn_implementation_internal
            if str(old).startswith("regard/"):
                raise Unsupported(
                    f"{type(module).__name__} is attached already, or shares its configuration with a model that is; "
                    "give all methods to one attach(model, [...]), or copy.deepcopy the second model"
                )
            self._undo.append(lambda c=config, o=old: setattr(c, "_attn_implementation_internal", o))
            config._attn_implementation_internal = name
            self.context.standins.own[id(config)] = old

    def _hook(self) -> None:
        hooks = [self.model.register_forward_pre_hook(uncompiled(self._before_forward), with_kwargs=True)]
        for module in self.model.modules():
            if ATTENTION.search(type(module).__name__):
                hooks.append(
                    module.register_forward_pre_hook(uncompiled(self._before_attention), with_kwargs=True)
                )
        self._undo.extend(h.remove for h in hooks)
        if self.streams is not None:
            self._undo.extend(h.remove for h in self.streams.hook())
        for actor in self.actors:
            for hook in actor.hooks(self.model, self.context):
                self._undo.append(hook.remove)
        if any(actor.needs_rotary for actor in self.actors):
            self.context.rotary = Rotary(self.model)
            self._undo.append(self.context.rotary.remove)
        if self.actors and hasattr(self.model, "generate_batch"):
            self._put("generate_batch", refuse_batch)
        for actor in self.actors:
            for name, function in actor.in_place_of(self.model).items():
                self._put(name, function)
        if any(a.reads_tower for a in self.actors) and hasattr(self.model, "_supports_mm_encoder_outputs"):
            # else generate() runs the tower before the model, once for all that follows
            self._put("_supports_mm_encoder_outputs", lambda: False)
        if any(actor.evicts for actor in self.actors) and hasattr(self.model, "generate"):
            self._put("generate", self.context.caches.noting_drafts(self.model.generate))

    def _put(self, name: str, function: Callable) -> None:
        """A function of the model's own, until the attachment ends."""
        own = vars(self.model)
        self._undo.append(lambda: own.pop(name, None))
        if name in own:
            self._undo[-1] = lambda old=own[name]: own.__setitem__(name, old)
        setattr(self.model, name, function)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        context = self.context
        context.caches.pending.clear()
        context.caches.pending.arriving = None
        context.standins.rules.clear()
        context.step = context.step.next(named(module, args, kwargs), context.roles)
        context.step.stream = context.stream
        for actor in self.actors:
            actor.begin(context.step)

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        context = self.context
        if any(actor.needs_input for actor in self.actors):
            context.inputs[id(module)] = kwargs.get("hidden_states", args[0] if args else None)
        for value in (*kwargs.values(), *args):
            if isinstance(value, Cache | EncoderDecoderCache):
                context.caches.adopt(value, context.step)
            elif context.rotary is not None and is_rotary_table(value):
                context.rotary.note(module, value, args, kwargs)

    # what a user reads while it is attached, or after

    @property
    def cache(self) -> Cache | None:
        """The cache of the latest forward, its layers ledger layers."""
        return self.context.caches.cache

    def receipts(self) -> dict[str, int]:
        """How often each edit changed something."""
        return {str(r.edit): r.fired for a in self.actors if isinstance(a, Edits) for r in a.receipts}

    def reached(self) -> dict[str, int]:
        """Calls by attention site."""
        return dict(self.context.sites.reached)

    def bytes_held(self) -> int:
        """Bytes of memory behind the cache of the latest forward, measured on its storages."""
        return sum(layer.bytes_held() for layer in self.context.caches.layers)

    def bytes_stored(self) -> int:
        """Bytes of the keys and values in the cache of the latest forward, without room to grow and tables."""
        return sum(layer.bytes_stored() for layer in self.context.caches.layers)

    def bytes_read(self) -> int:
        """Bytes of keys and values that the latest step read, by all layers, shared ones by each."""
        selects = any(isinstance(actor, CachePolicy) for actor in self.actors)
        return sum(self.context.step.bytes_read.values()) if selects else self.context.caches.bytes_read()

    def selection(self, mass: bool = False) -> list[dict[str, Any]]:
        """What sparse prefill or a mask read in the latest prompt, a row for each layer.

        `kept`, by head, is the share of the keys that its queries might have seen; `dense` says why a layer was left to
        the model. Asked with mass=True before the prompt, `mass` too: the share of the model's own attention that lies
        on what was read.
        """
        return selection(self.actors, mass)

    def stored(self) -> list[list[int]]:
        """Slots held: a list by layer of a list by head."""
        return [layer.stored() for layer in self.context.caches.layers]


def streams_of(model: PreTrainedModel, actors: list[Any], step: Callable[[], Step]) -> Streams | None:
    """What edits and observers do outside attention; None: nothing."""
    receipts = [r for a in actors if isinstance(a, Edits) for r in a.of_streams()]
    observers = [o for a in actors if isinstance(a, Observers) for o in a.of_streams()]
    return Streams(model, receipts, observers, step) if receipts or observers else None


def own_roles(model: PreTrainedModel) -> dict[str, RoleRule]:
    """The roles that a model's configuration gives its tokens: "image", where it reads images."""
    try:
        token = image_token(model)
    except Unreachable:
        return {}
    # a single token is what the model said, whatever its number
    return {"image": lambda ids: (ids == token) & (ids.shape[1] > 1)}


def layer_counts(model: PreTrainedModel) -> tuple[int, int]:
    """How many layers the text and the vision tower have, by the configuration; 0: it has none, or does not say."""
    text = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    vision = getattr(model.config, "vision_config", None)
    return text or 0, getattr(vision, "num_hidden_layers", getattr(vision, "depth", 0)) or 0


def uncompiled(function: Callable) -> Callable:
    """A function that torch.compile leaves as it is: the compiled model has a break there."""
    return torch._dynamo.disable(function)


def refuse_batch(*args: Any, **kwargs: Any) -> None:
    raise Unsupported(
        "generate_batch pages its own cache and would leave the attached method out; use generate"
    )
