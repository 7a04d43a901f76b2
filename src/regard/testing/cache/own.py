"""The oracle of a page with an attention of its own: its reference, asked for each row's whole text as it is.

The page acts step by step on a ledger, on padded batches. Its reference is asked for one row without padding, all
queries at once, on the keys of transformers' own full cache; the rows of this forward go on through the model.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from regard.core import Method
from regard.core.errors import present
from regard.ops import View, lower_right, parse_budget


@dataclass
class OwnAttention:
    """What a model's attention answers under the page's reference; `real` [B, seen] is set before each forward."""

    method: Method
    rotate: Callable[[int, Tensor, Tensor], Tensor]  # (layer, x [b, h, m, D], by [b, h, m]) -> x
    real: Tensor | None = None
    queries: dict[int, Tensor] = field(default_factory=dict)  # by layer: [B, H, seen, D]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, plain: Tensor, **options: Any
    ) -> Tensor:
        """[B, H, N, E]: `plain`, what the model itself answers, with the rows of the text that the page answers.

        A layer whose own window has left a token of the row behind (`seen` [B, H, N, n]) stays as it is.
        """
        self.queries[layer] = torch.cat([self.queries.get(layer, q[:, :, :0]), q], 2)
        out, start = plain.clone(), k.shape[2] - q.shape[2]
        for b, real in enumerate(present(self.real, "the padding of this forward is known")):
            text = real.nonzero()[:, 0]
            new = text[text >= start] - start
            if len(new) == 0 or not bool(seen[b, 0, new[-1], text].all()):
                continue
            alone = [x[b : b + 1, :, text] for x in (self.queries[layer], k, v)]
            view = self.text(layer, alone, len(new), options)
            answered = reference_of(self.method)(view, self.method.config)
            out[b, :, new] = answered[0, :, len(text) - len(new) :].to(out.dtype)
        return out

    def text(self, layer: int, alone: list[Tensor], fed: int, options: dict) -> View:
        """One row's whole text, its q, k and v, as a view: every token is a query, `fed` of them of this forward."""
        (q, k, v), cfg = alone, self.method.config
        n = k.shape[2]
        budget = parse_budget(self.method.page.budget(cfg) if cfg.budget is None else cfg.budget)
        sees = lower_right(n, n)
        return View(
            q=q.float(), k=k.float(), v=v.float(), index=torch.arange(n)[None, None], real=None, seen=n, fed=fed,
            scale=options["scaling"], budget=budget.resolve(torch.tensor([n]), 1), groups=k.shape[1], layer=layer,
            softcap=options.get("softcap"), sinks=options.get("s_aux"), causal_order=True,
            visible=lambda rows: sees[rows][None, None],
            rotate=lambda x, by: self.rotate(layer, x, by),
        )  # fmt: skip


def reference_of(method: Method) -> Callable:
    """The page's reference, or the function that "module:function" names."""
    rule = (
        "a page with an attention of its own gives a reference, the same written out (see regard.kinds.cache)"
    )
    reference = present(method.page.reference, rule, page=method.name)
    if isinstance(reference, str):
        module, name = reference.split(":")
        reference = getattr(import_module(module), name)
    return reference


def probed(method: Method, now: dict[int, Tensor]) -> Method:
    """The method, asked again at each step of decoding with one value changed at a time.

    `now` gets, by layer, which stored tokens [B, H, n] move the output of each head: those that it reads.
    """
    page = method.page

    def attention(view: View, cfg: Any) -> Tensor | None:
        before = deepcopy(view.memory)
        out = page.attention(view, cfg)
        if out is None or view.new > 1:
            return out
        read = []
        for j in range(view.stored):
            v = view.v.clone()
            v[:, :, j] += 1
            other = replace(view, v=v, memory=deepcopy(before), report_bytes=lambda n: None)
            read.append((page.attention(other, cfg) != out)[:, :, 0].any(-1))
        now[view.layer] = torch.stack(read, -1)
        return out

    return replace(method, page=replace(page, attention=attention))


def in_tokens(method: Method) -> Method:
    """The method with a budget that stays the same while the text grows."""
    budget = getattr(method.config, "budget", None)
    fixed = budget is None or parse_budget(budget).tokens is not None
    return method if fixed else method.with_settings(budget=8)
