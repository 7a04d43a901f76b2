"""The oracle: a full cache with an explicit softmax in which the tokens that a policy dropped are hidden."""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from regard.attaching.anatomy import anatomy
from regard.attaching.sites import site_of
from regard.core import Method, Unreachable
from regard.core.errors import present
from regard.testing.cache.own import OwnAttention
from regard.testing.cache.script import ReadRecord, full_cache, real


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, h, ...] -> [B, heads, ...] by writing every head out."""
    return torch.stack([x[:, i * x.shape[1] // heads] for i in range(heads)], 1)


# model types whose rotation leaves some layers alone -> whether it does this one
UNTURNED: dict[str, Callable[[Any, int], bool]] = {
    "cohere2": lambda config, layer: config.layer_types[layer] == "full_attention",
    "smollm3": lambda config, layer: not config.no_rope_layers[layer],
}
UNTURNED |= dict.fromkeys(
    ("afmoe", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1"), UNTURNED["cohere2"]
)


@dataclass(frozen=True)
class Rotation:
    """What a position does to the vectors of one layer: pair i is turned by angle i.

    half  how the model's file turns by a right angle; it says which are a pair: x_i and x_{i + pairs}, or neighbours
    """

    angle: Tensor  # [pairs] float64
    half: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, by: Tensor) -> Tensor:
        """x [B, H, n, D] turned by `by` [b, h, n] positions."""
        width = 2 * len(self.angle)
        turned = by[..., None].double() * self._by_dimension
        inner = x[..., :width].double()
        inner = inner * turned.cos() + self.half(inner) * turned.sin()
        return torch.cat([inner.to(x), x[..., width:]], -1)

    @cached_property
    def _by_dimension(self) -> Tensor:
        """The angle of each dimension: that of the pair it is in, pairs counted by their first dimension."""
        width = 2 * len(self.angle)
        partner = self.half(torch.arange(1.0, width + 1)).abs().long() - 1
        first = torch.minimum(partner, torch.arange(width))
        return self.angle[torch.unique(first, return_inverse=True)[1]]


def replaced(x: Tensor, stored: Tensor | None, heads: int) -> Tensor:
    """x [B, H, n, D] with what is stored of the earlier tokens [B, G, m, D] in its place."""
    return x if stored is None else torch.cat([by_head(stored, heads), x[:, :, stored.shape[2] :]], 2)


def halves(x: Tensor) -> Tensor:
    """The right angle where x_i and x_{i + pairs} are a pair."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotation(model: Any, layer: int) -> Rotation | None:
    """What the configuration and `rotate_half` of the model's file say; None: no plain rotary positions."""
    angle = angles(model, layer)
    if angle is None:
        return None
    return Rotation(angle, getattr(sys.modules[type(model).__module__], "rotate_half", halves))


