"""A compressed cache on disk: keys, values, their ledger and a hybrid's states in one safetensors file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, LinearAttentionLayer

from regard import catalog
from regard.attaching.hybrid_layer import beside_states, has_states, holds_no_keys
from regard.attaching.ledger import LedgerLayer
from regard.attaching.packed import PackedGroup
from regard.attaching.slots import Group
from regard.core import Unsupported, require

FORMAT = "regard-cache-1"
MEMORY = (int, float, bool, str)


def save_cache(cache: Cache, path: str | Path) -> None:
    """Write a cache of ledger layers; `load_cache` brings it back to go on with, in another process too."""
    tensors: dict[str, Tensor] = {}
    layers = []
    refuse_what_stays_behind(cache)
    layer: Any
    for i, layer in enumerate(cache.layers):
        facts = keys_of(layer, i, tensors) if isinstance(layer, LedgerLayer) else {}
        if has_states(layer):
            facts["states"] = [
                states_of(layer, n, f"{i}.state.{n}", tensors) for n in range(layer.number_of_states)
            ]
        layers.append(facts)
    save_file(tensors, str(path), metadata={"format": FORMAT, "layers": json.dumps(layers)})


def refuse_what_stays_behind(cache: Cache) -> None:
    """Raise for a cache that is not one of an attachment, and for states that are kept in another place."""
    layer: Any
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, LedgerLayer) and not holds_no_keys(layer):
            raise Unsupported(
                f"layer {i} is a {type(layer).__name__}; only caches of an attachment can be saved"
            )
        if has_states(layer) and cache.get_seq_length() and not any(layer.has_previous_state.values()):
            raise Unsupported(
                f"layer {i} is a {type(layer).__name__} without a state: the model keeps it in its modules, where a "
                "cache file would leave it behind"
            )
    if hasattr(cache, "linear_cache"):
        raise Unsupported(f"a {type(cache).__name__} keeps states beside its layers, which cannot be saved")


def keys_of(layer: LedgerLayer, i: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a ledger layer holds: facts, and its tensors under its number."""
    facts: dict[str, Any] = {name: getattr(layer, name) for name in ("seen", "compressed", "window")}
    facts |= {"memory": {}, "groups": []}
    for g, group in enumerate(layer.groups):
        facts["groups"].append({"heads": group.heads, "n": group.n, "start": group.start})
        if isinstance(group, PackedGroup):
            facts["groups"][-1] |= {"held": group.held, "codec": group.codec.method}
        tensors.update({f"{i}.{g}.{n}": t.contiguous().clone() for n, t in group.written().items()})
    write_memory(layer.memory, f"{i}.memory", facts["memory"], tensors)
    tensors.update({f"{i}.label.{name}": t.contiguous().clone() for name, t in layer.labels.items()})
    if layer.positions is not None:
        tensors[f"{i}.positions"] = layer.positions.contiguous().clone()
    return facts


