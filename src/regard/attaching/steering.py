"""A steering page at work: edits of attention and layers, streams beside the main pass, mixed logits."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.actors import Actor, AttentionCall, refuse_encoder_decoder
from regard.attaching.anatomy import LayerAnatomy, anatomy
from regard.attaching.heads import early_logits
from regard.attaching.steered_calls import hidden_role, last_row, steered_of
from regard.attaching.step import Step
from regard.attaching.streams import live, put
from regard.attaching.streams_beside import (
    Recorded,
    at_columns,
    begun,
    first_layer,
    followers_of,
    hang_on,
    newest_columns,
    newest_logits,
    stream_inputs,
)
from regard.attaching.towers import Tower, image_token, layouts
from regard.core import Method, NeverFired, Unsupported, require
from regard.core.errors import present
from regard.kinds.steering import SteeringPage
from regard.ops import View, mix, row_blocks
from regard.ops.steered import Steered, Stream

MAIN = "main"
UNSET = object()


class Steering(Actor):
    """A steering page and its settings."""

    touches_rows = True
    reads_roles = True
    needs_input = True

    def __init__(self, method: Method) -> None:
        self.method, self.name = method, method.label
        page = self.page
        self.on_attention = any(part is not None for part in (page.scores, page.weights, page.z))
        self.streams: tuple[Stream, ...] = () if page.streams is None else tuple(page.streams(self.config))
        names = [s.name for s in self.streams]
        require(len({*names, MAIN}) == len(names) + 1, "streams have names of their own", names=names)
        pixels = any(s.pixels is not None for s in self.streams)
        self.reads_tower = page.needs_image or page.tower != "text" or pixels
        self.stream, self.step, self.tower = MAIN, Step(), Tower()
        self.recorded: dict[str, Recorded] = {}  # of the streams, on the latest prompt
        self.memory: Any = UNSET  # what the page prepared on the latest prompt
        self.notes: dict[int, dict] = {}  # of layers without a ledger
        self.logits: dict[str, Tensor] = {}  # [B, V] of the streams that have run in this step
        self.began: dict[str, Any] = {}  # caches of the streams
        self.early_states: dict[int, Tensor] = {}  # [B, d] of each layer, at the newest token
        self.columns: Tensor | None = None  # of the newest token of each text in the forward that runs
        self.new, self.layers, self.acted = 0, 0, 0

    @property
    def controls_decoding(self) -> bool:
        """Whether it runs passes beside the model's own, mixes logits, or searches by itself."""
        return bool(self.streams) or self.page.logits is not None or self.page.search is not None

    @property
    def page(self) -> SteeringPage:
        return self.method.page

    @property
    def config(self) -> Any:
        return self.method.config

    def check(self, model: PreTrainedModel) -> None:
        refuse_encoder_decoder(self.name, model)
        if not self.page.acts_on_models:
            raise Unsupported(
                f"{self.name} acts on {', '.join(self.page.card.needs)}, which attach does not reach"
            )
        if self.page.needs_image:
            image_token(model)
        self.model = model

    def check_fired(self, forwards: int) -> None:
        neutral = self.page.card.neutral
        changes_nothing = neutral and all(getattr(self.config, k) == v for k, v in neutral.items())
        if self.acted == 0 and not changes_nothing:
            raise NeverFired(f"{self.name} never acted in {forwards} forwards")

    # the streams

    def hooks(self, model: PreTrainedModel, context: Any) -> Iterator[Any]:
        self.context = context
        outside = torch._dynamo.disable
        yield model.register_forward_pre_hook(outside(self._run_streams), with_kwargs=True, prepend=True)
        yield model.register_forward_hook(outside(self._mix), with_kwargs=True)
        if self._reads_layers():
            layers = anatomy(model)
            self.layers = len(layers)
            for layer in layers:
                yield from self._hook_layer(layer)

    def _reads_layers(self) -> bool:
        records = any({*s.records} - {"z"} for s in self.streams)
        return bool(self.page.layer_edits) or records or self.page.logits is not None

    def _run_streams(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the main pass: those that are carried on, and on a prompt those that are read once."""
        if self.stream != MAIN:
            return
        given = {"input_ids": args[0], **kwargs} if args else dict(kwargs)
        cache = given.get("past_key_values")
        first = not begun(cache)
        self._check_image(given, first)
        self.new = new_tokens(given)
        if first:
            self.memory, self.notes, self.recorded = UNSET, {}, {}
        elif self.page.prepare is not None:
            layer = first_layer(cache)
            known = None if layer is None else layer.prepared
            self.memory = present(known, f"{self.name}: this cache began with the method attached")[0]
        self.logits, self.began, caches = {}, {}, followers_of(cache)
        for stream in self.streams:
            if stream.once and not first:
                continue
            own = caches.get(stream.name)
            if not first and own is None:
                raise Unsupported(
                    f"{self.name}: this cache began without the stream {stream.name!r}; attach before it"
                )
            self._run(stream, given, own)
        self.columns = newest_columns(given, self.new, self.model.device)

    def _run(self, stream: Stream, given: dict, cache: Any) -> None:
        inputs = stream_inputs(self.model, stream, given, cache, getattr(self.config, "seed", 0))
        self.stream, self.context.stream = stream.name, stream.name
        self.columns = newest_columns(inputs, new_tokens(inputs), self.model.device)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.model.training):
                output = self.model(**inputs)
        finally:
            self.stream, self.context.stream = MAIN, MAIN
        self.logits[stream.name] = newest_logits(output.logits, self.columns, new_tokens(inputs))[0].float()
        if inputs.get("use_cache"):
            self.began[stream.name] = output.past_key_values

    def _check_image(self, given: dict, first: bool) -> None:
        ids = given.get("input_ids")
        if self.page.needs_image and first:
            there = ids is not None and bool((ids == image_token(self.model)).any())
            require(there, f"{self.name} steers by an image: the prompt holds visual tokens", visual_tokens=0)

    def _mix(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Behind the main pass: the logits of the next token, and the caches of the streams."""
        if self.stream != MAIN:
            return output
        cache = output.get("past_key_values")
        if self.began and first_layer(cache) is not None:
            hang_on(cache, self.began)
        self._keep_memory(cache)
        if self.page.logits is not None:
            own, at = newest_logits(output.logits, present(self.columns, "a forward"), self.new)
            mixed = self.page.logits(self._behind(), {MAIN: own.float(), **self.logits}, self.config)
            require(
                mixed.shape == own.shape,
                "mixed logits [B, V]",
                mixed=tuple(mixed.shape),
                own=tuple(own.shape),
            )
            where = at.expand(len(own))[:, None, None].expand(-1, 1, own.shape[1])
            output["logits"] = output.logits.scatter(1, where, mixed.to(own.dtype)[:, None])
            self.acted += 1
        return output

    def _behind(self) -> Steered:
        """What is known behind the last layer."""
        phase = "decode" if self.new == 1 else "prefill"
        seed = getattr(self.config, "seed", 0)
        at = Steered(layer=self.layers, layers=self.layers, phase=phase, memory=self.memory_of(), seed=seed)
        at.early = lambda layer, normed=True: early_logits(self.model, self.early_states[layer], normed)
        return at

    # memory

    def _keep_memory(self, cache: Any) -> None:
        """With the cache, so that it is known to later steps, and to copies."""
        layer = first_layer(cache)
        if layer is not None and layer.prepared is None and self.page.prepare is not None:
            layer.prepared = (self.memory_of(),)

    def memory_of(self) -> Any:
        """What `prepare` gave for this text; prepared when it is first asked for."""
        if self.page.prepare is not None and self.memory is UNSET:
            runs = {name: found.stacked() for name, found in self.recorded.items()}
            at = Steered(layer=0, layers=self.context.layers_of_text, phase="prefill", stream=self.stream)
            at.class_attention, at.seed = self.class_attention, getattr(self.config, "seed", 0)
            self.memory = self.page.prepare(runs, at, self.config)
        return None if self.memory is UNSET else self.memory

    def makes_memory(self) -> bool:
        """Whether the stream that runs is one of those that the memory is made of."""
        return any(s.once and s.name == self.stream for s in self.streams)

    def class_attention(self, layer: int) -> Tensor:
        """[B, H, P] of the class token on each text's visual tokens: one image a text, of one size."""
        images = layouts(self.model, self.tower, dict(self.step.inputs))
        ids = self.step.inputs.get("input_ids")
        require(ids is not None and len(images) == len(ids), "one image in each text", images=len(images))
        return torch.stack([self.tower.class_attention(layer, at) for at in images])

    # attention

    def begin(self, step: Step) -> None:
        self.step, self.early_states = step, {}
        self.tower.clear()

    def acts_on(self, call: AttentionCall) -> bool:
        if call.site.tower == "vision":
            return self.reads_tower
        reads = self.on_attention or any(s.hide is not None or "z" in s.records for s in self.streams)
        return reads and call.site.tower == "text"

    def _steers(self, at: Steered) -> bool:
        """Whether the page's edits act in this stream, and here."""
        if at.stream != MAIN and not next(s.steered for s in self.streams if s.name == at.stream):
            return False
        tower = self.page.tower
        return tower in (at.tower, "both") and bool(self.page.acts(at, self.config))

    def narrow(self, call: AttentionCall) -> AttentionCall:
        """In a stream that hides a role, the keys of its tokens."""
        if self.stream == MAIN or call.site.tower != "text":
            return call
        stream = next(s for s in self.streams if s.name == self.stream)
        return call if stream.hide is None else hidden_role(call, stream, self.memory_of)

    def weights(self, call: AttentionCall, view: View, rows: slice, heads: list[int] | None) -> Tensor | None:
        page = self.page
        if page.scores is None and page.weights is None:
            return None
        at = steered_of(self, call, view, rows)
        if not self._steers(at):
            return None
        w = self._edited(at, view, rows)
        return w if heads is None else w[:, heads]

    def _edited(self, at: Steered, view: View, rows: slice) -> Tensor:
        """[B, H, rows, n] the weights after the page's edits of scores and weights."""
        page, s = self.page, view.scores(rows)
        if page.scores is not None:
            seen = view.visible(rows)
            s = page.scores(at, s if seen is None else s.masked_fill(~seen, -torch.inf), self.config)
        w = view.normalise(s, rows)
        return w if page.weights is None else page.weights(at, w, self.config)

    def edit(self, call: AttentionCall, view: View, out: Tensor) -> Tensor:
        if not self.on_attention or call.site.tower not in ("text", "vision"):
            return out
        page = self.page
        rows = last_row(call, view) if page.rows == "last" else slice(0, view.new)
        at = steered_of(self, call, view, rows)
        if not self._steers(at):
            return out
        self.acted += 1
        if page.scores is not None or page.weights is not None:
            out = self._remixed(call, view, out, rows)
        if page.z is not None:
            changed = page.z(at, out[:, :, rows], self.config)
            if changed is not out:
                out = out.clone()
                out[:, :, rows] = changed
        return out

    def _remixed(self, call: AttentionCall, view: View, out: Tensor, rows: slice) -> Tensor:
        """out with these rows computed from the edited weights; rows whose weights stay keep their very bits."""
        result, share = out.clone(), view.q.shape[1] // view.v.shape[1]
        v = view.v if share == 1 else view.v.repeat_interleave(share, 1)
        for block in row_blocks(rows.stop - rows.start, view.q.shape[0] * view.q.shape[1] * view.stored):
            cut = slice(rows.start + block.start, rows.start + block.stop)
            at = steered_of(self, call, view, cut)
            plain, w = view.weights(cut), self._edited(at, view, cut)
            same = (plain == w).all(-1, keepdim=True)
            result[:, :, cut] = torch.where(same, out[:, :, cut], mix(w, v).to(out.dtype))
        return result

    def observe(self, call: AttentionCall, view: View, out: Tensor) -> None:
        if call.site.tower == "vision":
            self.tower.note(call)
            return
        for stream in self.streams:
            if stream.name == self.stream and "z" in stream.records:
                z = at_columns(out.transpose(1, 2), present(self.columns, "a stream runs"))
                self.recorded.setdefault(stream.name, Recorded()).note("z", call.site.layer, z)

    # layers

    def _hook_layer(self, layer: LayerAnatomy) -> Iterator[Any]:
        outside = torch._dynamo.disable
        for quantity, module in (("out", layer.out), ("mlp", layer.mlp), ("resid_post", layer.module)):
            edits = quantity in self.page.layer_edits
            reads = quantity == "resid_post" or any(quantity in s.records for s in self.streams)
            if edits or reads:
                yield module.register_forward_hook(outside(self._at_layer(quantity, layer)))

    def _at_layer(self, quantity: str, layer: LayerAnatomy) -> Callable:
        scale = layer.scale if quantity in ("out", "mlp") else 1

        def hook(module: nn.Module, args: tuple, y: Any) -> Any:
            x = present(live(y), "a layer returns a stream")
            new = self._layer_edited(quantity, layer.number, x * scale if scale != 1 else x)
            self._note(quantity, layer.number, new)
            unchanged = new is x or (scale != 1 and torch.equal(new, x * scale))
            return y if unchanged else put(y, new / scale if scale != 1 else new)

        return hook

    def _layer_edited(self, quantity: str, number: int, x: Tensor) -> Tensor:
        function = self.page.layer_edits.get(quantity)
        if function is None:
            return x
        phase = "decode" if x.shape[1] == 1 and begun(self.step.inputs.get("past_key_values")) else "prefill"
        at = Steered(layer=number, layers=self.layers, phase=phase, stream=self.stream, memory=None)
        at.seed = getattr(self.config, "seed", 0)
        if not self._steers(at):
            return x
        self.acted += 1
        at.memory = None if self.makes_memory() else self.memory_of()
        return function(at, x, self.config)

    def _note(self, quantity: str, number: int, x: Tensor) -> None:
        columns = torch.tensor([x.shape[1] - 1]) if self.columns is None else self.columns
        newest = at_columns(x, columns)
        if quantity == "resid_post" and self.stream == MAIN:
            self.early_states[number] = newest.detach()
        for stream in self.streams:
            if stream.name == self.stream and quantity in stream.records:
                self.recorded.setdefault(stream.name, Recorded()).note(quantity, number, newest)


def new_tokens(given: dict) -> int:
    """How many tokens a forward is given."""
    for name in ("input_ids", "inputs_embeds"):
        if given.get(name) is not None:
            return given[name].shape[1]
    raise Unsupported("a forward without input_ids or inputs_embeds")