def angles(model: Any, layer: int) -> Tensor | None:
    """Angles per position of the rotated pairs, from the configuration alone; None: no plain rotary positions."""
    config = model.config.get_text_config()
    leaves = UNTURNED.get(config.model_type)
    config = getattr(config, "per_layer_config", {layer: config})[layer]
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_theta" not in rope:
        rope = rope.get(config.layer_types[layer])
    if not rope or "mrope_section" in rope or hasattr(config, "kv_lora_rank"):
        return None
    named = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None)
    width = named or config.hidden_size // config.num_attention_heads
    pairs = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    # proportional: all pairs of the head are there, those beyond the rotated ones stand still
    whole = {"default": pairs, "proportional": width // 2}.get(rope["rope_type"])
    if whole is None:
        return None
    turned = [rope["rope_theta"] ** (-i / whole) if i < pairs else 0.0 for i in range(whole)]
    still = leaves is not None and leaves(config, layer)
    return torch.tensor(turned, dtype=torch.float64) * (0.0 if still else 1.0)


def present_rotation(model: Any, layer: int) -> Rotation:
    return present(rotation(model, layer), "the model has plain rotary positions", layer=layer)


# (layer, "scores", "weights" or "z", x, seen) -> x
Change = Callable[[int, str, Tensor, Tensor], Tensor]


def oracle_function(
    model: Any,
    now: dict[int, ReadRecord],
    change: Change | None = None,
    own: OwnAttention | None = None,
    wrote: list[int] | None = None,
) -> Callable:
    """The attention function; `wrote` has the cache layer that was just written, where a layer runs several times."""
    change = change or (lambda layer, quantity, x, seen: x)
    layers = {id(module): site_of(name).layer for name, module in model.named_modules()}
    turn = functools.cache(partial(present_rotation, model))

    def oracle(module, query, key, value, attention_mask=None, *args, scaling=None, **kwargs):
        heads, layer = query.shape[1], wrote.pop() if wrote else layers[id(module)]
        read = now.get(layer)
        k, v = by_head(key, heads), by_head(value, heads)
        seen = attention_mask.expand(-1, heads, -1, -1)
        if read is not None:
            k, v = (replaced(x, stored, heads) for x, stored in zip((k, v), read.stored or (None, None)))
            seen = seen & by_head(read.alive, heads)[:, :, None]
            if read.moved is not None:
                k = turn(layer)(k, by_head(read.moved, heads))
        s = torch.einsum("bhnd,bhmd->bhnm", query.float(), k.float()) * scaling
        if kwargs.get("softcap") is not None:
            s = kwargs["softcap"] * torch.tanh(s / kwargs["softcap"])
        if kwargs.get("position_bias") is not None:
            s = s + kwargs["position_bias"]
        s = change(layer, "scores", s, seen).masked_fill(~seen, -math.inf)
        if read is not None and read.merged is not None:
            mk, mv, count, index = (by_head(x, heads) for x in read.merged)
            more = (
                torch.einsum("bhnd,bhmd->bhnm", query.float(), mk.float()) * scaling + count.log()[:, :, None]
            )
            open_ = attention_mask.expand(-1, heads, -1, -1).gather(-1, index[:, :, None].expand_as(more))
            s, v = torch.cat([s, more.masked_fill(~open_, -math.inf)], -1), torch.cat([v, mv], 2)
        top = s.amax(-1, keepdim=True)
        if kwargs.get("s_aux") is not None:
            sink = kwargs["s_aux"].float().view(1, -1, 1, 1)
            top = torch.maximum(top, sink)
        top = top.nan_to_num(neginf=0.0)
        e = (s - top).exp()
        total = e.sum(-1, keepdim=True)
        if kwargs.get("s_aux") is not None:
            total = total + (sink - top).exp()
        w = change(layer, "weights", e / total.clamp(min=1e-30), seen)
        z = torch.einsum("bhnm,bhme->bhne", w, v.float())
        if own is not None:
            z = own(layer, query, key, value, seen, z, scaling=scaling, **kwargs)
        z = change(layer, "z", z, seen)
        return z.to(query.dtype).transpose(1, 2).contiguous(), w

    return oracle


@contextmanager
def explicit_attention(
    model: Any,
    now: dict[int, ReadRecord],
    change: Change | None = None,
    own: OwnAttention | None = None,
    wrote: list[int] | None = None,
) -> Iterator[None]:
    """The model computes attention by `oracle_function` and reads, in layer i, only what now[i] says."""
    config = model.config.get_text_config()
    name, old = f"oracle/{id(now)}", config._attn_implementation_internal
    whole = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    AttentionInterface.register(name, oracle_function(model, now, change, own, wrote))
    AttentionMaskInterface.register(name, lambda *a, **k: sdpa_mask(*a, **{**k, **whole}))
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = old
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def hide(
    model: Any,
    feeds: list[dict],
    reads: list[dict[int, ReadRecord]] | None = None,
    change: Change | None = None,
    cache: Cache | None = None,
    method: Method | None = None,
) -> list[Tensor]:
    """Logits of the script on a full cache in which everything but `reads` is hidden; None: nothing is.

    `change` is handed scores, weights and head outputs of every layer and gives what goes on. `method`: a page with an
    attention of its own, whose reference answers.
    """
    now: dict[int, ReadRecord] = {}
    turn = functools.cache(partial(present_rotation, model))
    own = None if method is None else OwnAttention(method, lambda i, x, by: turn(i)(x, by))
    cache, outs, wrote = cache or full_cache(model), [], []
    with explicit_attention(model, now, change, own, wrote), noting(cache, wrote), torch.no_grad():
        for i, feed in enumerate(feeds):
            if own is not None:
                own.real = feed["attention_mask"].bool()
            now.clear()
            now.update(reads[i] if reads is not None else {})
            outs.append(model(**feed, past_key_values=cache).logits)
    return outs


@contextmanager
def noting(cache: Cache, wrote: list[int]) -> Iterator[None]:
    """Within the block, `wrote` is the number of the layer of the cache that was written last."""
    update = cache.update

    def noted(k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        wrote[:] = [layer]
        return update(k, v, layer, *args, **kwargs)

    cache.update = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        del cache.update


def gap(feeds: list[dict], logits: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference on tokens that are not padding."""
    return max(
        float((a - b)[real(feeds, i)].abs().max())
        for i, (a, b) in enumerate(zip(logits, expected, strict=True))
    )


def reachable(model: Any) -> bool:
    """Whether the model's layers are such that their output projections are found."""
    try:
        anatomy(model)
    except Unreachable:
        return False
    return True


def movable(method: Method, model: Any) -> bool:
    """Whether this policy's positions can be computed by hand on this model, and what it reads of it is there."""
    if method.page.reads_output and not reachable(model):
        return False
    moves = (method.page.shift or method.page.attention) is not None
    layers = range(model.config.get_text_config().num_hidden_layers)
    return not moves or all(angles(model, layer) is not None for layer in layers)
