"""The layers of a backbone: a mechanism or a block in each, one above the other."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from regard import catalog
from regard.core import Method, Unsupported
from regard.core.trees import tree_leaves
from regard.kinds.block import BlockPage, make_call
from regard.kinds.mechanism import Mechanism
from regard.nn.attention import Attention
from regard.nn.config import RegardConfig
from regard.nn.depth import DepthReads, depth_method, refilled
from regard.nn.layers import Learned, RMSNorm, SwiGLU
from regard.ops.packed import run_texts


class Stacked(NamedTuple):
    """hidden [B, N, C], the states of the layers, and, if asked for, [B, N, C] before each layer and at the end."""

    hidden: Tensor
    states: list[Any]
    between: tuple[Tensor, ...] | None


class BlockLayer(GradientCheckpointingLayer):
    """A block page as a layer: the page's own norms and residuals."""

    def __init__(self, config: RegardConfig, method: Method) -> None:
        super().__init__()
        self.method = method
        dims = {"width": config.hidden_size, "heads": config.num_attention_heads}
        self.params = Learned(method, dims)

    def forward(self, x: Tensor, mask: Tensor | None, state: Any, *_: None) -> tuple[Tensor, Any]:
        if x.shape[1] == 0:
            return x, state
        run = self.method.page.fast or self.method.page.reference
        key_mask = None if mask is None else mask[:, None]
        page, cfg = self.method.page, self.method.config
        call = make_call(page, cfg, x, self.params.tensors(), key_mask=key_mask, initial_state=state)
        return run(x, cfg, call)[:2]


class Layer(GradientCheckpointingLayer):
    """x + attention(norm x); in a decoder that asks an encoder x + cross(norm x, memory); x + SwiGLU(norm x)."""

    def __init__(self, config: RegardConfig, layer: int, pattern: str, which: str, cross: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        shared = dict(kv_heads=config.num_key_value_heads, head_dim=config.head_dim, v_head_dim=config.v_head_dim,
                      dropout=config.dropout)  # fmt: skip
        method = config.method(config.layer_names(which)[layer], layer)
        self.norm = RMSNorm(width)
        self.attention = Attention(
            width, config.num_attention_heads, method, pattern, rope_theta=config.rope_theta, conv=config.conv,
            **shared,
        )  # fmt: skip
        self.cross_norm = self.cross = None
        if cross:
            cross_method = config.method(config.layer_names("cross_mechanisms")[layer], layer)
            self.cross_norm = RMSNorm(width)
            self.cross = Attention(width, config.num_attention_heads, cross_method, "causal_cross", **shared)
        self.mlp_norm, self.mlp = (RMSNorm(width), SwiGLU(width, inner)) if inner else (None, None)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, state: Any, memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        mixed, state = self.attention(self.norm(x), mask=mask, initial_state=state)
        x = x + mixed
        if self.cross is not None:
            x = x + self.cross(self.cross_norm(x), memory, mask=memory_mask)[0]
        return (x if self.mlp is None else x + self.dropout(self.mlp(self.mlp_norm(x)))), state


class DepthLayer(Layer):
    """The same sublayers, each of which reads what `reads` makes of all outputs so far, in the place of their sum.

    x is what the first of them reads; what comes out is what the next layer reads, or the last norm. `carried` is the
    state along depth, its tensors beside it once more (refilled); `first` is the number of the read after attention.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None, state: Any, memory: Tensor | None, memory_mask: Tensor | None,
        reads: DepthReads, first: int, carried: Any, *leaves: Tensor,
    ) -> tuple:  # fmt: skip
        carried = refilled(carried, leaves)
        mixed, state = self.attention(self.norm(x), mask=mask, initial_state=state)
        x, carried = reads(first, mixed, carried)
        if self.cross is not None:
            mixed = self.cross(self.cross_norm(x), memory, mask=memory_mask)[0]
            x, carried = reads(first + 1, mixed, carried)
        if self.mlp is not None:
            mixed = self.dropout(self.mlp(self.mlp_norm(x)))
            x, carried = reads(first + self.sublayers - 1, mixed, carried)
        return x, state, carried, *tree_leaves(carried)

    @property
    def sublayers(self) -> int:
        return 1 + (self.cross is not None) + (self.mlp is not None)


class Stack(nn.Module):
    """Layers and a last norm: [B, N, C] -> Stacked. Residuals are sums, or reads along depth (config.residual)."""

    def __init__(
        self, config: RegardConfig, pattern: str, which: str = "mechanisms", cross: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        method = depth_method(config.residual, config.settings)
        for i, name in enumerate(config.layer_names(which)):
            page = catalog.get(name)
            if isinstance(page, BlockPage):
                if pattern not in page.patterns or cross:
                    raise Unsupported(
                        f"{name} is a block for {', '.join(page.patterns)}, not for {pattern} here"
                    )
                if config.dropout:
                    raise Unsupported(f"dropout={config.dropout}: {name} is a whole layer, and has none")
                if method is not None:
                    raise Unsupported(
                        f"residual={config.residual!r}: {name} is a whole layer, and adds its residuals itself"
                    )
                layers.append(BlockLayer(config, config.method(name, i)))
            elif isinstance(page, Mechanism):
                kind = Layer if method is None else DepthLayer
                layers.append(kind(config, i, pattern, which, cross))
            else:
                raise Unsupported(f"{name} is a {page.kind} page; a layer takes mechanisms and blocks")
        self.layers, self.norm = nn.ModuleList(layers), RMSNorm(config.hidden_size)
        self.reads = None
        if method is not None:
            count = 1 + sum(layer.sublayers for layer in layers)
            self.reads = DepthReads(method, config.hidden_size, count)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, states: list | None = None, memory: Tensor | None = None,
        memory_mask: Tensor | None = None, *, texts: list[int] | None = None, between: bool = False,
    ) -> Stacked:  # fmt: skip
        """texts: the lengths of the texts that the rows of x hold end to end, None where a row is one text."""
        if texts is not None:
            return self.packed(x, texts, between)
        states, ends, kept, along = states or [None] * len(self.layers), [], [], ()
        if self.reads is not None:
            x, carried = self.reads(0, x)
            along = (self.reads, 1, carried, *tree_leaves(carried))
        for layer, state in zip(self.layers, states, strict=True):
            kept += [x] if between else []
            # positional: what is checkpointed gets its gradients that way
            x, end, *above = layer(x, mask, state, memory, memory_mask, *along)
            along = (self.reads, along[1] + layer.sublayers, *above) if along else ()
            ends.append(end)
        x = self.norm(x)
        return Stacked(x, ends, (*kept, x) if between else None)

    def packed(self, x: Tensor, texts: list[int], between: bool) -> Stacked:
        """Every text by itself, texts of one length together; a state of all is not one of a row."""

        def run(text: Tensor, _: Any) -> tuple[tuple[Tensor, ...], None]:
            out = self(text, between=between)
            return (out.hidden, *(out.between or ())), None

        rows = x.flatten(0, 1)[None].split(texts, 1)
        apart = any(isinstance(part, Attention) and part.page.mixes_rows for part in self.modules())
        hidden, *kept = (t.view_as(x) for t in run_texts(run, rows, axis=1, apart=apart)[0])
        return Stacked(hidden, [None] * len(self.layers), tuple(kept) if between else None)
