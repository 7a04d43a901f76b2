"""A mechanism in the place of a model's attention: what is attached, how a layer runs it, and a cache of its state.

`Converted` is a mechanism with learned parts for every attention module and, where the model was fine-tuned around it,
the weights that changed. While it is attached each layer calls page.fast(q, k, v, ...) and its cache layer holds the
state that came back, nothing else: for linear attention that is the same number of bytes at any length.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from regard.core import Mechanism, Method, Unsupported, require
from regard.models.lazy import LazyMask
from regard.models.ledger import LedgerLayer
from regard.ops.states import leaves, mapped

REFUSED = {"softcap": "a softcap", "s_aux": "attention sinks", "position_bias": "a learned position bias"}


def own(t: Tensor) -> Tensor:
    """The tensor, or a copy where it is a part of a larger one that it would keep in memory."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False)
class Converted:
    """A mechanism for a model: `regard.attach(model, converted)`.

    params   by the name of an attention module: what the page's init gave there, trained; empty for a page without any
    weights  by the name of a parameter: what takes its place while attached, and is taken out again on leaving
    report   what was measured when it was made
    """

    method: Method
    params: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Any, model: nn.Module | None = None, tokenizer: Any = None) -> None:
        """Write it to a folder: with the model an ordinary Hugging Face folder of the changed weights beside it."""
        from regard.models.convert import save  # the way to disk lies beside the way that it is made

        save(self, folder, model, tokenizer)


