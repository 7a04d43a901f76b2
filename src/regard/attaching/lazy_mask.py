"""A mask that is not there yet: it carries the model's own mask function and is evaluated where it is needed.

Hugging Face builds one mask per layer type, sized for one layer. Here the mask interface returns a 4-D tensor of
one number that remembers how the mask would be built: `native()` is what the model's SDPA would have been given,
`at(rows, index)` the same rule at any stored tokens. Any other use turns it into the dense tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from regard.core import Unsupported

# (seen [b, g, rows, n] by the rules before, query index [1, 1, rows, 1], key index [b, g, n]) -> what is left of it
Narrowing = Callable[[Tensor, Tensor, Tensor], Tensor]
KEEP = {torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.detach, torch.Tensor.clone}


@dataclass
class MaskRule:
    """What the mask of one layer type is made of. `q_offset` is the true index of the first query.

    `narrowings` are masks attached beside it; `native` and `dense` are the model's own mask without them.
    `ahead`: they show later tokens too, and causality is theirs to say. `additive`: the model by itself has masks of
    numbers that are added to scores, as eager attention has.
    """

    batch: int
    queries: int
    keys: int
    q_offset: int | Tensor
    kv_offset: int | Tensor
    function: Any
    padding: Tensor | None  # [B, keys seen] True = a real token
    arguments: dict
    device: torch.device
    cached: dict = field(default_factory=dict)
    narrowings: tuple[Narrowing, ...] = ()
    ahead: bool = False
    additive: bool = False
    columns: Tensor | None = None  # [B, N] true index of each query, where these do not follow each other

    @property
    def bidirectional(self) -> bool:
        """Whether the model lets its queries see later tokens: where that is so, no mask needs no causality."""
        return bool(self.arguments.get("allow_is_bidirectional_skip"))

    @property
    def model_causal(self) -> bool:
        """The model's own mask is plain causal."""
        return self.function is causal_mask_function

    @property
    def causal(self) -> bool:
        """Plain causal, nothing else."""
        return self.model_causal and not self.narrowings

    def pad(self) -> Tensor | None:
        """[B, seen] True = a real token; None when all are."""
        if "pad" not in self.cached:
            pad = self.padding
            self.cached["pad"] = None if pad is None or bool(pad.all()) else pad.bool()
        return self.cached["pad"]

    def order(self) -> Tensor | None:
        """[B, seen] place of each token among the real ones of its row, for padding that of the last one before it."""
        if "order" not in self.cached:
            pad = self.pad()
            self.cached["order"] = None if pad is None else pad.cumsum(-1) - 1
        return self.cached["order"]

    def native(self) -> Tensor | None:
        """What SDPA would have been given: boolean [B, 1, N, M], or None where causality alone says it."""
        if self.columns is not None:
            raise Unsupported("a mask whose queries were picked, as the model itself would build it")
        if "native" not in self.cached:
            self.cached["native"] = sdpa_mask(**self.arguments)
        return self.cached["native"]

    def picked(self, columns: Tensor) -> "MaskRule":
        """The rule for the queries of these tokens [B, N] alone, by true index; keys are asked for by theirs."""
        pads = {name: x for name, x in self.cached.items() if name in ("pad", "order")}
        return replace(self, queries=columns.shape[1], columns=columns, cached=pads)

    def last_rows(self, start: int) -> "MaskRule":
        """The rule for the queries from this row on, which are then those of the last tokens."""
        if self.columns is not None:
            return self.picked(self.columns[:, start:])
        moved = {"q_length": self.queries - start, "q_offset": self.q_offset + start}
        return replace(
            self, queries=moved["q_length"], q_offset=moved["q_offset"],
            arguments={**self.arguments, **moved}, cached={},
        )  # fmt: skip

    def among(self, chosen: Tensor) -> "MaskRule":
        """The rule under which each query sees, of what it saw, the keys of these columns [B, N, k] alone."""
        shown = torch.zeros(*chosen.shape[:2], self.keys, dtype=torch.bool, device=chosen.device)
        shown.scatter_(-1, chosen.long(), True)

        def function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self.function(b, h, q, k) & shown[b, q - self.q_offset, k - self.kv_offset]

        whole = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, mask_function=function)
        pads = {name: x for name, x in self.cached.items() if name in ("pad", "order")}
        return replace(self, function=function, arguments={**self.arguments, **whole}, cached=pads)

    def dense(self) -> Tensor:
        """[B, 1, N, M] what the model by itself would have: True where a query sees a key, or numbers to add."""
        whole = {**self.arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return (eager_mask if self.additive else sdpa_mask)(**whole)  # type: ignore[return-value]

    def at(self, rows: slice, index: Tensor) -> Tensor:
        """[b, g, rows, n] bool: whether these queries see the tokens with true index [b, g, n] (-1: nobody does)."""
        start, stop, _ = rows.indices(self.queries)
        if self.columns is None:
            q = torch.arange(start, stop, device=index.device)[None, None, :, None] + self.q_offset
        else:
            q = self.columns[:, None, start:stop, None]
        keys = index.clamp(min=0)[:, :, None]  # [b, g, 1, n]
        alone = index.shape[0] == 1 and not (self.causal and self.columns is None)
        batch = self.batch if alone else index.shape[0]
        b = torch.arange(batch, device=index.device)[:, None, None, None]
        h = torch.arange(index.shape[1], device=index.device)[None, :, None, None]
        function = everything if self.ahead else self.function
        seen = function(b, h, q, keys) & (index >= 0)[:, :, None]
        if self.pad() is not None:
            seen = seen & self.real(index)[:, :, None]
        for narrow in self.narrowings:
            seen = narrow(seen, q, index)
        return seen

    def real(self, index: Tensor) -> Tensor:
        """[B, g, n] bool: the slot holds a token that is not padding."""
        pad = self.pad()
        if pad is None:
            return index >= 0
        index = index.expand(pad.shape[0], -1, -1)
        real = pad.gather(1, index.clamp(0, pad.shape[1] - 1).flatten(1)).view(index.shape)
        # a static cache has slots for tokens to come
        return real & (index >= 0) & (index < pad.shape[1])


def everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """All pairs of stored tokens."""
    return (b >= 0) & (h >= 0) & (q >= 0) & (k >= 0)


def first_row(mask: Tensor, index: Any) -> int | None:
    """Where mask[:, :, start:] and mask[:, :, start:, :] begin; None for any other index."""
    cut = index if isinstance(index, tuple) and len(index) in (3, 4) else (None,)
    if not all(isinstance(i, slice) for i in cut):
        return None
    batch, heads, rows, *keys = cut
    start, stop, step = rows.indices(mask.shape[2])
    whole = all(i == slice(None) for i in (batch, heads, *keys)) and stop == mask.shape[2] and step == 1
    return start if whole and start < stop else None


class LazyMask(Tensor):
    """The 4-D stand-in that travels through the model. `rule` is what it means."""

    rule: MaskRule

    @staticmethod
    def of(rule: MaskRule) -> "LazyMask":
        # of the kind that the model would have: some ask for the dtype of their mask
        dtype = rule.arguments.get("dtype", torch.float32) if rule.additive else torch.bool
        one = torch.zeros((), dtype=dtype, device=rule.device)
        shape = (rule.batch, 1, rule.queries, rule.keys)
        mask = torch.Tensor._make_subclass(LazyMask, one.expand(shape))
        mask.rule = rule
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in KEEP and not any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
            return args[0]
        if func.__name__ == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func.__name__ == "__getitem__":
            start = first_row(*args)
            if start is not None:
                return LazyMask.of(args[0].rule.last_rows(start))
        return func(*dense(args), **dense(kwargs))


def dense(x: Any) -> Any:
    """Arguments with every stand-in in them as the mask it stands for; torch.cat takes them in a list."""
    if isinstance(x, LazyMask):
        return x.rule.dense()
    if isinstance(x, dict):
        return {name: dense(part) for name, part in x.items()}
    return type(x)(dense(part) for part in x) if type(x) in (list, tuple) else x


class Standins:
    """The masks of an attachment. torch.compile takes no tensor of our own kind: a plain one is known by its byte."""

    def __init__(self) -> None:
        # the attention that a model has by itself, by the identity of its configuration
        self.own: dict[int, str | None] = {}
        # where the byte lies -> the byte itself, so that nothing else comes to lie there, and what it stands for
        self.rules: dict[int, tuple[Tensor, MaskRule]] = {}

    def mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mask function that an attachment registers with transformers."""
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        additive = self.own.get(id(kwargs.get("config"))) == "eager"
        return lazy_mask(*args, **kwargs, additive=additive)

    @torch._dynamo.disable
    def plain(self, *args: Any, **kwargs: Any) -> Tensor:
        """[B, 1, N, M] of one byte."""
        rule = lazy_mask(*args, **kwargs).rule
        one = torch.zeros((), dtype=torch.bool, device=rule.device)
        self.rules[one.data_ptr()] = (one, rule)
        return one.expand(rule.batch, 1, rule.queries, rule.keys)

    def lazy(self, mask: Tensor | None) -> Tensor | None:
        """The mask that a stand-in stands for."""
        if not self.rules or mask is None or isinstance(mask, LazyMask):
            return mask
        _, rule = self.rules.get(mask.data_ptr(), (None, None))
        if rule is None:
            raise Unsupported(
                "a model that computes on its attention mask, under torch.compile; call it uncompiled"
            )
        return LazyMask.of(rule)


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    additive: bool = False,
    **others: Any,
) -> LazyMask:
    """The mask function that an attachment registers with transformers."""
    # copies: a StaticCache writes on into its own
    q_offset, kv_offset = (x.clone() if isinstance(x, Tensor) else x for x in (q_offset, kv_offset))
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device, **others,
    )  # fmt: skip
    rule = MaskRule(
        batch=batch_size, queries=q_length, keys=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        function=mask_function, padding=attention_mask, arguments=arguments, device=torch.device(device),
        additive=additive,
    )  # fmt: skip
    return LazyMask.of(rule)
