"""Residuals that are an attention over depth: what a sublayer reads of the outputs of the sublayers before it.

`residual` in a backbone's configuration names a mechanism page of the family depth; "attention" is attention_residuals.
The page is asked as `attend` asks it, with depth for its axis: keys and values are the embedding and the outputs of the
sublayers, queries are learned, one for each read, zero at the start; every token of every row is a row of the page's
batch. Each read hands one new output to the page and carries its state up, so nothing is computed again, a block form
stores sums of blocks only, and nothing goes from one token to the next.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from regard import catalog
from regard.core import Method, Unsupported, unknown
from regard.core.trees import tree_map
from regard.kinds.mechanism import Mechanism, run
from regard.nn.layers import Learned

SHORT = {"attention": "attention_residuals"}


def depth_method(residual: str, settings: dict[str, dict]) -> Method | None:
    """The configured page that `residual` names; None for "add"."""
    if residual == "add":
        return None
    name, known = SHORT.get(residual, residual), catalog.list_methods(kind="mechanism", family="depth")
    if name not in catalog.pages():
        raise unknown("residual", residual, ["add", *SHORT, *known])
    method = catalog.method(name, **settings.get(name, {}))
    # a page of one's own lies in no family
    if not isinstance(method.page, Mechanism) or catalog.family_of(name) not in ("depth", ""):
        raise Unsupported(
            f"residual={residual!r} is no mechanism along depth; known: add, {', '.join(known)}"
        )
    if "causal_self" not in method.page.patterns or method.page.roles:
        raise Unsupported(f"residual={residual!r}: a residual is causal_self along depth, and has no roles")
    return method


class DepthReads(nn.Module):
    """The reads of a stack, from the embedding up to the one before its last norm, with all that they learn.

    queries [R, C], one for each read; params are the page's own, shared by all of them.
    """

    def __init__(self, method: Method, width: int, reads: int) -> None:
        super().__init__()
        self.method = method
        self.queries = nn.Parameter(torch.zeros(reads, width))
        dims = {"heads": 1, "kv_heads": 1, "key": width, "value": width, "width": width}
        self.params = Learned(method, dims)

    def forward(self, read: int, output: Tensor, carried: Any = None) -> tuple[Tensor, Any]:
        """(what the read of this number gives [B, N, C], the state above) after one more output [B, N, C]."""
        # as wide as what is learned, so that autocast does not narrow the stream
        source = output.to(self.queries.dtype).reshape(-1, 1, 1, output.shape[-1])
        query = self.queries[read].expand_as(source)
        x = source[:, 0] if self.method.page.reads_x(self.method.config) else None
        mixed, carried, _ = run(
            self.method, query, source, source, initial_state=carried, x=x, params=self.params.tensors()
        )
        return mixed.view_as(output), carried


def draw_queries(module: nn.Module) -> None:
    """Queries of zero, where a checkpoint lacks them."""
    if isinstance(module, DepthReads):
        initialization.zeros_(module.queries)


def refilled(tree: Any, leaves: tuple[Tensor, ...]) -> Any:
    """A tree of this form with these tensors: what is checkpointed gets its gradients of tensors that stand alone."""
    left = iter(leaves)
    return tree_map(lambda _: next(left), tree)