def states_of(layer: Any, n: int, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The nth state of a recurrence or a convolution."""
    for name, state in (("conv", layer.conv_states[n]), ("recurrent", layer.recurrent_states[n])):
        if state is not None:
            tensors[f"{prefix}.{name}"] = state.contiguous().clone()
    return {"began": layer.has_previous_state[n], "kernel": layer.conv_kernel_size[n]}


def write_memory(memory: dict, prefix: str, facts: dict, tensors: dict[str, Tensor]) -> None:
    for name, value in memory.items():
        key = json.dumps(name)
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{key}"] = value.contiguous().clone()
        elif isinstance(value, dict):
            facts[key] = {}
            write_memory(value, f"{prefix}.{key}", facts[key], tensors)
        elif isinstance(value, MEMORY):
            facts[key] = value
        elif isinstance(value, list) and all(isinstance(v, Tensor) for v in value):
            tensors.update({f"{prefix}.{key}#{n}": v.contiguous().clone() for n, v in enumerate(value)})
        else:
            raise Unsupported(f"a policy's memory of type {type(value).__name__} ({name!r}) cannot be saved")


def load_cache(path: str | Path, device: str | torch.device = "cpu") -> Cache:
    """The cache that `save_cache` wrote, ready for `model(..., past_key_values=cache)` under the same method."""
    require(Path(path).exists(), "the cache file is there", path=str(path))
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        meta = file.metadata() or {}
        require(
            meta.get("format") == FORMAT, f"the file is a {FORMAT}", path=str(path), format=meta.get("format")
        )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (a safetensors handle)
    cache = Cache(layers=[])
    for i, facts in enumerate(json.loads(meta["layers"])):
        states = None if "states" not in facts else restored_states(i, facts["states"], tensors)
        if "groups" not in facts:
            cache.layers.append(DummyLayer() if states is None else states)
        else:
            cache.layers.append(beside_states(restored(i, facts, tensors), states))
    return cache


def restored_states(i: int, facts: list[dict], tensors: dict[str, Tensor]) -> LinearAttentionLayer:
    layer = LinearAttentionLayer(number_of_states=len(facts))
    for n, state in enumerate(facts):
        conv, recurrent = (tensors.get(f"{i}.state.{n}.{name}") for name in ("conv", "recurrent"))
        layer.conv_states[n], layer.recurrent_states[n] = conv, recurrent
        layer.is_conv_states_initialized[n] = conv is not None
        layer.is_recurrent_states_initialized[n] = recurrent is not None
        layer.has_previous_state[n], layer.conv_kernel_size[n] = state["began"], state["kernel"]
        for t in (recurrent, conv):
            if t is not None:
                layer.device, layer.dtype = t.device, t.dtype
    return layer


def restored(i: int, facts: dict, tensors: dict[str, Tensor]) -> LedgerLayer:
    layer = LedgerLayer(facts.get("window"))
    layer.seen, layer.compressed = facts["seen"], facts["compressed"]
    for g, group in enumerate(facts["groups"]):
        prefix = f"{i}.{g}."
        named: dict[str, Any] = {
            k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)
        }
        notes = {k.removeprefix("note."): t for k, t in named.items() if k.startswith("note.")}
        rest = {k: named.get(k) for k in ("index", "count", "origin")} | {"start": group.get("start", 0)}
        heads, n = tuple(group["heads"]), group["n"]
        stored = Group(heads, named["keys"], named["values"], n, notes=notes, **rest)
        layer.groups.append(stored if "codec" not in group else packed_again(stored, group, named))
    if layer.groups:
        layer.is_initialized = True
        layer.dtype, layer.device = layer.groups[0].keys.dtype, layer.groups[0].keys.device
    layer.memory = read_memory(f"{i}.memory", facts["memory"], tensors)
    label = f"{i}.label."
    layer.labels = {name.removeprefix(label): t for name, t in tensors.items() if name.startswith(label)}
    layer.positions = tensors.get(f"{i}.positions")
    return layer


def packed_again(stored: Group, facts: dict, named: dict[str, Tensor]) -> PackedGroup:
    """The group with its packed tokens, which the method that packed them unpacks."""
    name, settings = facts["codec"]
    method = catalog.method(name, **settings)
    group = PackedGroup.of(stored, method.page.codec(method.config))
    group.held, group.chunk = facts["held"], named.get("chunk")
    parts, shared = (
        {k.removeprefix(prefix): t for k, t in named.items() if k.startswith(prefix)}
        for prefix in ("part.", "shared.")
    )
    group.parts, group.shared = parts, shared
    return group


def read_memory(prefix: str, facts: dict, tensors: dict[str, Tensor]) -> dict:
    memory: dict = {}
    for key, value in facts.items():
        name = as_key(json.loads(key))
        memory[name] = read_memory(f"{prefix}.{key}", value, tensors) if isinstance(value, dict) else value
    nested = tuple(f"{prefix}.{key}." for key, value in facts.items() if isinstance(value, dict))
    for key, t in tensors.items():
        if not key.startswith(prefix + ".") or key.startswith(nested or ("\0",)):
            continue
        name, _, number = key.removeprefix(prefix + ".").partition("#")
        if number:
            memory.setdefault(as_key(json.loads(name)), []).append(t)
        else:
            memory[as_key(json.loads(name))] = t
    return memory


def as_key(name: Any) -> Any:
    return tuple(name) if isinstance(name, list) else name
