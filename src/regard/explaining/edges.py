"""Edge attribution: what each sender does to the metric through each receiver's input, for all edges at once.

    effect(u -> v) ≈ (u(clean) - u(corrupt)) · ∂m/∂(input of v)        at the corrupted prompt; exact where m is linear

Senders are the embeddings, every head (what its output adds to the residual) and every MLP; receivers are the queries
of every head, the keys and values of every head of the cache, every MLP, and the logits. One forward on each prompt and
one backward give the gradients at q, k, v and MLPs; each is taken back to the residual, each head's z forward to it,
through the model's own modules: grouped heads, norms after a sublayer, parallel blocks need nothing of their own.
With `steps`: gradients along the line between both prompts' embeddings (EAP-IG, "Have Faith in Faithfulness", 2024).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.attaching.anatomy import anatomy
from regard.core import require
from regard.core.errors import present
from regard.explaining.attribution import forward_only, line_between
from regard.explaining.batches import Progress, in_groups, refuse_constant, texts_at_once
from regard.explaining.effects import Effects
from regard.explaining.pairs import Pairs
from regard.explaining.patching import Direction
from regard.explaining.paths import LOGITS, Node, comes_before
from regard.explaining.runs import embedded, forward, frozen, heads_at, layers_of, observers

EMBEDDINGS = Node("resid_pre", 0)
SEEN = ("resid_pre", "q", "k", "v", "z", "out", "resid_mid", "mlp", "resid_post")
ROOM = 2 * 2**30  # bytes that the residuals of senders and receivers of one group may take


def edge_senders(model: PreTrainedModel) -> list[Node]:
    heads = [Node("z", n, h) for n in layers_of(model) for h in range(heads_at("z", model))]
    return [EMBEDDINGS, *heads, *(Node("mlp", layer.number) for layer in anatomy(model))]


def edge_receivers(model: PreTrainedModel) -> list[Node]:
    heads = [
        Node(q, n, h) for n in layers_of(model) for q in ("q", "k", "v") for h in range(heads_at(q, model))
    ]
    return [*heads, *(Node("mlp", layer.number) for layer in anatomy(model)), LOGITS]


def edges(
    model: PreTrainedModel,
    pairs: Pairs,
    *,
    steps: int = 0,
    direction: Direction = "denoise",
    batch: int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Effects [pairs, sender, receiver]; NaN where a sender does not come before a receiver. `exact` is False.

    Verify what matters with `path_patch`. Raises ValueError for pairs whose residuals do not fit, and as `patch` does.
    """
    sign = 1.0
    if direction == "noise":
        pairs, sign = pairs.swapped(), -1.0
    require(pairs.align is None, "edges are of prompts that are equally long")
    pairs, senders, receivers = pairs.to(model.device), edge_senders(model), edge_receivers(model)
    size = group_size(model, pairs, len(senders) + 1, batch)
    parts, spans, groups = [], [], in_groups(len(pairs), size)
    for done, group in enumerate(groups):
        part = pairs.at(group)
        parts.append(edges_of(model, part, senders, receivers, steps))
        clean, corrupt = (part.score(forward_only(model, b)) for b in (part.clean, part.corrupt))
        spans.append((clean - corrupt).double().cpu())
        if progress is not None:
            progress(done + 1, len(groups))
    span = torch.cat(spans) * sign
    refuse_constant(span)
    values = torch.cat(parts).double().cpu() * sign
    values[:, ~before(model, senders, receivers)] = torch.nan
    names = {"sender": [*map(str, senders)], "receiver": [*map(str, receivers)]}
    settings = {"method": "edge attribution", "direction": direction, "steps": steps}
    return Effects(
        values, ("sender", "receiver"), names, span, torch.zeros(values.shape[1:], dtype=torch.bool), settings
    )


def before(model: PreTrainedModel, senders: Sequence[Node], receivers: Sequence[Node]) -> Tensor:
    """[senders, receivers] bool: whether there is an edge."""
    there = lambda s, r: s is EMBEDDINGS or comes_before(model, s, r)  # noqa: E731
    return torch.tensor([[there(s, r) for r in receivers] for s in senders])


