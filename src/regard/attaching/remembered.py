"""What a cache page remembers of a layer over the steps of a text, by heads where these hold different lengths."""

from torch import Tensor

from regard.attaching.actors import AttentionCall
from regard.attaching.ledger import LedgerLayer
from regard.attaching.slots import Group
from regard.ops import View


def told(ledger: LedgerLayer, group: Group) -> dict[str, Tensor]:
    """What a page remembers of these heads, [B, g, ...] by name; before they were parted, of all heads of the layer."""
    tensors = {n: t for n, t in ledger.memory.get(group.heads, {}).items() if isinstance(t, Tensor)}
    own = {n: t for n, t in tensors.items() if t.shape[1:2] == (len(group.heads),)}
    heads = sum(len(g.heads) for g in ledger.groups)
    shared = {n: t for n, t in ledger.memory.items() if isinstance(t, Tensor) and t.shape[1:2] == (heads,)}
    return {n: t[:, list(group.heads)] for n, t in shared.items()} | own


def memory_of(call: AttentionCall, view: View) -> dict:
    """What the page remembers of this layer, or of this group of its heads where they hold different lengths."""
    layer = call.ledger
    memory = layer.memory if len(layer.groups) == 1 else memory_of_heads(layer.memory, call.slots.heads)
    # a layer that reads the keys of another remembers its own queries
    return memory if call.turn.nth == 0 else memory.setdefault(f"reader {call.turn.nth}", {})


def memory_of_heads(memory: dict, heads: tuple[int, ...]) -> dict:
    """What is remembered of these heads: where they have just parted from others, what was remembered of all."""
    if heads not in memory:
        wider = [key for key in memory if isinstance(key, tuple) and set(heads) < set(key)]
        before = memory[min(wider, key=len)] if wider else memory
        memory[heads] = {
            name: dict(x) if isinstance(x, dict) else x
            for name, x in before.items()
            if not isinstance(name, tuple)
        }
    return memory[heads]
