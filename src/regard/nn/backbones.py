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
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
)

from regard.core import Unsupported, require
from regard.nn.cache import StateCache
from regard.nn.config import RegardConfig
from regard.nn.stack import Stack

__all__ = [
    "RegardConfig",
    "RegardForCausalLM",
    "RegardForMaskedLM",
    "RegardForSeq2SeqLM",
    "RegardModel",
    "StateCache",
    "register",
]


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
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.data.zero_()

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
    token_mask = mask[:, -new:].bool()
    return None if not torch.compiler.is_compiling() and bool(token_mask.all()) else token_mask


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
    """The last `keep` tokens of [B, N, C], all where it is 0, or those at the indices `keep`."""
    if not isinstance(keep, int):
        return x[:, keep]
    return x[:, -keep:] if keep else x


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
        self.stack = Stack(config, "self", "encoder_mechanisms")
        # in a list, so that it is not a module of the encoder's own
        self.embedding = [embed]

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
        memory_mask = padding(attention_mask, memory.shape[1])
        x = self.embedded(decoder_input_ids, None)
        x, cache = run_decoder(
            self.model,
            x,
            decoder_attention_mask,
            past_key_values,
            use_cache,
            memory=memory,
            memory_mask=memory_mask,
        )
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
