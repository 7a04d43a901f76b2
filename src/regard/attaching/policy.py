"""A cache policy at work: budgets, what is selected, its own attention, moved positions, and what stays."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.attaching.actors import Actor, AttentionCall, refuse_encoder_decoder
from regard.attaching.anatomy import output_weights
from regard.attaching.evicting import light, voted, without_queries, without_what_left
from regard.attaching.packed import PackedGroup
from regard.attaching.places import places_of
from regard.attaching.remembered import memory_of, told
from regard.attaching.rereading import REREADING, Rereader
from regard.attaching.selecting import asking, rotate_first, view_of_slots
from regard.attaching.slots import Group, slack
from regard.attaching.step import Step
from regard.attaching.views import padding_first, real_slots
from regard.core import Method, NeverFired, Unsupported
from regard.kinds.cache import CachePage, decide, on_time, rank, share
from regard.ops import Budget, Kept, View, parse_budget, tokens_within

# what a page may want measured on the model: name -> the setting that it is, and the function that gives it
CALIBRATORS: dict[str, tuple[str, Callable[[PreTrainedModel], Any]]] = {}


class CachePolicy(Actor):
    """A cache page and its settings."""

    needs_cache = True
    evicts = True

    def __init__(self, method: Method) -> None:
        self.method, self.name = method, method.name
        self.acted = 0
        self.rereader: Rereader | None = None
        page = self.page
        self.needs_rotary = page.shift is not None or page.attention is not None or page.rotates

    @property
    def page(self) -> CachePage:
        return self.method.page

    def check(self, model: PreTrainedModel) -> None:
        if self.page.reread is not None:
            refuse_encoder_decoder(self.name, model)
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        given = getattr(self.method.config, "budget", None)
        if given is not None:
            parse_budget(given)  # what is no budget is refused before the model runs

    def calibrate(self, model: PreTrainedModel) -> None:
        """Measure on the model what the page needs and its settings leave open."""
        if not self.page.calibrate:
            return
        setting, measure = CALIBRATORS[self.page.calibrate]
        config = self.method.config
        # of a page that is laid over others, its own part of the settings
        name, part = next((n, x) for n, x in (("", config), *vars(config).items()) if hasattr(x, setting))
        if getattr(part, setting) is None:
            value = {setting: measure(model)}
            self.method = self.method.with_settings(**({name: replace(part, **value)} if name else value))

    def look(self, model: PreTrainedModel) -> None:
        if self.page.reads_output:
            self.outputs = output_weights(model, self.name)

    def check_fired(self, forwards: int) -> None:
        if self.acted == 0:
            raise NeverFired(f"{self.name} never saw a cache in {forwards} forwards")

    def check_call(self, call: AttentionCall) -> None:
        if call.layer is None and self._decodes(call):
            raise Unsupported(
                f"{self.name} acts on a cache of its own kind and this forward has none here; call with "
                "use_cache=True, without gradient checkpointing, and with a dynamic cache (not static or quantised)"
            )
        if call.layer is not None and call.own_mask:
            raise Unsupported(
                "a 4-D mask of your own, or of the model's own making, beside a cache method: slots and columns would "
                "not agree"
            )
        if call.turn.nth >= call.turn.of:
            raise Unsupported(
                f"{self.name} at {call.where}: it reads the keys that another layer stored, and the model's "
                "configuration does not say so (kv_sharing_modes), so they may be gone"
            )

    def _decodes(self, call: AttentionCall) -> bool:
        """Whether this is self-attention of a decoder."""
        causal = bool(getattr(call.module, "is_causal", True))
        return call.site.tower == "text" and not self.encoder_decoder and causal

    def acts_on(self, call: AttentionCall) -> bool:
        return call.layer is not None

    def hooks(self, model: PreTrainedModel, context: Any) -> Iterator[Any]:
        if self.page.reread is not None:
            self.rereader = Rereader(self, model, context)
            yield self.rereader.hook()

    def select(self, call: AttentionCall, view: View) -> View:
        """Show the page what is stored; the view of what it reads."""
        if call.step.stream == REREADING:
            return view
        self.acted += 1
        page, cfg = self.page, self.method.config
        self._prepare(call, view)
        # a selection, moved keys or an attention of the page's own come after what it observes
        view.answering = page.select is None and page.shift is None and page.attention is None
        if page.observe is not None and call.turn.of == 1:
            page.observe(view, cfg)
        view.answering = False
        slots = self._answer("select", call, asking(call, view))
        if slots is not None:
            shift = self._answer("shift", call, view, slots)
            return view_of_slots(call, view, slots, shift)
        if page.shift is not None:
            rotate_first(view, self._answer("shift", call, view, None), call)
        return view

    def _answer(self, name: str, call: AttentionCall, view: View, *rest: Any) -> Any:
        """What the page says; where it goes by places alone, what it said of a layer that holds the same tokens."""
        function = getattr(self.page, name)
        if function is None:
            return None
        answer = lambda: function(view, *rest, self.method.config)  # noqa: E731
        if not self.page.by_place:
            return answer()
        return call.step.places.once(f"{self.name}.{name}", (*places_of(view), *rest), answer)

    def _prepare(self, call: AttentionCall, view: View) -> None:
        """Fill in what a page may use beyond the tensors."""
        group, step = call.slots, call.step
        if view.layer == 0 and group is call.ledger.groups[0]:
            step.restart()
        view.shared, view.memory = step.shared, memory_of(call, view)
        if self.page.reads_output:
            view.output = self.output_of(call)
        # a function that held the view would hold its keys until cycles are looked for
        view.report_bytes = partial(step.reported.__setitem__, view.layer)
        if view.seen not in step.budgets:
            step.budgets[view.seen] = self.budget(view, group)
        view.budget, view.window = step.budgets[view.seen], call.ledger.window
        if view.window is not None:
            view.budget = view.budget.clamp(max=view.window)
        rotary, page = call.rotary, self.page
        # a layer that reads the keys of another has none that could be asked how they turn
        module = call.module if rotary is None else rotary.owners.get(call.ledger, call.module)
        if rotary is not None and (page.shift or page.attention or rotary.can_rotate(module)):
            of_queries = page.shift is None
            view.rotate = lambda x, by: rotary.rotate(module, x, by, of_queries)

    def output_of(self, call: AttentionCall) -> Tensor:
        """[H, E, width] of the heads of this call."""
        weight = self.outputs[call.module]
        whole = weight.unflatten(0, (-1, call.v.shape[-1]))
        return whole if call.heads is None else whole[list(call.heads)]

    @cached_property
    def _asked(self) -> Budget:
        setting = getattr(self.method.config, "budget", None)
        return parse_budget(self.page.budget(self.method.config) if setting is None else setting)

    def _held(self, call: AttentionCall, whole: View) -> Tensor:
        """[B] tokens that may stay: a budget in bytes counts all that is held, with tables, first keys and room."""
        size, group, limits = self._asked.bytes, call.slots, call.step.limits
        if size is None:
            return whole.budget
        if whole.seen not in limits:
            tables = 4 * (1 + len(group.notes) + (group.count is not None))
            slot = (group.keys.shape[-1] + group.values.shape[-1]) * group.keys.element_size() + tables
            slot *= whole.q.shape[0] * whole.total_heads // whole.layers
            size -= whole.layers * (0 if group.origin is None else group.origin.nbytes)
            within = tokens_within(size, slot, [layer.window for layer in call.layers], slack)
            limits[whole.seen] = torch.full_like(whole.budget, within)
        return torch.minimum(whole.budget, limits[whole.seen])

    def budget(self, view: View, group: Group) -> Tensor:
        """[B] tokens that may stay or be read in each row of this step."""
        budget = self._asked
        real = view.length().expand(view.q.shape[0])
        per_slot = (group.keys.shape[-1] + group.values.shape[-1]) * group.keys.element_size()
        return budget.resolve(real, per_slot * view.total_heads * view.q.shape[0])

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        if self.page.attention is None:
            return None
        if call.fed != call.q.shape[2]:
            raise Unsupported(
                f"{self.name} has an attention of its own, and {call.where}, which reads the keys of another layer, "
                "computes the last queries of a prompt alone; call the model with logits_to_keep=0"
            )
        if call.rule is not None and call.rule.narrowings:
            raise Unsupported(
                f"{self.name} has an attention of its own, which would leave an attached mask out"
            )
        read, asked = padding_first(call.stored)
        out = self.page.attention(read, self.method.config)
        if out is None or asked is None:
            return out
        return torch.zeros_like(out).scatter(2, asked[:, None, :, None].expand_as(out), out)

    def evict(self, call: AttentionCall, view: View) -> None:
        if call.step.stream == REREADING:
            if self.rereader is not None:
                self.rereader.note(call)
            return
        self._count_bytes(call, view)
        calls = call.step.asked(call)
        if not calls:
            return
        page, cfg = self.page, self.method.config
        if page.observe is not None and len(calls) > 1:
            page.observe(voted([c.stored for c in calls]), cfg)
        ledger = call.ledger
        left = ledger.window is not None and call.slots.forget(ledger.reach(ledger.seen), viewed=True)
        whole = voted([without_what_left(c) if left else c.stored for c in calls])
        if page.phase == "prefill" and whole.phase != "prefill":
            return
        if page.keep is None and page.score is None:
            return
        whole.budget = self._held(call, whole)
        if page.by_place:
            self._carry_out(call, self._answer("keep", call, whole))
            return
        # heads that share a budget are asked together, once all groups of them were attended to
        waiting = call.step.waiting
        if page.across or page.reread is not None:
            self._wait(call, whole)
            return
        waiting.append((call, whole))
        if page.allocate is not None and len(waiting) < len(ledger.groups):
            return
        answers = decide(page, [view for _, view in waiting], cfg)
        for (asked, _), kept in zip(waiting, answers, strict=True):
            self._carry_out(asked, kept)
        waiting.clear()

    def _wait(self, call: AttentionCall, whole: View) -> None:
        """Nothing goes before all layers were attended to, or before the prompt was read again (rereading.py)."""
        page, step = self.page, call.step
        due = on_time(page, whole, self.method.config)
        if due is None:
            return
        step.waiting.append((call, due))
        if len(step.waiting) < len(call.ledger.groups):
            return
        calls, views = zip(*step.waiting, strict=True)
        step.waiting.clear()
        said = views if page.reread is not None else rank(page, views, self.method.config)
        step.later += [(light(c), without_queries(x)) for c, x in zip(calls, said, strict=True)]
        # a layer that was not written yet has no groups
        if page.reread is None and len(step.later) == sum(max(1, len(x.groups)) for x in call.layers):
            self.share_among(step)

    def share_among(self, step: Step) -> None:
        """Carry out what stays of all that waited for the layers above."""
        asked, layers = list(step.later), dict[int, list]()
        step.later.clear()
        for call, ranked in asked:
            layers.setdefault(0 if self.page.across else id(call.layer), []).append((call, ranked))
        for layer in layers.values():
            answers = share(self.page, [ranked for _, ranked in layer], self.method.config)
            for (call, _), kept in zip(layer, answers, strict=True):
                self._carry_out(call, kept)
        for call, _ in asked:
            self.finish(call)

    def finish(self, call: AttentionCall) -> None:
        """Store older tokens packed, where the page does so."""
        if self.page.codec is None or call.step.later or call.step.stream == REREADING:
            return
        codec, ledger = self.page.codec(self.method.config), call.ledger
        if codec is None:  # by its settings nothing is packed
            return
        for at, group in enumerate(ledger.groups):
            if group.keys.requires_grad:
                raise Unsupported(
                    f"{self.name} at {call.where}: it stores keys packed, and these carry gradients"
                )
            packed = PackedGroup.of(group, codec)
            ledger.groups[at] = packed
            if packed.pack(real_slots(replace(call, group=packed), packed.table()), told(ledger, packed)):
                ledger.compressed |= packed.index is not None

    def _carry_out(self, call: AttentionCall, kept: Kept | None) -> None:
        """Let the slots of this call go that are not kept."""
        if kept is not None:
            changed = kept.merged or kept.rewritten
            if changed is not None and changed[0].shape[1] != call.slots.keys.shape[1]:
                raise Unsupported(
                    f"{self.name} at {call.where}: it changes keys, and this layer stores latents that are expanded "
                    "when they are read"
                )
            with call.ledger.at_home():
                call.ledger.keep(call.slots, kept)
        if self._asked.bytes is not None and self.page.phase == "both":
            within = int(call.step.limits[call.stored.seen][0])
            for (
                group
            ) in call.ledger.groups:  # once tokens went there is room for the one to come, and no more
                group.limit = (group.n if kept is not None else max(group.n, within)) + 1

    def _count_bytes(self, call: AttentionCall, read: View) -> None:
        """Note how many bytes of keys and values this step reads, scoring for a selection included."""
        whole, step = call.stored, call.step
        size = call.slots.stored_bytes() if read is whole else read.k.nbytes + read.v.nbytes
        if read is not whole and whole.cached_scores is not None:
            size += whole.k.nbytes
        before = 0 if call.group is call.ledger.groups[0] else step.bytes_read.get(whole.layer, 0)
        step.bytes_read[whole.layer] = before + step.reported.get(whole.layer, size)
