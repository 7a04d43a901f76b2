"""A steering page on layers as a whole: edits of the residual and of what is added to it, and what streams note."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from regard.attaching.actors import seed_of
from regard.attaching.anatomy import LayerAnatomy
from regard.attaching.streams import live, put
from regard.attaching.streams_beside import Recorded, at_columns, begun
from regard.core.errors import present
from regard.ops.steered import Steered

MAIN = "main"


def hook_layer(steering: Any, layer: LayerAnatomy) -> Iterator[Any]:
    outside = torch._dynamo.disable
    for quantity, module in (("out", layer.out), ("mlp", layer.mlp), ("resid_post", layer.module)):
        edits = quantity in steering.page.layer_edits
        reads = quantity == "resid_post" or any(quantity in s.records for s in steering.streams)
        if edits or reads:
            yield module.register_forward_hook(outside(at_layer(steering, quantity, layer)))


def at_layer(steering: Any, quantity: str, layer: LayerAnatomy) -> Callable:
    scale = layer.scale if quantity in ("out", "mlp") else 1

    def hook(module: nn.Module, args: tuple, y: Any) -> Any:
        x = present(live(y), "a layer returns a stream")
        new = layer_edited(steering, quantity, layer.number, x * scale if scale != 1 else x)
        note(steering, quantity, layer.number, new)
        unchanged = new is x or (scale != 1 and torch.equal(new, x * scale))
        return y if unchanged else put(y, new / scale if scale != 1 else new)

    return hook


def layer_edited(steering: Any, quantity: str, number: int, x: Tensor) -> Tensor:
    function = steering.page.layer_edits.get(quantity)
    if function is None:
        return x
    phase = "decode" if x.shape[1] == 1 and begun(steering.step.inputs.get("past_key_values")) else "prefill"
    at = Steered(layer=number, layers=steering.layers, phase=phase, stream=steering.stream, memory=None)
    at.seed = seed_of(steering.config)
    if not steering.steers(at):
        return x
    steering.acted += 1
    at.memory = None if steering.makes_memory() else steering.memory_of()
    return function(at, x, steering.config)


def note(steering: Any, quantity: str, number: int, x: Tensor) -> None:
    columns = torch.tensor([x.shape[1] - 1]) if steering.columns is None else steering.columns
    newest = at_columns(x, columns)
    if quantity == "resid_post" and steering.stream == MAIN:
        steering.early_states[number] = newest.detach()
    for stream in steering.streams:
        if stream.name == steering.stream and quantity in stream.records:
            steering.recorded.setdefault(stream.name, Recorded()).note(quantity, number, newest)
