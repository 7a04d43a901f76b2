"""With what weights a place of an image reads all others: of any mechanism, and in any layer of a trained backbone.

The weights of a query are the derivatives of its output by the values, which its queries and keys alone decide: where a
mechanism is a sum of weighted values these are its weights, whatever makes them.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from regard.core import Method, Unsupported, require
from regard.core.roles import Roles
from regard.kinds.mechanism import Mechanism, run
from regard.nn.vision import VisionBackbone, VisionLayer


def weights_at(out_of: Callable[[Tensor], Tensor], v: Tensor, token: int) -> Tensor:
    """[H, N] of out_of(v) [1, H, N, E] at one token: the derivative by each token's value, the mean of its numbers."""
    v = v.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(out_of(v)[0, :, token].sum(), v)
    return found[0].mean(-1)


def page_maps(
    method: Method, sides: tuple[int, int], tokens: list[int], heads: int = 2, width: int = 16
) -> list[Tensor]:
    """[H, rows, columns] for each of these tokens of an image of random queries and keys, the same in every process."""
    page, n = method.page, sides[0] * sides[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, n, width) for _ in range(3))
        dims = {"heads": heads, "kv_heads": heads, "key": width, "value": width, "width": heads * width}
        options: dict[str, Any] = {"params": page.init(method.config, dims) if page.init else {}}
        options["roles"] = Roles.grid(*sides) if page.roles else None
        if page.reads_x(method.config):
            options["x"] = torch.randn(1, n, heads * width)
    ask = lambda v: run(method, q, k, v, pattern="self", **options)[0]  # noqa: E731
    return [weights_at(ask, v, token).unflatten(-1, sides) for token in tokens]


def backbone_map(model: VisionBackbone, image: Tensor, layer: int, place: tuple[int, int]) -> Tensor:
    """[H, rows, columns] weights with which a layer of a trained backbone reads an image at a place.

    image [channels, rows, columns]; place (row, column) of the layer's own grid, which the result has too.

    Unsupported for a layer that is a block page, which has no values of its own, or where a class token is asked.
    """
    layers = [module for stage in model.stages for module in stage]  # type: ignore[attr-defined]
    require(-len(layers) <= layer < len(layers), "a layer of the model", layer=layer, layers=len(layers))
    chosen = layers[layer]
    if not isinstance(chosen, VisionLayer):
        raise Unsupported(f"layer {layer} is a block: it has no values that queries and keys mix")
    if model.class_token is not None:
        raise Unsupported("a class token stands nowhere: maps are of places")
    seen: dict[str, Any] = {}
    hook = chosen.attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=args[0], roles=kwargs["roles"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(image[None], interpolate_pos_encoding=True)
    finally:
        hook.remove()
    sides = seen["roles"].sides
    inside = all(0 <= at < side for at, side in zip(place, sides, strict=True))
    require(inside, "a place of the layer's grid", place=place, grid=sides)
    attention, x = chosen.attention, seen["x"]
    q, k, v, _ = attention.project(x, x, None, None)
    page = attention.page
    options = {"roles": seen["roles"] if page.roles else None, "params": attention.params.tensors()}
    if page.reads_x(attention.method.config):
        options["x"] = x
    ask = lambda v: run(attention.method, q, k, v, pattern="self", impl=attention.impl, **options)[0]  # noqa: E731
    return weights_at(ask, v, place[0] * sides[1] + place[1]).unflatten(-1, sides).detach()


def is_on_grid(page: Any) -> TypeGuard[Mechanism]:
    """Mechanisms on images, whose maps can be drawn."""
    return isinstance(page, Mechanism) and page.grid is not None and 2 in page.grid.axes
