"""A steering page at work: edits of attention and layers, streams beside the main pass, mixed logits."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.actors import Actor, AttentionCall, refuse_encoder_decoder, seed_of
from regard.attaching.anatomy import anatomy
from regard.attaching.heads import early_logits, final_norm
from regard.attaching.pictures import ASIDE, capture, other_pictures
from regard.attaching.search import generate_of, note_newest
from regard.attaching.steered_calls import arranged_of, hidden_role, last_row, steered_of
from regard.attaching.steered_layers import MAIN, hook_layer
from regard.attaching.step import Step, named
from regard.attaching.streams_beside import (
    Recorded,
    at_columns,
    begun,
    first_layer,
    followers_of,
    hang_on,
    new_tokens,
    newest_columns,
    newest_logits,
    stream_inputs,
)
from regard.attaching.towers import Tower, class_attention_of, image_token
from regard.core import Method, NeverFired, Unreachable, Unsupported, require
from regard.core.errors import present
from regard.core.trees import tree_leaves
from regard.kinds.steering import SteeringPage
from regard.ops import View, mix, row_blocks
from regard.ops.steered import Steered, Stream

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
        self.needs_rotary = page.attention is not None
        self.reads_tower = page.needs_image or page.tower != "text" or pixels
        self.stream, self.step, self.tower = MAIN, Step(), Tower()
        self.recorded: dict[str, Recorded] = {}  # of the streams, on the latest prompt
        self.memory: Any = UNSET  # what the page prepared on the latest prompt
        self.notes: dict[int, dict] = {}  # of layers without a ledger
        self.logits: dict[str, Tensor] = {}  # [B, V] of the streams that have run in this step
        self.began: dict[str, Any] = {}  # caches of the streams
        self.early_states: dict[int, Tensor] = {}  # [B, d] of each layer, at the newest token
        self.fed = 0  # under a search: tokens since the prompt
        self.seen: Tensor | None = None  # under a search: what the newest attends to of them
        self.captured: dict[int, Tensor] = {}  # [P] by layer, while a picture is asked about
        self.columns: Tensor | None = None  # of the newest token of each text in the forward that runs
        self.new, self.layers, self.acted = 0, 0, 0

    @property
    def controls_decoding(self) -> bool:
        """Whether it runs passes beside the model's own, mixes logits, or searches by itself."""
        return (
            bool(self.streams or self.page.images)
            or self.page.logits is not None
            or self.page.search is not None
        )

    @property
    def changes_weights(self) -> bool:
        return self.page.scores is not None or self.page.weights is not None

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
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if any(s.prefix for s in self.streams) and "mrope_section" in rope:
            raise Unsupported(
                f"{self.name} puts a prefix before the prompt, and tokens of {type(model).__name__} have positions of "
                "several components"
            )
        self.model = model

    def check_fired(self, forwards: int) -> None:
        neutral = self.page.card.neutral
        changes_nothing = neutral and all(getattr(self.config, k) == v for k, v in neutral.items())
        if self.acted == 0 and not changes_nothing:
            raise NeverFired(f"{self.name} never acted in {forwards} forwards")

    # the streams

    def look(self, model: PreTrainedModel) -> None:
        if self._reads_layers():
            anatomy(model)
        if self.page.logits is not None:
            with suppress(Unreachable):  # said where a page asks for it
                final_norm(model)

    def hooks(self, model: PreTrainedModel, context: Any) -> Iterator[Any]:
        self.context = context
        outside = torch._dynamo.disable
        yield model.register_forward_pre_hook(outside(self._run_streams), with_kwargs=True, prepend=True)
        yield model.register_forward_hook(outside(self._mix), with_kwargs=True)
        if self._reads_layers():
            layers = anatomy(model)
            self.layers = len(layers)
            for layer in layers:
                yield from hook_layer(self, layer)

    def in_place_of(self, model: PreTrainedModel) -> dict[str, Any]:
        return {} if self.page.search is None else {"generate": generate_of(self)}

    def _reads_layers(self) -> bool:
        records = any({*s.records} - {"z"} for s in self.streams)
        return bool(self.page.layer_edits) or records or self.page.logits is not None

    def _run_streams(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the main pass: those that are carried on, and on a prompt those that are read once."""
        if self.stream != MAIN:
            return None
        given = dict(named(module, args, kwargs))
        cache = given.get("past_key_values")
        first = not begun(cache)
        self._check_image(given, first)
        self.new = new_tokens(given)
        if first:
            self.memory, self.notes, self.recorded = UNSET, {}, {}
        elif self.page.prepare is not None:
            layer = first_layer(cache)
            known = {} if layer is None else layer.prepared
            own = known.get(self.name)
            self.memory = present(own, f"{self.name}: this cache began with the method attached")[0]
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
        changed = self._with_pictures(given) if first and self.page.images is not None else None
        self.columns = newest_columns(given, self.new, self.model.device)
        return None if changed is None else ((), changed)

    def _with_pictures(self, given: dict) -> dict:
        """The inputs with the page's own picture, which asks the model before."""
        self.stream, self.context.stream = ASIDE, ASIDE
        try:
            with torch.no_grad():
                pixels = other_pictures(self, given)
        finally:
            self.stream, self.context.stream = MAIN, MAIN
        self.acted += 1
        return {**given, "pixel_values": pixels}

    def _run(self, stream: Stream, given: dict, cache: Any) -> None:
        inputs = stream_inputs(self.model, stream, given, cache, seed_of(self.config))
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
            shapes = (tuple(mixed.shape), tuple(own.shape))
            require(shapes[0] == shapes[1], "mixed logits [B, V]", mixed=shapes[0], own=shapes[1])
            where = at.expand(len(own))[:, None, None].expand(-1, 1, own.shape[1])
            output["logits"] = output.logits.scatter(1, where, mixed.to(own.dtype)[:, None])
            self.acted += 1
        return output

    def _behind(self) -> Steered:
        """What is known behind the last layer."""
        phase, seed = "decode" if self.new == 1 else "prefill", seed_of(self.config)
        at = Steered(layer=self.layers, layers=self.layers, phase=phase, memory=self.memory_of(), seed=seed)
        at.early = lambda layer, normed=True: early_logits(self.model, self.early_states[layer], normed)
        return at

    # memory

    def _keep_memory(self, cache: Any) -> None:
        """With the cache, so that it is known to later steps, and to copies."""
        layer = first_layer(cache)
        if layer is not None and self.name not in layer.prepared and self.page.prepare is not None:
            memory, batch = self.memory_of(), layer.groups[0].keys.shape[0]
            shapes = [tuple(x.shape) for x in tree_leaves(memory)]
            led = all(not shape or shape[0] in (1, batch) for shape in shapes)
            require(led, f"memory of {self.name} leads with the batch, {batch}, or with 1", memory=shapes)
            layer.prepared = {**layer.prepared, self.name: (memory,)}

    def memory_of(self) -> Any:
        """What `prepare` gave for this text; prepared when it is first asked for."""
        if self.page.prepare is not None and self.memory is UNSET:
            runs = {name: found.stacked() for name, found in self.recorded.items()}
            at = Steered(layer=0, layers=self.context.layers_of_text, phase="prefill", stream=self.stream)
            inputs = dict(self.step.inputs)
            at.class_attention = lambda layer: class_attention_of(self.model, self.tower, inputs, layer)
            at.seed = seed_of(self.config)
            self.memory = self.page.prepare(runs, at, self.config)
        return None if self.memory is UNSET else self.memory

    def makes_memory(self) -> bool:
        """Whether the stream that runs is one of those that the memory is made of."""
        return any(s.once and s.name == self.stream for s in self.streams)

    # attention

    def begin(self, step: Step) -> None:
        self.step, self.early_states = step, {}
        self.tower.clear()

    def acts_on(self, call: AttentionCall) -> bool:
        if call.site.tower == "vision":
            return self.reads_tower
        asks = any(part is not None for part in (self.page.images, self.page.search, self.page.attention))
        reads = self.on_attention or asks or any(s.hide is not None or "z" in s.records for s in self.streams)
        return reads and call.site.tower == "text"

    def steers(self, at: Steered) -> bool:
        """Whether the page's edits act in this stream, and here."""
        if at.stream != MAIN and not any(s.steered for s in self.streams if s.name == at.stream):
            return False
        tower = self.page.tower
        return tower in (at.tower, "both") and bool(self.page.acts(at, self.config))

    def narrow(self, call: AttentionCall) -> AttentionCall:
        """In a stream that hides a role, the keys of its tokens."""
        if self.stream in (MAIN, ASIDE) or call.site.tower != "text":
            return call
        stream = next(s for s in self.streams if s.name == self.stream)
        return call if stream.hide is None else hidden_role(call, stream, self.memory_of)

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        """The page's own attention, where it has one."""
        if self.page.attention is None or call.site.tower != "text" or self.stream != MAIN:
            return None
        self.acted += 1
        return self.page.attention(arranged_of(call, view), self.config)

    def weights(self, call: AttentionCall, view: View, rows: slice, heads: list[int] | None) -> Tensor | None:
        page = self.page
        if page.scores is None and page.weights is None:
            return None
        at = steered_of(self, call, view, rows)
        if not self.steers(at):
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
        if not self.steers(at):
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
        if self.stream == ASIDE:
            capture(self, call, view)
        if self.page.search is not None:
            note_newest(self, call, view)
        for stream in self.streams:
            if stream.name == self.stream and "z" in stream.records:
                z = at_columns(out.transpose(1, 2), present(self.columns, "a stream runs"))
                self.recorded.setdefault(stream.name, Recorded()).note("z", call.site.layer, z)
