"""Small backbones around any mechanism, as Hugging Face models: from_pretrained, save_pretrained, generate.

    decoder           RegardForCausalLM     causal_self layers
    encoder           RegardForMaskedLM     self layers
    encoder-decoder   RegardForSeq2SeqLM    self layers; then causal_self layers that ask the encoder (causal_cross)

A layer is x + attention(norm x), then x + SwiGLU(norm x) unless intermediate_size is 0. `mechanisms` names one
mechanism, or one for every layer (a hybrid); a block page in the list is a whole layer by itself.

>>> config = RegardConfig(vocab_size=32, hidden_size=16, mechanisms=["softmax", "linear_attention"])
>>> model = RegardForCausalLM(config).eval()
>>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
torch.Size([1, 7])
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
)

from regard import catalog
from regard.core import BlockPage, Mechanism, Method, Unsupported, require
from regard.nn.attention import Attention, picked, size_of
from regard.nn.layers import RMSNorm, SwiGLU
from regard.ops.states import mapped


class RegardConfig(PretrainedConfig):
    """What a backbone is made of. `mechanisms` is a name or a list of one name per layer; `settings` {name: {...}}.

    conv: tokens of the short convolution on q, k and v; rope: base of the rotary positions, 0 for none, None: as the
    mechanism needs; encoder_mechanisms and cross_mechanisms are those of an encoder-decoder.
    """

    model_type = "regard"

    def __init__(
        self, vocab_size: int = 512, hidden_size: int = 64, num_hidden_layers: int = 2, num_attention_heads: int = 2,
        num_key_value_heads: int | None = None, head_dim: int | None = None, intermediate_size: int | None = None,
        mechanisms: str | list[str] = "softmax", settings: dict[str, dict] | None = None,
        encoder_mechanisms: str | list[str] | None = None, cross_mechanisms: str | list[str] | None = None,
        conv: int = 0, rope: float | None = None, tie_word_embeddings: bool = True, initializer_range: float = 0.02,
        use_cache: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = 3 * hidden_size if intermediate_size is None else intermediate_size
        self.mechanisms, self.settings = mechanisms, settings or {}
        self.encoder_mechanisms = encoder_mechanisms or mechanisms
        self.cross_mechanisms = cross_mechanisms or "softmax"
        self.conv, self.rope = conv, rope
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


class StateCache(Cache):
    """The states of all layers, whatever their mechanisms keep; what `past_key_values` is in these models."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[Any] = []
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states = [picked(state, beam_idx) for state in self.states]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = [repeated(state, repeats) for state in self.states]

    def crop(self, max_length: int) -> None:
        raise Unsupported("a state of fixed size cannot forget its last tokens: no assisted generation here")

    def nbytes(self) -> int:
        return size_of(tuple(self.states))


def repeated(state: Any, repeats: int) -> Any:
    return mapped(lambda t: t.repeat_interleave(repeats, dim=0), state)


class BlockLayer(nn.Module):
    """A block page as a layer: the page's own norms and residuals."""

    def __init__(self, config: RegardConfig, method: Method, layer: int) -> None:
        super().__init__()
        self.method, self.depth = method, {"layer": layer, "layers": config.num_hidden_layers}
        dims = {"width": config.hidden_size, "heads": config.num_attention_heads}
        made = method.page.init(method.config, dims, **self.depth)
        self.params = nn.ParameterDict({n: nn.Parameter(p, p.is_floating_point()) for n, p in made.items()})

    def forward(self, x: Tensor, mask: Tensor | None, state: Any, **_: Any) -> tuple[Tensor, Any]:
        run = self.method.page.fast or self.method.page.reference
        return run(x, self.method.config, params=dict(self.params), mask=mask, state=state, **self.depth)[:2]


