"""What a backbone is made of, as a Hugging Face configuration."""

from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from regard import catalog
from regard.core import Method, require
from regard.core.deprecation import renamed


class RegardConfig(PretrainedConfig):
    """What a backbone is made of. `mechanisms` is a name or a list of one name per layer; `settings` {name: {...}}.

    conv: tokens of the short convolution on q, k and v; rope_theta: base of the rotary positions, 0 for none, None:
    as the mechanism needs; encoder_mechanisms and cross_mechanisms are those of an encoder-decoder; v_head_dim: width
    of a head's values, None: head_dim; dropout: share of what attention and channel mixer add, dropped in training;
    residual: "add", or "attention" or another mechanism along depth, through which sublayers read the outputs so far
    (docs/depth.md).
    """

    model_type = "regard"

    @renamed(rope="rope_theta")
    def __init__(
        self, vocab_size: int = 512, hidden_size: int = 64, num_hidden_layers: int = 2, num_attention_heads: int = 2,
        num_key_value_heads: int | None = None, head_dim: int | None = None, intermediate_size: int | None = None,
        mechanisms: str | list[str] = "softmax", settings: dict[str, dict] | None = None,
        encoder_mechanisms: str | list[str] | None = None, cross_mechanisms: str | list[str] | None = None,
        conv: int = 0, rope_theta: float | None = None, tie_word_embeddings: bool = True,
        initializer_range: float = 0.02, use_cache: bool = True, v_head_dim: int | None = None, dropout: float = 0.0,
        residual: str = "add", **kwargs: Any,
    ) -> None:  # fmt: skip
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = 3 * hidden_size if intermediate_size is None else intermediate_size
        self.mechanisms, self.settings = mechanisms, settings or {}
        self.encoder_mechanisms = encoder_mechanisms or mechanisms
        self.cross_mechanisms = cross_mechanisms or "softmax"
        self.conv, self.rope_theta = conv, rope_theta
        self.v_head_dim, self.dropout = v_head_dim or self.head_dim, dropout
        self.residual = residual
        self.initializer_range, self.use_cache = initializer_range, use_cache
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    def layer_names(self, which: str = "mechanisms") -> list[str]:
        """One name for every layer."""
        named = getattr(self, which)
        named = [named] * self.num_hidden_layers if isinstance(named, str) else list(named)
        require(len(named) == self.num_hidden_layers, f"{which} names one mechanism, or one for every layer",
                layers=self.num_hidden_layers, names=named)  # fmt: skip
        return named

    def method(self, name: str, layer: int) -> Method:
        """The configured page of a layer; pages that differ by depth are told `layer` and `layers`."""
        page = catalog.get(name)
        has = {f.name for f in fields(page.config)}
        depth = {"layer": layer, "layers": self.num_hidden_layers} if {"layer", "layers"} <= has else {}
        return catalog.method(name, **{**depth, **self.settings.get(name, {})})
