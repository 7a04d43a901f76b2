"""Edits and observers of what belongs to a layer as a whole: the residual, what its sublayers add, the logits.

They are carried out by hooks on the modules that `anatomy` found, in the order of a layer: resid_pre, out, resid_mid,
mlp, resid_post. What is added to the residual is `scale` times what a module returns, and the residual between two
sublayers is returned by none: it is changed through what is added before it. Layers that nothing names have no hook.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.anatomy import LayerAnatomy, anatomy, stream
from regard.attaching.edits import Receipt
from regard.attaching.observers import Record
from regard.attaching.sites import towers
from regard.attaching.step import Step
from regard.attaching.targets import Rows, rows_of
from regard.attaching.verbs import edited, texts_of
from regard.core import Observer, Unreachable, Unsupported
from regard.core.edit import STREAMS, int_tuple
from regard.core.errors import present

Hook = Callable[..., Any]


@dataclass
class Fed:
    """The tokens of one forward, as rows of a site count them."""

    new: int
    tokens_fed: int
    real: Tensor | None  # [B, tokens fed] bool: those that are not padding; None: all
    phase: str

    def among_fed(self) -> Tensor | None:
        return self.real

    def last(self, n: int) -> "Fed":
        """The same forward of which only the last n tokens are computed, as logits may be."""
        return Fed(n, self.tokens_fed, self.real, self.phase)

    def asking(self) -> Tensor | None:
        return None if self.real is None else self.real[:, -self.new :]


class AsWritten:
    """Until it is removed compiled models run as they are written: a graph does not ask whether a hook still is."""

    def __init__(self) -> None:
        self.stance = torch.compiler.set_stance("force_eager")

    def remove(self) -> None:
        self.stance.__exit__(None, None, None)


@dataclass
class Streams:
    """All hooks of an attachment on the streams of the text tower."""

    model: PreTrainedModel
    receipts: list[Receipt]
    observers: list[tuple[Observer, list[Record]]]
    step: Callable[[], Step]  # the forward that runs
    fed: Fed | None = None
    mask: Tensor | None = None  # the attention mask that the whole model was given
    pre: dict[int, Tensor] = field(default_factory=dict)  # resid_pre by layer, within a forward

    def look(self, model: PreTrainedModel) -> None:
        if self._named(STREAMS[:-1]):
            anatomy(model)

    def hook(self) -> list[Any]:
        """Hooks on what is named, and on the modules that are given the tokens; each with a `remove`."""
        for site in (r.edit.site for r in self.receipts):
            self._check(site.tower, site.layers)
        for observer, _ in self.observers:
            self._check(observer.site.tower, observer.site.layers)
        hooks: list[Any] = [AsWritten()]
        try:
            for hook in self._hooks():
                hooks.append(hook)
        except BaseException:
            for hook in hooks:
                hook.remove()
            raise
        return hooks

    def _hooks(self) -> Iterator[Any]:
        tower = towers(self.model, "text")[0][1]
        yield tower.register_forward_pre_hook(outside(self._begin), with_kwargs=True)
        if tower is not self.model:
            yield self.model.register_forward_pre_hook(outside(self._note_mask), with_kwargs=True)
        for layer in anatomy(self.model) if self._named(STREAMS[:-1]) else ():
            yield from self._hook_layer(layer)
        if self._named(("logits",)):
            yield self.model.register_forward_hook(outside(self._logits))

    def _check(self, tower: str | None, layers: Any) -> None:
        if tower not in (None, "text"):
            raise Unsupported(
                f"the residual of the {tower} tower: sites of layers as a whole are in the text tower"
            )
        last = max(int_tuple(layers) or (0,))
        if last and last >= len(anatomy(self.model)):
            raise Unreachable(
                f"layer {last}: {type(self.model).__name__} has {len(anatomy(self.model))} layers"
            )

    def _named(self, quantities: Iterable[str], layer: int | None = None) -> bool:
        """Whether anything here is of these quantities (and this layer)."""
        sites = [r.edit.site for r in self.receipts] + [o.site for o, _ in self.observers]
        of = [int_tuple(s.layers) for s in sites if s.quantity in quantities]
        return any(layer is None or layers is None or layer in layers for layers in of)

    def _live(self, quantity: str, layer: int) -> bool:
        """Whether a record of this quantity stays in the graph."""
        sites = [o.site for o, _ in self.observers if o.live and o.site.quantity == quantity]
        return any(s.layers is None or layer in (int_tuple(s.layers) or ()) for s in sites)

    def _hook_layer(self, layer: LayerAnatomy) -> Iterator[Any]:
        n, middle = layer.number, self._named(("resid_mid",), layer.number)
        if middle and not layer.sequential:
            raise Unreachable(
                f"resid_mid of {layer.name}: its two sublayers run side by side, so nothing lies between them"
            )
        if middle or self._named(("resid_pre",), n):
            yield layer.module.register_forward_pre_hook(outside(self._before(n)), with_kwargs=True)
        if middle or self._named(("out",), n):
            yield layer.out.register_forward_hook(outside(self._out(layer, middle)))
        if self._named(("mlp",), n):
            yield layer.mlp.register_forward_hook(outside(self._added("mlp", layer)))
        if self._named(("resid_post",), n):
            yield layer.module.register_forward_hook(outside(self._after(n)))

    # the tokens of a forward

    def _note_mask(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.mask = flat_mask(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = next(
            (v for v in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if v is not None), None
        )
        new = present(given, "a model is given ids or embeddings").shape[1]
        mask = flat_mask(kwargs.get("attention_mask"))
        mask, self.mask = self.mask if mask is None else mask, None
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        real = None if mask is None or bool(mask[:, -new:].all()) else mask[:, -new:].bool()
        self.fed, self.pre = Fed(new, new, real, "decode" if new == 1 and past else "prefill"), {}

    # hooks, by quantity

    def _before(self, n: int) -> Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            named = "hidden_states" in kwargs
            x = self._changed("resid_pre", n, kwargs["hidden_states"] if named else args[0])
            self.pre[n] = x
            return (args, {**kwargs, "hidden_states": x}) if named else ((x, *args[1:]), kwargs)

        return hook

    def _out(self, layer: LayerAnatomy, middle: bool) -> Hook:
        added = self._added("out", layer)

        def hook(module: nn.Module, args: tuple, y: Any) -> Any:
            y = added(module, args, y)
            if not middle:
                return y
            pre, out = self.pre[layer.number], present(live(y), "a sublayer returns what it adds")
            old = pre + layer.scale * out
            new = self._changed("resid_mid", layer.number, old)
            if new is not old:
                return put(y, torch.where(new == old, out, (new - pre) / layer.scale))
            # what is recorded in the graph must lie on the way to what follows
            return put(y, (old - pre) / layer.scale) if self._live("resid_mid", layer.number) else y

        return hook

    def _added(self, quantity: str, layer: LayerAnatomy) -> Hook:
        def hook(module: nn.Module, args: tuple, y: Any) -> Any:
            out = present(live(y), "a sublayer returns what it adds")
            x = layer.scale * out if layer.scale != 1 else out
            new = self._changed(quantity, layer.number, x)
            if new is x and not (layer.scale != 1 and self._live(quantity, layer.number)):
                return y
            return put(y, new / layer.scale if layer.scale != 1 else new)

        return hook

    def _after(self, n: int) -> Hook:
        def hook(module: nn.Module, args: tuple, y: Any) -> Any:
            x = present(live(y), "a layer returns the residual")
            new = self._changed("resid_post", n, x)
            return y if new is x else put(y, new)

        return hook

    def _logits(self, module: nn.Module, args: tuple, output: Any) -> Any:
        x = output.get("logits") if hasattr(output, "get") else None
        if x is None:
            raise Unsupported(f"{type(module).__name__} returns no logits")
        new = self._changed("logits", 0, x)
        if new is not x:
            output["logits"] = new
        return output

    # what is done to a stream

    def _changed(self, quantity: str, layer: int, x: Tensor) -> Tensor:
        """x [B, N, width] after the edits here, and written down; the very x where no edit is."""
        fed = present(self.fed, "a forward has begun").last(x.shape[1])
        for receipt in self.receipts:
            site = receipt.edit.site
            if site.quantity == quantity and site.covers(layer, "text", fed.phase):
                rows = rows_of(site, fed)
                if rows.columns and texts_of(receipt.edit, x.shape[0]):
                    x = edited(x[:, None], receipt.edit, [0], rows, fed.asking())[:, 0]
                    receipt.note(layer, ())
        step = self.step()
        for observer, records in self.observers if step.stream == "main" else ():
            site = observer.site
            if site.quantity == quantity and site.covers(layer, "text", fed.phase):
                rows = rows_of(site, fed)
                if rows.columns:
                    records.append((layer, step.number, seen_rows(x, observer, rows)))
        return x


def seen_rows(x: Tensor, observer: Observer, rows: Rows) -> Tensor:
    """[texts, rows, width] of x [B, N, width]."""
    x = x if observer.site.rows is None else rows.picked(x[:, None, rows.columns], torch.nan)[:, 0]
    texts = int_tuple(observer.site.texts)
    x = x if texts is None else x[list(texts)]
    return x if observer.live else x.detach().clone()


def live(value: Any) -> Tensor | None:
    """The first tensor [B, N, width] of what a module gives, in its graph."""
    if isinstance(value, list | tuple):
        return next((v for v in value if stream(v) is not None), None)
    return value if stream(value) is not None else None


def put(value: Any, x: Tensor) -> Any:
    """What a module gives, with x in the place of its first tensor [B, N, width]."""
    if isinstance(value, Tensor):
        return x
    at = next(i for i, v in enumerate(value) if stream(v) is not None)
    return (*value[:at], x, *value[at + 1 :])


def flat_mask(mask: Any) -> Tensor | None:
    """A mask [B, N] of a model's inputs; one of another form says nothing of padding."""
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def outside(function: Hook) -> Hook:
    """A hook that torch.compile leaves as it is."""
    return torch._dynamo.disable(function)