class Layer(nn.Module):
    """x + attention(norm x); in a decoder that asks an encoder x + cross(norm x, memory); x + SwiGLU(norm x)."""

    def __init__(self, config: RegardConfig, layer: int, pattern: str, which: str, cross: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        told = dict(kv_heads=config.num_key_value_heads, head_dim=config.head_dim)
        method = config.method(config.layer_names(which)[layer], layer)
        self.norm, self.attention = (
            RMSNorm(width),
            Attention(
                width, config.num_attention_heads, method, pattern, rope=config.rope, conv=config.conv, **told
            ),
        )
        self.cross_norm = self.cross = None
        if cross:
            asks = config.method(config.layer_names("cross_mechanisms")[layer], layer)
            self.cross_norm = RMSNorm(width)
            self.cross = Attention(width, config.num_attention_heads, asks, "causal_cross", **told)
        self.mlp_norm, self.mlp = (RMSNorm(width), SwiGLU(width, inner)) if inner else (None, None)

    def forward(
        self, x: Tensor, mask: Tensor | None, state: Any, memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        mixed, state = self.attention(self.norm(x), mask=mask, state=state)
        x = x + mixed
        if self.cross is not None:
            x = x + self.cross(self.cross_norm(x), memory, mask=memory_mask)[0]
        return (x if self.mlp is None else x + self.mlp(self.mlp_norm(x))), state


class Stack(nn.Module):
    """Layers and a last norm: [B, N, C] -> ([B, N, C], states)."""

    def __init__(
        self, config: RegardConfig, pattern: str, which: str = "mechanisms", cross: bool = False
    ) -> None:
        super().__init__()
        made = []
        for i, name in enumerate(config.layer_names(which)):
            page = catalog.get(name)
            if isinstance(page, BlockPage):
                if pattern not in page.patterns or cross:
                    raise Unsupported(
                        f"{name} is a block for {', '.join(page.patterns)}, not for {pattern} here"
                    )
                made.append(BlockLayer(config, config.method(name, i), i))
            elif isinstance(page, Mechanism):
                made.append(Layer(config, i, pattern, which, cross))
            else:
                raise Unsupported(f"{name} is a {page.kind} page; a layer takes mechanisms and blocks")
        self.layers, self.norm = nn.ModuleList(made), RMSNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, states: list | None = None, **memory: Any):
        states, ends = states or [None] * len(self.layers), []
        for layer, state in zip(self.layers, states, strict=True):
            x, end = layer(x, mask, state, **memory)
            ends.append(end)
        return self.norm(x), ends


class RegardModel(PreTrainedModel):
    """What the three have in common."""

    config_class = RegardConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Layer", "BlockLayer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}  # noqa: RUF012

    def __init__(self, config: RegardConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *_: Any, **__: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise Unsupported(f"cache_implementation={generation_config.cache_implementation!r}: these models keep "
                              "the states of their mechanisms")  # fmt: skip
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache()

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        require((input_ids is None) != (inputs_embeds is None), "either input_ids or inputs_embeds",
                input_ids=input_ids, inputs_embeds=inputs_embeds)  # fmt: skip
        return self.embed(input_ids) if inputs_embeds is None else inputs_embeds


def padding(mask: Tensor | None, new: int) -> Tensor | None:
    """[B, new] bool of a Hugging Face mask [B, past + new], or None where all are tokens."""
    if mask is None:
        return None
    require(mask.dim() == 2, "attention_mask is [B, tokens], 1 for a token and 0 for padding", mask=mask)
    there = mask[:, -new:].bool()
    return None if not torch.compiler.is_compiling() and bool(there.all()) else there


def run_decoder(stack: Stack, x: Tensor, mask: Tensor | None, cache: Any, use_cache: bool, **memory: Any):
    """(hidden, cache): a step of a causal stack with the states of a StateCache."""
    require(cache is None or isinstance(cache, StateCache), "past_key_values is a StateCache, or None",
            past_key_values=type(cache).__name__)  # fmt: skip
    x, states = stack(x, padding(mask, x.shape[1]), cache.states if cache is not None else None, **memory)
    if not use_cache:
        return x, None
    silent = [i for i, state in enumerate(states) if state is None]
    require(
        not silent, "every layer gives a state; use_cache=False for mechanisms that have none", layers=silent
    )
    cache = StateCache() if cache is None else cache
    cache.states, cache.seen = states, cache.seen + x.shape[1]
    return x, cache


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token; labels of -100 are left out."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def tail(x: Tensor, keep: int | Tensor) -> Tensor:
    return (
        x[:, slice(-keep, None) if isinstance(keep, int) else keep]
        if not isinstance(keep, int) or keep
        else x
    )


class RegardForCausalLM(RegardModel, GenerationMixin):
    """A decoder: input_ids [B, N] -> logits [B, N, vocab]."""

    def __init__(self, config: RegardConfig) -> None:
        super().__init__(config)
        self.model = Stack(config, "causal_self")
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        x = self.embedded(input_ids, inputs_embeds)
        x, cache = run_decoder(self.model, x, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(tail(x, logits_to_keep))
        loss = None if labels is None else shifted_loss(logits, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


class RegardForMaskedLM(RegardModel):
    """An encoder: input_ids [B, N] -> logits [B, N, vocab]; labels of -100 are left out, no shift."""

    def __init__(self, config: RegardConfig) -> None:
        super().__init__(config)
        self.model = Stack(config, "self")
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any,
    ) -> MaskedLMOutput:  # fmt: skip
        x = self.embedded(input_ids, inputs_embeds)
        logits = self.lm_head(self.model(x, padding(attention_mask, x.shape[1]))[0])
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class Encoder(nn.Module):
    """The encoder of an encoder-decoder, as generate calls it."""

    main_input_name = "input_ids"

    def __init__(self, config: RegardConfig, embed: nn.Embedding) -> None:
        super().__init__()
        self.stack, self.embedding = (
            Stack(config, "self", "encoder_mechanisms"),
            [embed],
        )  # a list: not its own

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                inputs_embeds: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:  # fmt: skip
        x = self.embedding[0](input_ids) if inputs_embeds is None else inputs_embeds
        return BaseModelOutput(last_hidden_state=self.stack(x, padding(attention_mask, x.shape[1]))[0])


class RegardForSeq2SeqLM(RegardModel, GenerationMixin):
    """An encoder-decoder: input_ids [B, M] and decoder_input_ids [B, N] -> logits [B, N, vocab].

    labels [B, N] stand under the decoder's own tokens: label i is what should follow decoder_input_ids[:, : i + 1].
    """

    def __init__(self, config: RegardConfig) -> None:
        config.is_encoder_decoder = True
        super().__init__(config)
        self.encoder = Encoder(config, self.embed)
        self.model = Stack(config, "causal_self", cross=True)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None, past_key_values: Any = None, labels: Tensor | None = None,
        use_cache: bool | None = None, **kwargs: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        memory = encoder_outputs[0]
        asked = dict(memory=memory, memory_mask=padding(attention_mask, memory.shape[1]))
        x = self.embedded(decoder_input_ids, None)
        x, cache = run_decoder(self.model, x, decoder_attention_mask, past_key_values, use_cache, **asked)
        logits = self.lm_head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=cache, encoder_last_hidden_state=memory
        )


def register() -> None:
    """Make AutoConfig and the AutoModel classes know these models. Nothing does so by itself."""
    AutoConfig.register(RegardConfig.model_type, RegardConfig, exist_ok=True)
    for auto, model in ((AutoModelForCausalLM, RegardForCausalLM), (AutoModelForMaskedLM, RegardForMaskedLM),
                        (AutoModelForSeq2SeqLM, RegardForSeq2SeqLM)):  # fmt: skip
        auto.register(RegardConfig, model, exist_ok=True)