def group_size(model: PreTrainedModel, pairs: Pairs, senders: int, batch: int | None) -> int:
    """Pairs whose senders' residuals fit."""
    one = bytes_of_one(model, pairs, senders)
    rule = "the residuals of all senders of one pair fit in 2 GiB: shorter prompts"
    require(one <= ROOM, rule, tokens=pairs.clean.ids.shape[1], senders=senders, bytes=one)
    return min(texts_at_once(pairs, batch), ROOM // one)


def bytes_of_one(model: PreTrainedModel, pairs: Pairs, senders: int) -> int:
    """What the residuals of the senders of one pair take."""
    return senders * pairs.clean.ids.shape[1] * model.config.get_text_config().hidden_size * 4


def edges_fit(model: PreTrainedModel, pairs: Pairs) -> bool:
    return bytes_of_one(model, pairs, len(edge_senders(model)) + 1) <= ROOM


def edges_of(
    model: PreTrainedModel, pairs: Pairs, senders: Sequence[Node], receivers: Sequence[Node], steps: int
) -> Tensor:
    """[pairs, senders, receivers] of one group."""
    clean, base = (recorded(model, pairs, side) for side in (pairs.clean, pairs.corrupt))
    sent = torch.stack([sent_by(s, clean, base) for s in senders])  # [U, B, N, width]
    total = torch.zeros(len(pairs), len(senders), len(receivers), dtype=sent.dtype)
    for given, weight in line_between(model, pairs, steps):
        run = base if given is None else recorded(model, pairs, pairs.corrupt, given)
        for i, wanted in enumerate(taken_by(model, run, receivers)):
            total[:, :, i] += weight * torch.einsum("ubnd,bnd->bu", sent, wanted).cpu()
    return total


@dataclass(frozen=True)
class Recorded:
    """A forward in the graph of autograd: values by quantity and layer, and the metric's gradients at some of them."""

    values: dict[str, dict[int, Tensor]]
    gradients: dict[tuple[str, int], Tensor]
    sequential: Sequence[bool]


def recorded(model: PreTrainedModel, pairs: Pairs, side: object, given: Tensor | None = None) -> Recorded:
    parts = anatomy(model)
    sequential = [layer.sequential for layer in parts]
    seen = [q for q in SEEN if q != "resid_mid" or any(sequential)]
    with torch.enable_grad(), frozen(model), embedded(model, given):
        logits, attached = forward(model, side, watched(seen, sequential))  # type: ignore[arg-type]
        values = {q: {n: x for n, _, x in attached.records[q]} for q in seen}
        ends = [("mlp", layer.number) for layer in parts] + [("resid_post", len(parts) - 1)]
        ends += [(q, n) for q in ("q", "k", "v") for n in values["q"]]
        grads = torch.autograd.grad(
            pairs.score(logits).sum(), [values[q][n] for q, n in ends], retain_graph=True
        )
    return Recorded(values, dict(zip(ends, grads, strict=True)), sequential)


def watched(seen: Sequence[str], sequential: Sequence[bool]) -> list:
    """Observers of all layers; of the residual between two sublayers where they follow each other."""
    middle = [n for n, s in enumerate(sequential) if s]
    others = observers([q for q in seen if q != "resid_mid"], live=True)
    return [*others, *(observers(["resid_mid"], middle, live=True) if "resid_mid" in seen else [])]


def sent_by(sender: Node, clean: Recorded, base: Recorded) -> Tensor:
    """[B, N, width] what the sender adds to the residual on the clean prompt, less what it adds on the corrupted."""
    change = clean.values[sender.quantity][sender.layer] - base.values[sender.quantity][sender.layer]
    change = change.detach()
    if sender.quantity != "z":
        return change
    alone = torch.zeros_like(change)
    alone[:, sender.head] = change[:, sender.head]
    return pushed(base.values["out"][sender.layer], base.values["z"][sender.layer], alone)


def pushed(out: Tensor, z: Tensor, change: Tensor) -> Tensor:
    """The derivative of out along a change of z: two backward passes over what lies between them."""
    u = torch.zeros_like(out, requires_grad=True)
    with torch.enable_grad():
        (back,) = torch.autograd.grad(out, z, u, create_graph=True)
        (forth,) = torch.autograd.grad(back, u, change, retain_graph=True)
    return forth.detach()


def taken_by(model: PreTrainedModel, run: Recorded, receivers: Sequence[Node]) -> Iterator[Tensor]:
    """[B, N, width] the metric's gradient at the residual through each receiver's input alone."""
    for r in receivers:
        if r.quantity == "logits":
            last = max(n for q, n in run.gradients if q == "resid_post")
            yield run.gradients["resid_post", last]
            continue
        end, gradient = run.values[r.quantity][r.layer], run.gradients[r.quantity, r.layer]
        if r.head is not None:
            alone = torch.zeros_like(gradient)
            alone[:, r.head] = gradient[:, r.head]
            gradient = alone
        middle = r.quantity == "mlp" and run.sequential[r.layer]
        start = run.values["resid_mid" if middle else "resid_pre"][r.layer]
        (taken,) = torch.autograd.grad(end, start, gradient, retain_graph=True)
        yield taken


def top_edges(effects: Effects, k: int) -> list[tuple[str, str, float]]:
    """(sender, receiver, mean effect) of the k largest."""
    mean = effects.mean.nan_to_num(0.0)
    order = mean.abs().flatten().argsort(descending=True, stable=True)[:k].tolist()
    return [(*effects.coordinates(i), float(mean.flatten()[i])) for i in order]


def as_graph(model: PreTrainedModel, effects: Effects, k: int) -> dict[str, Any]:
    """The k largest edges, the nodes that they join and how many edges there are, as data for a drawing."""
    grouped = heads_at("k", model) != heads_at("z", model)
    ids = [(node_id(s, grouped), node_id(r, grouped), v) for s, r, v in top_edges(effects, k)]
    names = {name.split(".")[0] for s, r, _ in ids for name in (s, r)}
    nodes = [drawn_node(n, len(anatomy(model))) for n in sorted(names)]
    drawn = [{"from": s, "to": r, "score": v} for s, r, v in ids]
    return {"nodes": nodes, "edges": drawn, "of": int(effects.mean.isfinite().sum())}


def node_id(name: str, grouped: bool) -> str:
    """ "layer 1 q head 2" -> "L1H2.q"; of grouped heads "layer 1 k head 2" -> "L1KV2.k": heads of the cache."""
    words = name.split()
    if words == ["logits"] or words[2] == "resid_pre":
        return "logits" if words == ["logits"] else "embedding"
    if words[2] == "mlp":
        return f"L{words[1]}MLP"
    kind = "KV" if grouped and words[2] in ("k", "v") else "H"
    return f"L{words[1]}{kind}{words[4]}" + ("" if words[2] == "z" else f".{words[2]}")


def drawn_node(name: str, layers: int) -> dict[str, Any]:
    if name in ("embedding", "logits"):
        return {"id": name, "layer": -1 if name == "embedding" else layers, "kind": name}
    layer = present(re.match(r"L(\d+)", name), "a node has a layer")
    return {"id": name, "layer": int(layer[1]), "kind": "mlp" if name.endswith("MLP") else "head"}
