"""A second reading of a prompt, after it and beside it: on what the cache stores, which stays as it is.

Once a model has read a prompt under a page that asks for it (CachePage.reread), its decoder is run again on an
instruction and the prompt's own tokens, chunk by chunk, each time on a cache that borrows what every layer stores. What
the page says of each stored token (CachePage.worth) is noted with its slot; then the page decides what stays.
"""

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from regard.attaching.actors import AttentionCall
from regard.attaching.hybrid_layer import STATES
from regard.attaching.ledger import LedgerLayer
from regard.attaching.step import Step, named
from regard.attaching.streams import flat_mask
from regard.core import Unsupported
from regard.core.errors import present
from regard.kinds.cache import rank
from regard.ops import View
from regard.ops.rereading import WORTH, Rereading, Words

REREADING = "rereading"  # the name of these passes among those beside the model's own
UNREAD = "unread"  # in the memory of the first layer: what was fed since the last reading


@dataclass
class Prompt:
    """What was fed and not yet repeated, ids [B, N] or embeddings [B, N, width], and which of all tokens are real."""

    fed: Tensor
    mask: Tensor  # [B, seen] bool
    positions: Tensor | None  # [..., B, N]

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """([B, N] columns of the real tokens of each row, then the others; [B] how many are real)."""
        real = self.mask[:, -self.fed.shape[1] :]
        return (~real).to(torch.uint8).argsort(dim=-1, stable=True), real.sum(-1)

    def taken(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(tokens of each row from its real one `start` to `stop`, [B, m] bool which are there)."""
        columns, count = self.columns
        at = torch.arange(start, stop, device=self.fed.device)
        there = at < count[:, None]
        place = columns[:, at.clamp(max=columns.shape[1] - 1)]
        place = place if self.fed.dim() == 2 else place[..., None].expand(-1, -1, self.fed.shape[-1])
        return self.fed.gather(1, place), there


class Rereader:
    """The second readings of one attachment."""

    def __init__(self, policy: Any, model: PreTrainedModel, context: Any) -> None:
        # both hold this: in a circle the cache would stay when all names of it are gone
        self.policy, self.model, self.context = weakref.proxy(policy), model, weakref.proxy(context)
        self.decoder: PreTrainedModel = model.get_decoder()
        self.said: Rereading = policy.page.reread(policy.method.config)
        self.ids = {words: self._ids(words) for words in (self.said.whole, self.said.part, self.said.answer)}
        self.chunk = range(0)  # of each row's tokens of this forward, while it is repeated
        self.counts = torch.zeros(2, 1)  # of each row: tokens before this forward, and those that it fed
        self.layers: list[LedgerLayer] = []  # while a prompt is read again

    def hook(self) -> Any:
        return self.decoder.register_forward_hook(torch._dynamo.disable(self._after), with_kwargs=True)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Behind a prompt: read again all that was fed since the last time, and decide."""
        step, page, cfg = self.context.step, self.policy.page, self.policy.method.config
        if step.stream == REREADING or not self.context.caches.layers:
            return
        given = named(module, args, kwargs)
        unread = self._keep_unread(given)
        if not step.later:
            return
        with torch.no_grad():
            self._read_again(self._prompt(given, unread))
        self.context.caches.layers[0].memory.pop(UNREAD)
        layers = dict[int, list[View]]()
        for call, view in step.later:
            layers.setdefault(id(call.layer), []).append(view)
        ranked = [r for views in layers.values() for r in rank(page, views, cfg)]
        step.later[:] = [(call, r) for (call, _), r in zip(step.later, ranked, strict=True)]
        self.policy.share_among(step)

    def _keep_unread(self, given: Mapping[str, Any]) -> Tensor:
        """[B, m] or [B, m, width]: what was fed since the last reading, this forward's tokens included."""
        layer = self.context.caches.layers[0]
        fed = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        fed = present(fed, "a decoder is given ids or embeddings")
        known = layer.memory.get(UNREAD)
        before = layer.seen - fed.shape[1]
        if known is not None and known["end"] >= before:  # else tokens came while nothing was attached
            old = known["fed"][:, : known["fed"].shape[1] - (known["end"] - before)]  # some may be taken back
            old, fed = (x if old.dim() == fed.dim() else self._embedded(x, layer.dtype) for x in (old, fed))
            fed = torch.cat([old, fed], 1)
        layer.memory[UNREAD] = {"fed": fed, "end": layer.seen}
        return fed

    def _embedded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.is_floating_point() else self.model.get_input_embeddings()(x).to(dtype)

    def _prompt(self, given: Mapping[str, Any], unread: Tensor) -> Prompt:
        step = self.context.step
        if any(bool(label.any()) for name, label in step.labels.items() if name == "image"):
            raise Unsupported(
                f"{self.policy.name} asks for the prompt again as text, and this one holds an image"
            )
        seen, masks = self.context.caches.layers[0].seen, (given, step.inputs)
        masks = [m.get("attention_mask") for m in masks if m.get("attention_mask") is not None]
        mask = next((flat_mask(m) for m in masks if flat_mask(m) is not None), None)
        if mask is None and masks and not isinstance(masks[0], dict):
            raise Unsupported(
                f"{self.policy.name} beside a 4-D mask of your own: a second reading needs [B, N]"
            )
        mask = torch.ones(len(unread), seen, device=unread.device) if mask is None else mask
        return Prompt(unread, mask.bool(), given.get("position_ids"))

    def _read_again(self, prompt: Prompt) -> None:
        cache = present(self.context.caches.cache, "a prompt under a cache method has a cache")
        self.layers, fed = self.context.caches.layers, prompt.columns[1]
        self.counts = torch.stack([prompt.mask.sum(-1) - fed, fed])
        most = int(fed.max())
        for nth, start in enumerate(range(0, most, self.said.chunk)):
            self.chunk = range(start, min(start + self.said.chunk, most))
            with beside(self.context):
                self.decoder(**self._inputs(nth, prompt), past_key_values=borrowed(cache), use_cache=True)
        self.layers = []

    def _inputs(self, nth: int, prompt: Prompt) -> dict[str, Tensor]:
        """An instruction, and the chunk: ids or embeddings as the prompt was, the mask of all, and positions."""
        said, start, stop = self.said, self.chunk.start, self.chunk.stop
        parts = [self._words(said.before(nth), prompt)]
        if nth:
            parts.append(prompt.taken(max(0, start - said.lead), start))
        parts += [self._words(said.answer, prompt), prompt.taken(start, stop)]
        tokens, there = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        given = {"input_ids" if tokens.dim() == 2 else "inputs_embeds": tokens}
        given["attention_mask"] = torch.cat([prompt.mask, there], 1).long()
        if prompt.positions is not None:
            last = prompt.positions.amax(-1, keepdim=True)
            given["position_ids"] = last + there.cumsum(-1).clamp(min=1)
        return given

    def _ids(self, words: Words) -> list[int]:
        if not isinstance(words, str):
            return list(words)
        if self.context.tokenizer is None:
            raise Unsupported(
                f"{self.policy.name} asks the model in words of its own, {words!r}: attach(model, ..., "
                "tokenizer=tokenizer) gives their tokens, or say them as token ids"
            )
        return self.context.tokenizer(words, add_special_tokens=False)["input_ids"]

    def _words(self, words: Words, prompt: Prompt) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([self.ids[words]], dtype=torch.long, device=prompt.fed.device)
        fed = ids if prompt.fed.dim() == 2 else self._embedded(ids, prompt.fed.dtype)
        shape = (len(prompt.fed), ids.shape[1])
        return fed.expand(*shape, *fed.shape[2:]), torch.ones(shape, dtype=torch.bool, device=ids.device)

    def note(self, call: AttentionCall) -> None:
        """What the page says of the tokens that this layer stores, to the queries of the pass that runs."""
        view, ledger = call.stored, self.layers[call.layers.index(call.ledger)]
        if ledger.window is not None:  # what lies before the window is not read at all
            return
        group = next(g for g in ledger.groups if g.heads == call.slots.heads)
        before, fed = self.counts[:, :, None, None]
        place = view.rank() - before
        chunk = view.hold() & (place >= self.chunk.start) & (place < fed.clamp(max=self.chunk.stop))
        worth = self.policy.page.worth(view, chunk, self.policy.method.config)
        note = group.note(WORTH)
        torch.maximum(note, worth[..., : group.n].to(note.dtype), out=note)


@contextmanager
def beside(context: Any) -> Iterator[None]:
    """Within the block a pass beside the model's own runs, which leaves what is known of the latter as it is."""
    caches = context.caches
    kept = context.step, caches.cache, caches.layers
    context.step = Step(number=context.step.number, stream=REREADING)
    try:
        yield
    finally:
        context.step, caches.cache, caches.layers = kept
        caches.pending.clear()


def borrowed(cache: Cache) -> Cache:
    """A cache that begins with all that this one stores: what is written to it is not written to this one."""
    twin = copy.copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, list):
            setattr(twin, name, [lent(x) if isinstance(x, LedgerLayer) else copy.deepcopy(x) for x in value])
    return twin


def lent(layer: LedgerLayer) -> LedgerLayer:
    """A layer with the same slots, whose growth, tables and states are its own."""
    twin = copy.copy(layer)
    twin.groups = [copy.copy(group) for group in layer.groups]
    for group in twin.groups:  # tables lie in tensors of their own; buffers have room behind what counts
        group.notes = {name: note.clone() for name, note in group.notes.items()}
        group.index = None if group.index is None else group.index.clone()
        group.count = None if group.count is None else group.count.clone()
    twin.labels, twin.memory, twin.followers, twin.prepared = dict(layer.labels), {}, {}, {}
    for name in STATES:
        if hasattr(layer, name):
            setattr(twin, name, copy.deepcopy(getattr(layer, name)))
    return twin