class StateLayer(LedgerLayer):
    """A cache layer that holds the state of a mechanism and no keys. `get_seq_length` is tokens seen."""

    @property
    def state(self) -> Any:
        return self.memory["state"][0] if "state" in self.memory else None

    @state.setter
    def state(self, state: Any) -> None:
        self.memory["state"] = (state,)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.pending is None:
            raise Unsupported(
                "this cache holds a mechanism's state and no keys; attach the mechanism again to go on with it"
            )
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        self.seen += key_states.shape[2]
        self.pending.append(self)
        return key_states, value_states

    @property
    def plain(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.seen:
            raise Unsupported(
                "assisted decoding and crop need to take tokens back, which a state that has summed them cannot; "
                "generate without an assistant or prompt lookup"
            )

    def _rows(self, rows: Tensor) -> None:
        if "state" in self.memory:
            self.state = mapped(lambda t: t.index_select(0, rows.to(t.device)), self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(torch.arange(self._batch()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(torch.arange(self._batch())[indices.cpu()])

    def _batch(self) -> int:
        return next((t.shape[0] for t in leaves(self.state)), 0)

    def bytes_held(self) -> int:
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves(self.state)}
        return sum(held.values())

    def stored(self) -> list[int]:
        return []


class Mixer(ABC):
    """What runs in the place of a model's attention while it is attached."""

    name: str
    weights: Mapping[str, Tensor]
    layer: type[LedgerLayer]  # what cache layers become

    def __init__(self) -> None:
        self.inputs: dict[
            int, Tensor
        ] = {}  # the layer's input by attention module, from the hook to the call
        self.acted = 0

    @abstractmethod
    def mix(self, site: "Site") -> Tensor:
        """[B, H, N, E]: the attention of one call."""

    def check(self, model: nn.Module) -> None:
        """Raise for a model that it cannot run on."""
        if getattr(model.config, "is_encoder_decoder", False):
            raise Unsupported(
                f"{self.name} on {type(model).__name__}, an encoder-decoder: causal models only"
            )

    def __call__(self, session: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, call: dict,
                 layer: LedgerLayer | None) -> tuple[Tensor, None]:  # fmt: skip
        at = Site(session, module, q, k, v, mask, call, layer, self.inputs.pop(id(module), None))
        at.check(self.name)
        self.acted += 1
        return self.mix(at).transpose(1, 2).contiguous(), None

    def fresh(self, old: DynamicLayer) -> LedgerLayer:
        """The cache layer that takes the place of a dynamic one."""
        if old.is_initialized and old.get_seq_length():
            raise Unsupported(
                f"{self.name} cannot go on with a cache that the model's own attention filled; start a new text"
            )
        return self.layer()


@dataclass
class Site:
    """One call of one attention module."""

    session: Any
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    call: dict
    layer: LedgerLayer | None
    x: Tensor | None

    @property
    def name(self) -> str:
        return self.session.names[id(self.module)]

    def check(self, what: str) -> None:
        """Raise, by the name of the module, for what a mechanism cannot take over."""
        call, where = self.call, f"{what} at {self.name} ({type(self.module).__name__})"
        for name, said in REFUSED.items():
            if call.get(name) is not None:
                raise Unsupported(f"{where}: this model's attention has {said}, which would be left out")
        rule = self.mask.rule if isinstance(self.mask, LazyMask) else None
        if call.get("sliding_window") is not None or (rule is not None and not rule.causal):
            raise Unsupported(
                f"{where}: its mask is not plain causal (a sliding window, chunks, packed texts, images)"
            )
        if self.mask is not None and rule is None:
            raise Unsupported(f"{where}: a 4-D mask of your own; give a 2-D attention_mask")
        causal = call.get("is_causal")
        if not (getattr(self.module, "is_causal", True) if causal is None else causal):
            raise Unsupported(f"{where}: attention that is not causal")
        if call.get("output_attentions"):
            raise Unsupported(f"{where}: output_attentions, as no weights are built")
        if call.get("dropout") and self.module.training:
            raise Unsupported(f"{where}: attention dropout; call model.eval()")
        if self.layer is None and self.session.caching:
            raise Unsupported(f"{where}: it reads the keys that another layer stored")
        if self.k.shape[2] != self.q.shape[2] and isinstance(self.layer, StateLayer | None):
            raise Unsupported(f"{where}: {self.q.shape[2]} queries on {self.k.shape[2]} keys")

    def there(self, stores: bool) -> Tensor | None:
        """[B, 1, 1, N] bool: this call's tokens that are not padding, or all so far; None: every token is one."""
        pad = self.mask.rule.pad() if isinstance(self.mask, LazyMask) else None
        if pad is None:
            return None
        seen = self.k.shape[2] if self.layer is None else self.layer.seen
        own = pad[:, :seen] if stores else pad[:, seen - self.k.shape[2] : seen]
        return own[:, None, None]

    def scaled(self) -> Tensor:
        """Queries such that a page's own scale, one over the root of the width, gives the model's."""
        scaling = self.call.get("scaling")
        ratio = 1.0 if scaling is None else scaling * self.q.shape[-1] ** 0.5
        return self.q if abs(ratio - 1) < 1e-6 else self.q * ratio


class Running(Mixer):
    """A converted mechanism at work."""

    layer = StateLayer

    def __init__(self, converted: Converted) -> None:
        super().__init__()
        self.converted, self.weights = converted, converted.weights
        self.method, self.name = converted.method, converted.method.name
        page = self.method.page
        if "causal_self" not in page.patterns:
            raise Unsupported(f"{self.name} has no causal form, which a language model needs")
        if page.roles:
            raise Unsupported(
                f"{self.name} reads the roles {page.roles} of tokens, which a model does not give"
            )

    def check(self, model: nn.Module) -> None:
        super().check(model)
        dims = sizes(model)
        if not self.converted.params and learned(self.method, dims):
            raise Unsupported(
                f"{self.name} has learned parts and none were given: "
                f"convert first, and attach what regard.models.convert.convert(model, tokenizer, {self.name!r}) gives"
            )
        self.stores = grows(self.method, dims)

    def mix(self, site: Site) -> Tensor:
        page, cfg, params = self.method.page, self.method.config, None
        if self.converted.params:
            if site.name not in self.converted.params:
                raise Unsupported(f"{self.name} was not converted for {site.name}")
            params = {n: p.to(site.q.device) for n, p in self.converted.params[site.name].items()}
        out, state, *_ = (page.fast or page.reference)(
            site.scaled(), site.k, site.v, cfg, pattern="causal_self", mask=site.there(self.stores), roles=None,
            state=None if site.layer is None else site.layer.state, params=params, x=site.x if page.x else None,
        )  # fmt: skip
        if site.layer is not None:
            site.layer.state = mapped(own, state)
        return out


def put_in(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Callable[[], Any]]:
    """Put changed weights in the place of the model's own; what undoes it."""
    named = dict(model.named_parameters())
    undo: list[Callable[[], Any]] = []
    missing = sorted(set(weights) - set(named))
    require(not missing, "the changed weights are parameters of this model", missing=missing)
    for name, new in weights.items():
        at, old = named[name], named[name].data
        require(new.shape == old.shape, "a changed weight has the shape of the model's", name=name, new=new)
        undo.append(partial(setattr, at, "data", old))
        at.data = new.detach().to(old.device, old.dtype)
    return undo


def sizes(model: nn.Module) -> dict[str, int]:
    """The sizes that a page's init asks for, from the model's configuration."""
    config = model.config.get_text_config(decoder=True)
    heads, width = config.num_attention_heads, config.hidden_size
    key = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return {"heads": heads, "kv_heads": kv_heads, "key": key, "value": key, "width": width}


def learned(method: Method, dims: dict[str, int]) -> bool:
    page: Mechanism = method.page
    return page.init is not None and bool(page.init(method.config, dims))


def grows(method: Method, dims: dict[str, int]) -> bool:
    """Whether the state stores keys, so that its mask is of all keys so far."""
    size = method.page.state_size
    return size is not None and size(method.config, dims, 9) != size(method.config, dims, 8)


def mixer(item: Any) -> Mixer | None:
    """What `attach` was given, if it takes the place of attention."""
    if isinstance(item, Mixer):
        return item
    if isinstance(item, Method) and item.page.kind == "mechanism":
        item = Converted(item)
    return Running(item) if isinstance(item, Converted) else None
