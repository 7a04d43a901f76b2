"""Why a head attends: the score of a query and a key, split over what wrote the query and what wrote the key.

    s(i, j) = q_i · k_j / √D = Σ_a Σ_b  q_i[a] · k_j[b] / √D          a, b: embeddings, heads and MLPs of earlier layers

The residual is a sum, and with the scale of its norm held (as it was) a query is linear in it: so are rotations and
norms of queries. A part is taken through the model's own modules as a derivative, whatever the family; what the parts
leave, such as biases, stands in the row as "rest". Shares are of the score of that pair less the mean score of the row,
since a softmax sees differences alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.anatomy import anatomy
from regard.core import Observer, Site, Unsupported, require
from regard.explaining.edges import pushed
from regard.explaining.pairs import Batch
from regard.explaining.paths import Node
from regard.explaining.runs import embedded, forward, frozen, heads_at, layers_of, observers

NEAR = 1e-3  # of the largest number of a norm's output, to which its own formula is met


@dataclass(frozen=True)
class Why:
    """Shares of a head's score at (query, key): [query parts, key parts], by name."""

    layer: int
    head: int
    query: int
    key: int
    parts: tuple[str, ...]
    shares: Tensor
    score: float

    def top(self, k: int) -> list[dict[str, Any]]:
        order = self.shares.abs().flatten().argsort(descending=True)[:k].tolist()
        n = len(self.parts)
        return [
            {
                "query_part": self.parts[i // n],
                "key_part": self.parts[i % n],
                "share": float(self.shares.flatten()[i]),
            }
            for i in order
        ]


def why(
    model: PreTrainedModel, batch: Batch, layer: int, head: int, query: int = -1, key: int | None = None
) -> Why:
    """The split of the score of one query and the key that it attends to most, or `key`, in one prompt.

    Raises Unsupported for a norm of unknown form, and ValueError for more prompts than one.
    """
    require(len(batch) == 1, "one prompt at a time", prompts=len(batch))
    names, parts, q, k, group, pre, scale = written(model, batch, layer, head)
    scores = (q[:, head, query] @ k[0, group].T)[0] * scale  # [N]
    seen = scores.detach()[: query % len(scores) + 1]
    key = int(seen[1:].argmax()) + 1 if key is None and len(seen) > 1 else int(key or 0)
    by_query = derived(q[:, head, query], pre, parts, query)  # [parts, D]
    by_key = derived(k[:, group, key], pre, parts, key) - mean_of(k, pre, parts, group, len(seen))
    whole_q, whole_k = (
        q[0, head, query].detach(),
        k[0, group, key].detach() - k[0, group, : len(seen)].mean(0).detach(),
    )
    rest_q, rest_k = whole_q - by_query.sum(0), whole_k - by_key.sum(0)
    table = torch.cat([by_query, rest_q[None]]) @ torch.cat([by_key, rest_k[None]]).T * scale
    score = float(whole_q @ whole_k * scale)
    return Why(layer, head, query, key, (*names, "rest"), table / score, score)


def written(model: PreTrainedModel, batch: Batch, layer: int, head: int) -> tuple:
    """Names and values of what the residual before a layer is made of, and the queries and keys that it becomes."""
    rule = "a head of this model"
    require(layer in layers_of(model) and 0 <= head < heads_at("z", model), rule, layer=layer, head=head)
    earlier = [n for n in layers_of(model) if n < layer]
    at = [("q", layer), ("k", layer), ("resid_pre", 0), ("resid_pre", layer)]
    watch = [Observer("value", Site(q, layers=n, tower="text"), name=f"{q}{n}", live=True) for q, n in at]
    watch += observers(["z", "out", "mlp"], range(layer), live=True) if layer else []
    with torch.enable_grad(), frozen(model), embedded(model), linear_norms(model):
        _, attached = forward(model, batch, unique(watch))
    records = attached.records
    q, k = records[f"q{layer}"][0][2], records[f"k{layer}"][0][2]
    pre = records[f"resid_pre{layer}"][0][2]
    names, parts = ["embedding"], [records["resid_pre0"][0][2].detach()]
    out, mlp = ({n: x for n, _, x in records.get(name, [])} for name in ("out", "mlp"))
    for n, _, z in records.get("z", []):
        for h in range(z.shape[1]):
            alone = torch.zeros_like(z)
            alone[:, h] = z[:, h].detach()
            names.append(str(Node("z", n, h)).replace(" z", ""))
            parts.append(pushed(out[n], z, alone))
    names += [f"layer {n} mlp" for n in mlp]
    parts += [x.detach() for x in mlp.values()]
    # layers of a hybrid that have no attention are one part each
    names += [f"layer {n} mixer" for n in out if n not in earlier]
    parts += [x.detach() for n, x in out.items() if n not in earlier]
    group = head // (q.shape[1] // k.shape[1])
    scale = getattr(anatomy(model)[layer].attention, "scaling", None) or q.shape[-1] ** -0.5
    return names, parts, q, k, group, pre, float(scale)


def unique(watch: Sequence[Observer]) -> list[Observer]:
    return list({o.name: o for o in watch}.values())


def derived(x: Tensor, pre: Tensor, parts: Sequence[Tensor], token: int) -> Tensor:
    """[parts, D] what each part of the residual of a token contributes to x [1, D], a linear map of that residual."""
    rows = []
    for i in range(x.shape[-1]):
        (g,) = torch.autograd.grad(x[0, i], pre, retain_graph=True)
        rows.append(g[0, token])
    jacobian = torch.stack(rows)  # [D, width]
    return torch.stack([p[0, token] for p in parts]) @ jacobian.T


def mean_of(k: Tensor, pre: Tensor, parts: Sequence[Tensor], group: int, n: int) -> Tensor:
    """[parts, D] the mean over the first n keys of what each part contributes."""
    rows = []
    for i in range(k.shape[-1]):
        (g,) = torch.autograd.grad(k[0, group, :n, i].mean(), pre, retain_graph=True)
        rows.append(torch.stack([(p[0] * g[0]).sum() for p in parts]))
    return torch.stack(rows, 1)


@contextmanager
def linear_norms(model: PreTrainedModel) -> Iterator[None]:
    """Norms keep their values, and are linear to autograd: the length that they divide by is held as it is."""
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and not list(m.children())]
    hooks = [m.register_forward_hook(held) for m in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def held(module: nn.Module, args: tuple, y: Any) -> Any:
    """The hook: y as a linear function of the input, proven on the values at hand."""
    x = args[0]
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise Unsupported(f"{type(module).__name__}: a norm of another form, whose scale cannot be held")
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((float(getattr(module, n)) for n in ("eps", "variance_epsilon") if hasattr(module, n)), 1e-6)
    factors = [1.0] if weight is None else [weight, 1 + weight]
    for centred in (False, True):
        wide = x.float() if x.dtype != torch.float64 else x
        inner = wide - wide.mean(-1, keepdim=True) if centred else wide
        unit = inner * (inner.square().mean(-1, keepdim=True) + eps).rsqrt().detach()
        for factor in factors:
            linear = unit * factor if bias is None else unit * factor + bias
            if float((linear - y).detach().abs().max()) <= NEAR * float(y.detach().abs().max()) + 1e-6:
                return linear.to(y.dtype)
    raise Unsupported(
        f"{type(module).__name__}: neither a norm by length nor by deviation: its scale cannot be held"
    )
