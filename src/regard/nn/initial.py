"""Initial values of a backbone's weights, drawn anew where a checkpoint lacks them."""

from torch import nn
from transformers import initialization

from regard.nn.layers import Learned, RMSNorm, ShortConvolution


def draw_projections(module: nn.Module, width: float) -> None:
    """Linear maps and embeddings: normal, of this width; biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        initialization.normal_(module.weight, 0.0, width)
        if getattr(module, "bias", None) is not None:
            initialization.zeros_(module.bias)


def draw_parts(module: nn.Module) -> None:
    """What layers drew when they were made, for a model that was made without memory of its own (from_pretrained)."""
    if isinstance(module, RMSNorm):
        initialization.ones_(module.weight)
    elif isinstance(module, ShortConvolution):
        initialization.uniform_(module.weight, -(module.kernel**-0.5), module.kernel**-0.5)
    elif isinstance(module, Learned):
        for name, value in module.drawn().items():
            initialization.copy_(module[name], value)
