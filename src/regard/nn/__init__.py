"""Attention of the catalogue as modules: `Attention(dim, heads, mechanism=...)`, and small backbones that take any.

>>> import torch
>>> layer = Attention(16, 2, mechanism="linear_attention")
>>> out, state = layer(torch.randn(1, 5, 16))
>>> step, state = layer(torch.randn(1, 1, 16), initial_state=state)  # one more token
>>> out.shape, step.shape
(torch.Size([1, 5, 16]), torch.Size([1, 1, 16]))
"""

from typing import Any

from regard.nn.attention import Attention, LayerState

__all__ = [
    "Attention",
    "LayerState",
    "RegardConfig",
    "RegardForCausalLM",
    "RegardForMaskedLM",
    "RegardForSeq2SeqLM",
    "VisionBackbone",
    "VisionConfig",
    "register",
]


def __getattr__(name: str) -> Any:
    """The backbones are Hugging Face models: transformers is imported when one of them is asked for."""
    if name in ("VisionBackbone", "VisionConfig"):
        from regard.nn import vision

        return getattr(vision, name)
    if name in __all__:
        from regard.nn import backbones

        return getattr(backbones, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
