"""Path patching: the effect of a sender on a receiver along the direct path alone, everything else frozen. Exact.

    1  run the clean prompt; the sender gets what it had on the corrupted prompt, every other head and sublayer what it
       had on the clean one: the residual before the receiver differs by the sender alone. What the receiver's input
       becomes is written down
    2  run the clean prompt; the receiver gets that input, all else goes on by itself: m is read

    effect = (m_clean - m_patched) / (m_clean - m_corrupt)          1: this path carries it all

With `mlps="free"` what lies between is recomputed by the MLPs, as in "Interpretability in the Wild" (2022);
heads stay frozen. A receiver is the query, key or value of a head, an MLP, or the logits, for which the first run
is the answer. Nothing is linearised: norms after a sublayer and parallel blocks are those of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.attaching.anatomy import anatomy
from regard.core import Edit, Observer, Site, require
from regard.core.edit import HEADED
from regard.explaining.batches import Begun, Progress, by_cell, texts_of
from regard.explaining.effects import Effects
from regard.explaining.grid import Grid
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.runs import Values, at_site, by_head, capture, forward, heads_at, layers_of


@dataclass(frozen=True)
class Node:
    """A sender ("z" of a head, "mlp") or a receiver ("q", "k", "v" of a head, "mlp", "logits").

    Heads of k and v are those of the cache.
    """

    quantity: str
    layer: int = -1
    head: int | None = None

    def __str__(self) -> str:
        if self.quantity == "logits":
            return "logits"
        return f"layer {self.layer} {self.quantity}" + ("" if self.head is None else f" head {self.head}")


LOGITS = Node("logits")


def all_senders(model: PreTrainedModel, before: Node = LOGITS) -> list[Node]:
    """Every head and MLP that has a path to this receiver."""
    heads = [Node("z", n, h) for n in layers_of(model) for h in range(heads_at("z", model))]
    nodes = heads + [Node("mlp", layer.number) for layer in anatomy(model)]
    return [n for n in nodes if comes_before(model, n, before)]


def comes_before(model: PreTrainedModel, sender: Node, receiver: Node) -> bool:
    """Whether what the sender adds is in what the receiver reads."""
    if receiver.quantity == "logits" or sender.layer < receiver.layer:
        return True
    same = sender.layer == receiver.layer and sender.quantity == "z" and receiver.quantity == "mlp"
    return same and anatomy(model)[sender.layer].sequential


@torch.no_grad()
def path_patch(
    model: PreTrainedModel,
    pairs: Pairs,
    receivers: Sequence[Node] = (LOGITS,),
    senders: Sequence[Node] | None = None,
    *,
    rows: int | Sequence[int] | None = None,
    mlps: Literal["frozen", "free"] = "frozen",
    batch: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """The exact effect of each sender through its direct paths to the receivers, taken together.

    rows    tokens of the sender that are patched (-1: the last); None: all
    mlps    "frozen", or "free": what the sender does to MLPs in between counts

    Effects [pairs, sender]. Raises ValueError for senders that do not come before every receiver, and as `patch` does.
    """
    require(mlps in ("frozen", "free"), 'mlps is "frozen" or "free"', mlps=mlps)
    require(pairs.align is None, "path patching is of prompts that are equally long")
    pairs, chosen = (
        pairs.to(model.device),
        list(all_senders(model, min_of(receivers)) if senders is None else senders),
    )
    for receiver in receivers:
        late = [str(s) for s in chosen if not comes_before(model, s, receiver)]
        require(not late, f"a sender comes before {receiver}", senders=late[:4])
    rule = "the logits are a receiver alone: what reaches them by several ways does not add up"
    require(LOGITS not in receivers or len(receivers) == 1, rule, receivers=[*map(str, receivers)])
    row = None if rows is None else (rows,) if isinstance(rows, int) else tuple(rows)

    def begin(part: Pairs, group: list[int]) -> Begun:
        paths = Paths.of(model, part, receivers, row, mlps)
        return paths.span, lambda some: paths.through([chosen[i] for i in some])

    values, span = by_cell(pairs, len(chosen), begin, batch=batch, progress=progress)
    settings = {"method": "path patching", "direction": "noise", "mlps": mlps, "rows": row,
                "receivers": [str(r) for r in receivers]}  # fmt: skip
    names = {"sender": [str(s) for s in chosen]}
    return Effects(values, ("sender",), names, span, torch.ones(len(chosen), dtype=torch.bool), settings)


def min_of(receivers: Sequence[Node]) -> Node:
    """The first of the receivers: what comes before it comes before all."""
    require(len(receivers) > 0, "a path has a receiver")
    return min(receivers, key=lambda r: (r.layer if r.quantity != "logits" else 10**6, r.quantity == "mlp"))


@dataclass(frozen=True)
class Paths:
    """The clean prompts of some pairs, what everything is frozen to, and what senders get."""

    model: PreTrainedModel
    pairs: Pairs
    receivers: Sequence[Node]
    rows: tuple[int, ...] | None
    frozen: Sequence[str]
    clean: Values
    corrupt: Values
    before: Tensor
    span: Tensor

    @staticmethod
    def of(
        model: PreTrainedModel,
        pairs: Pairs,
        receivers: Sequence[Node],
        rows: tuple[int, ...] | None,
        mlps: str,
    ) -> "Paths":
        logits, clean = capture(model, pairs.clean, ("z", "mlp"))
        others, corrupt = capture(model, pairs.corrupt, ("z", "mlp"))
        before = pairs.score(logits)
        frozen = ("z", "mlp") if mlps == "frozen" else ("z",)
        return Paths(
            model, pairs, receivers, rows, frozen, clean, corrupt, before, before - pairs.score(others)
        )

    def through(self, senders: Sequence[Node]) -> Tensor:
        """[pairs, senders] m_clean - m_patched."""
        count, texts = len(self.pairs), self.pairs.clean.repeated(len(senders))
        sent = [self.sent(s, i) for i, s in enumerate(senders)]
        if self.receivers[0] == LOGITS:
            logits, _ = forward(self.model, texts, [*self.freeze(len(senders)), *sent])
        else:
            edits = [at_receiver(r, x) for r, x in self.received(texts, sent, len(senders)).items()]
            logits, _ = forward(self.model, texts, edits)
        change = self.before.repeat(len(senders)) - self.pairs.score(logits)
        return change.view(len(senders), count).T

    def received(self, texts: Batch, sent: list[Edit], times: int) -> dict[Node, Tensor]:
        """What each receiver is [n B, H, N, width]. An MLP that is read is not frozen: it has a run of its own."""
        alone = [r for r in self.receivers if r.quantity == "mlp" and "mlp" in self.frozen]
        groups = [[r] for r in alone] + [[r for r in self.receivers if r not in alone]]
        result = {}
        for group in filter(None, groups):
            loose = group[0].layer if group[0] in alone else None
            sites = {(r.quantity, r.layer) for r in group}
            watch = [
                Observer("value", Site(q, layers=n, tower="text"), name=f"{q} {n}") for q, n in sorted(sites)
            ]
            _, attached = forward(self.model, texts, [*self.freeze(times, loose), *sent, *watch])
            for r in group:
                ((_, _, x),) = attached.records[f"{r.quantity} {r.layer}"]
                result[r] = by_head(r.quantity, x)
        return result

    def freeze(self, times: int, loose: int | None = None) -> list[Edit]:
        """Every head and MLP as it was on the clean prompt, but for the MLP of the layer `loose`."""
        every = lambda x: x.repeat(times, 1, 1, 1)  # noqa: E731
        return [
            Edit(Site(q, layers=layer, tower="text"), "replace", every(x) if q in HEADED else every(x)[:, 0])
            for q in self.frozen
            for layer, x in self.clean[q].items()
            if not (q == "mlp" and layer == loose)
        ]

    def sent(self, sender: Node, number: int) -> Edit:
        texts = texts_of(number, len(self.pairs))
        value = self.corrupt[sender.quantity][sender.layer][:, sender.head or 0]
        if self.rows is None:
            return at_site(sender.quantity, sender.layer, sender.head, value, texts=texts)
        width = value.shape[1]
        columns = sorted(r % width for r in self.rows)
        rows = tuple(c - width for c in columns)
        return at_site(sender.quantity, sender.layer, sender.head, value[:, columns], texts=texts, rows=rows)


def at_receiver(receiver: Node, x: Tensor) -> Edit:
    return at_site(receiver.quantity, receiver.layer, receiver.head, x[:, receiver.head or 0])


def as_grid(effects: Effects, model: PreTrainedModel) -> Tensor:
    """[layers, heads] mean effects of senders that are heads; NaN where a head was no sender."""
    layers, heads = layers_of(model), heads_at("z", model)
    grid = Grid("z", tuple(layers), heads)
    names = {str(Node("z", n, h)): i for i, (n, h, _) in enumerate(grid.sites())}
    result = torch.full((len(layers) * heads,), torch.nan)
    for name, value in zip(effects.coords["sender"], effects.mean.tolist(), strict=True):
        if name in names:
            result[names[name]] = value
    return result.view(len(layers), heads)
