"""What a method read that leaves keys unread: a row for each layer, by head."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from regard.attaching.actors import Actor, AttentionCall
from regard.core import Unsupported
from regard.ops.blocks import Blocks, captured_mass, read_by_head


class Selected:
    """The latest prompt's rows by layer; `weighs`: whether the captured share of attention mass is measured."""

    def __init__(self) -> None:
        self.weighs = False
        self.rows: dict[int, dict[str, Any]] = {}

    def left(self, call: AttentionCall, why: str) -> None:
        """A layer that was left to the model."""
        self.rows[call.site.layer] = {"layer": call.site.layer, "site": call.name, "dense": why}

    def read(
        self, call: AttentionCall, q: Tensor, k: Tensor, lists: Sequence[Blocks], lse: Tensor | None,
        mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        """What these queries read: lists of blocks that share no key, and the logarithm of the sum of e^score."""
        row: dict[str, Any] = {"layer": call.site.layer, "site": call.name}
        if lists:
            row["kept"] = read_by_head(lists, len(q), q.shape[1], q.shape[2], k.shape[2], mask).tolist()
        if self.weighs and lse is not None:
            row["mass"] = captured_mass(q, k, lse, mask).mean(0).tolist()
        self.rows[call.site.layer] = row


def selection(actors: list[Actor], mass: bool) -> list[dict[str, Any]]:
    """The rows of all layers, of the actor that leaves keys unread."""
    found = [actor.selected for actor in actors if actor.selected is not None]
    if not found:
        raise Unsupported("no method that leaves blocks of keys unread is attached")
    for one in found:
        one.weighs = one.weighs or mass
    rows = {layer: row for one in found for layer, row in one.rows.items()}
    return [rows[layer] for layer in sorted(rows)]
