"""Fewer visual tokens at work: a page says which stay, and the others are hidden, or leave the decoder altogether.

    how="mask"      later layers do not see what was dropped: the definition
    how="remove"    what was dropped is not computed and not stored: the same outputs for all that stay, and faster

A page is asked at the entry of a layer: before the first one about the images, later about the layer that has just run.
The others keep their positions, and dropped tokens never come back. What is left of the prompt's hidden states is put
back in its place behind the last layer, zeros where tokens were dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.actors import Actor, AttentionCall, refuse_encoder_decoder
from regard.attaching.anatomy import stack_of
from regard.attaching.layer_views import images_of, layer_view
from regard.attaching.lazy_mask import LazyMask
from regard.attaching.sites import towers
from regard.attaching.step import Step
from regard.attaching.towers import Layout, Tower, image_token, layouts
from regard.attaching.views import run
from regard.attaching.visual_prompt import Prompt, at_index_of, picked, shared_out
from regard.core import Method, NeverFired, Unsupported, require
from regard.core.errors import present
from regard.kinds.tokens import TokensPage
from regard.ops import View, softmax_attention

HOW = ("mask", "remove")
DROPPED = "dropped visual tokens"  # labels of a ledger layer
# keyword arguments of a decoder layer that have an entry for each token: name -> the dimension, from the end
BY_TOKEN = {"position_ids": -1, "cache_position": -1, "position_embeddings": -2, "hidden_states": -2}
NOT_CUT = "a decoder layer is given {name} {shape}, by token, which removal does not cut; how='mask' works"


class Reduction(Actor):
    """A tokens page and its settings."""

    touches_rows = True
    reads_tower = True

    def __init__(self, method: Method, how: str = "remove") -> None:
        require(how in HOW, f"how is one of {HOW}", how=how)
        self.removes = how == "remove"
        self.method, self.name = method, method.label
        self.tower, self.prompt, self.step = Tower(), None, Step()
        self.kept: list[list[int]] = []  # of the latest prompt: visual tokens that each layer saw, by text
        self.asked, self.layers = 0, 0
        self.deep: list[Tensor] = []  # [B, N, d] added behind each of the first layers

    prompt: Prompt | None

    @property
    def page(self) -> TokensPage:
        return self.method.page

    def check(self, model: PreTrainedModel) -> None:
        refuse_encoder_decoder(self.name, model)
        self.token, self.model = image_token(model), model

    def check_fired(self, forwards: int) -> None:
        if self.asked == 0:
            raise NeverFired(f"{self.name}: no prompt with an image in {forwards} forwards")

    # what happens in a forward

    def begin(self, step: Step) -> None:
        self.step, self.prompt = step, None
        self.tower.clear()

    def acts_on(self, call: AttentionCall) -> bool:
        if call.site.tower == "vision":
            return True
        return call.site.tower == "text" and (self.prompt is not None or self._hidden(call) is not None)

    def hooks(self, model: PreTrainedModel, context: Any) -> Iterator[Any]:
        text = towers(model, "text")[0][1]
        modules, names = dict(text.named_modules()), stack_of(text)
        self.layers = len(names)
        for i, name in enumerate(names):
            hook = torch._dynamo.disable(self._entry(i, context))
            yield modules[name].register_forward_pre_hook(hook, with_kwargs=True)
        if self.removes:
            yield text.register_forward_pre_hook(torch._dynamo.disable(self._take_deep), with_kwargs=True)
        yield text.register_forward_hook(torch._dynamo.disable(self._leave(context)))

    def _take_deep(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Visual features that the decoder adds behind its first layers (Qwen3-VL) are added here, to what is left."""
        self.deep = []
        embeds, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if not embeds or mask is None:
            return None
        require(
            len(embeds) < self.layers,
            "features are added before the last layer",
            added=len(embeds),
            layers=self.layers,
        )
        for x in embeds:
            whole = x.new_zeros(*mask.shape, x.shape[-1])
            whole[mask] = x
            self.deep.append(whole)
        return args, {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}

    def _entry(self, number: int, context: Any) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            named = "hidden_states" in kwargs
            x = kwargs["hidden_states"] if named else args[0]
            if 0 < number <= len(self.deep):
                x = self._deepened(x, self.deep[number - 1])
            if number == 0:
                self._begin_prompt(x)
            if self.prompt is not None:
                x = self._ask(number, x)
                if self.removes:
                    x, kwargs = self._cut(x, kwargs)
                    columns = self.prompt.columns
                    context.caches.pending.arriving = None if columns is None else (columns, self.prompt.new)
            if named:
                return args, {**kwargs, "hidden_states": x}
            return (x, *args[1:]), kwargs

        return enter

    def _deepened(self, x: Tensor, whole: Tensor) -> Tensor:
        if self.prompt is not None and self.prompt.columns is not None:
            whole = whole.take_along_dim(self.prompt.columns[..., None], 1)
        return x + whole

    def _leave(self, context: Any) -> Callable:
        """Behind the last layer: hidden states of all columns."""

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            context.caches.pending.arriving = None
            prompt, self.prompt = self.prompt, None
            if prompt is None or prompt.columns is None:
                return output
            x = output.last_hidden_state
            whole = x.new_zeros(x.shape[0], prompt.new, x.shape[2])
            at = prompt.columns[..., None].expand(-1, -1, x.shape[2])
            output.last_hidden_state = whole.scatter(1, at, x)
            return output

        return leave

    def _begin_prompt(self, x: Tensor) -> None:
        ids = self.step.inputs.get("input_ids")
        if ids is None or not self.tower.calls:
            # a single token is what the model said, whatever its number
            if ids is not None and ids.shape[1] > 1 and bool((ids == self.token).any()):
                raise Unsupported(
                    f"{self.name}: visual tokens in a prompt whose images are not given with it"
                )
            return
        if self.step.inputs.get("labels") is not None:
            raise Unsupported(f"{self.name} beside labels: a loss over tokens of which some are dropped")
        require(ids.shape[1] == x.shape[1], "the decoder reads a token for each id of the prompt",
                ids=ids.shape[1], tokens=x.shape[1])  # fmt: skip
        where = [(row == self.token).nonzero().flatten() for row in ids]
        images = shared_out(layouts(self.model, self.tower, dict(self.step.inputs)), where)
        alive = [torch.arange(len(w), device=x.device) for w in where]
        self.prompt = Prompt(where, images, alive, x.shape[1], memory=[{} for _ in where])
        self.kept, self.asked = [[] for _ in where], self.asked + 1

    def _ask(self, number: int, x: Tensor) -> Tensor:
        """The hidden states, features of images replaced, after the page said what stays."""
        prompt, cfg = present(self.prompt, "a prompt with an image"), self.method.config
        if number == 0 and self.page.before is not None:
            x = x.clone()
            for text, images in enumerate(prompt.images):
                if images:
                    self._before(text, images, x)
        elif number and self.page.after is not None:
            for text, alive in enumerate(prompt.alive):
                if len(alive):
                    view = layer_view(self, number - 1, text, x)
                    keep = self.page.after(view, cfg)
                    prompt.alive[text] = alive if keep is None else self._checked(keep, alive)
        for text, alive in enumerate(prompt.alive):
            self.kept[text].append(len(alive))
        prompt.view = None
        prompt.dropped = self._dropped()
        return x

    def _before(self, text: int, images: list[Layout], x: Tensor) -> None:
        prompt = present(self.prompt, "a prompt with an image")
        where, kept, start = prompt.where[text], [], 0
        given = images_of(self, text, x[text])
        answers = self.page.before(given, self.method.config)
        require(
            len(answers) == len(images), "an answer for each image", answers=len(answers), images=len(images)
        )
        for at, answer in zip(images, answers, strict=True):
            own = torch.arange(at.tokens, device=x.device)
            kept.append(start + self._checked(answer.keep, own))
            if answer.features is not None and len(answer.keep):
                x[text, where[kept[-1]]] = answer.features.to(x)
            start += at.tokens
        prompt.alive[text] = torch.cat(kept)
        require(len(prompt.alive[text]) > 0, "a budget keeps a visual token or more", text=text)

    def _checked(self, keep: Tensor, alive: Tensor) -> Tensor:
        keep = keep.to(alive.device).long()
        ascending = keep.dim() == 1 and bool((keep[1:] > keep[:-1]).all())
        require(
            ascending, f"{self.name} keeps tokens by number, ascending, each once", keep=keep.tolist()[:8]
        )
        known = bool(torch.isin(keep, alive).all())
        require(known, f"{self.name} keeps tokens that are still there", keep=keep.tolist()[:8])
        return keep

    def _dropped(self) -> Tensor | None:
        """[B, N] bool: the columns that later layers do not see."""
        prompt = present(self.prompt, "a prompt with an image")
        if all(len(a) == len(w) for a, w in zip(prompt.alive, prompt.where, strict=True)):
            return None
        device = prompt.alive[0].device
        result = torch.zeros(len(prompt.where), prompt.new, dtype=torch.bool, device=device)
        for row, where, alive in zip(result, prompt.where, prompt.alive, strict=True):
            row[where] = True
            row[where[alive]] = False
        return result

    # removal

    def _cut(self, x: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """Hidden states and arguments of the layer for the columns that are left."""
        prompt = present(self.prompt, "a prompt with an image")
        if prompt.dropped is None:
            return x, kwargs
        old, stays = prompt.columns, ~prompt.dropped
        count = int(stays.sum(1).max())
        # texts that keep fewer carry some of what they dropped along, hidden; what is gone does not come back
        computed = torch.ones_like(stays) if old is None else torch.zeros_like(stays).scatter(1, old, True)
        rank = (~stays).to(torch.uint8) + (~computed).to(torch.uint8)
        prompt.columns = rank.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
        at = prompt.columns if old is None else torch.searchsorted(old, prompt.columns)
        x = x.take_along_dim(at[..., None], 1)
        return x, {name: self._cut_argument(name, value) for name, value in kwargs.items()}

    def _cut_argument(self, name: str, value: Any) -> Any:
        prompt = present(self.prompt, "a prompt with an image")
        if isinstance(value, tuple | list) and name in BY_TOKEN:
            return type(value)(self._cut_argument(name, part) for part in value)
        if not isinstance(value, Tensor) or isinstance(value, LazyMask) or name == "attention_mask":
            return value
        if name in BY_TOKEN:
            return picked(value, present(prompt.columns, "cut"), value.dim() + BY_TOKEN[name], prompt.new)
        if prompt.new in value.shape[:-1]:
            raise Unsupported(NOT_CUT.format(name=name, shape=tuple(value.shape)))
        return value

    # attention

    def narrow(self, call: AttentionCall) -> AttentionCall:
        if call.site.tower != "text":
            return call
        prompt, hidden = self.prompt, self._hidden(call)
        if call.rule is None:
            raise Unsupported(f"{self.name} at {call.where}: no mask rule, or a 4-D mask of your own")
        rule = call.rule
        if prompt is not None and prompt.columns is not None:
            start = 0 if call.layer is None else call.layer.seen - prompt.new
            rule = rule.picked(prompt.columns + start)
        if hidden is not None:
            dropped = lambda seen, q, index: seen & ~at_index_of(hidden, index)  # noqa: E731
            rule = replace(rule, narrowings=(*rule.narrowings, dropped))
        return call if rule is call.rule else replace(call, mask=LazyMask.of(rule))

    def _hidden(self, call: AttentionCall) -> Tensor | None:
        """[B, tokens] bool by true index: what is dropped and yet there; noted with the layer for later steps."""
        layer, prompt = call.layer, self.prompt
        old = None if layer is None else layer.labels.get(DROPPED)
        if prompt is None or prompt.dropped is None or id(layer) in prompt.noted:
            return old
        now = prompt.dropped
        if prompt.columns is not None:
            carried = torch.zeros_like(now).scatter(1, prompt.columns, True)
            now = now & carried
            if not bool(now.any()):
                return old
        start = 0 if layer is None else layer.seen - prompt.new
        before = now.new_zeros(now.shape[0], start)
        if old is not None:
            before[:, : old.shape[1]] = old
        result = torch.cat([before, now], 1)
        if layer is not None:
            layer.labels[DROPPED] = result
            prompt.noted.add(id(layer))
        return result

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        """The fused kernel over what is left, where causality alone says who sees whom."""
        prompt, rule = self.prompt, call.rule
        if prompt is None or prompt.columns is None or rule is None or call.site.tower != "text":
            return None
        first = call.layer is None or call.layer.seen == prompt.new
        if rule.narrowings or not rule.model_causal or rule.pad() is not None or not first:
            return run(view)
        if view.softcap is not None or view.sinks is not None or view.bias is not None:
            return run(view)
        return softmax_attention(view.q, view.k, view.v, scale=view.scale, mask=None, causal=True)

    def observe(self, call: AttentionCall, view: View, out: Tensor) -> None:
        if call.site.tower == "vision":
            self.tower.note(call)
        elif self.prompt is not None and self.page.after is not None:
            self.prompt.view = view
