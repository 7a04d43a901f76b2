"""Small backbones around any mechanism, as Hugging Face models: from_pretrained, save_pretrained, generate.

    decoder           RegardForCausalLM     causal_self layers
    encoder           RegardForMaskedLM     self layers
    encoder-decoder   RegardForSeq2SeqLM    self layers; then causal_self layers that ask the encoder (causal_cross)

A layer is x + attention(norm x), then x + SwiGLU(norm x) unless intermediate_size is 0. `mechanisms` names one
mechanism, or one for every layer (a hybrid); a block page in the list is a whole layer by itself. With
residual="attention" a sublayer's input is an attention over the embedding and all outputs below it (nn/depth.py).

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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from regard.core import Unsupported, require
from regard.nn.cache import StateCache
from regard.nn.config import RegardConfig
from regard.nn.depth import draw_queries
from regard.nn.initial import draw_parts, draw_projections
from regard.nn.options import IGNORED, next_labels, packed_texts, read_options, token_loss
from regard.nn.stack import Stack
from regard.nn.vision import register as register_vision

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
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer", "BlockLayer", "DepthLayer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}  # noqa: RUF012

    def __init__(self, config: RegardConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # as from_pretrained makes it: what the checkpoint lacks has no values yet
        self.made_empty = self.embed.weight.is_meta

    def _init_weights(self, module: nn.Module) -> None:
        draw_projections(module, self.config.initializer_range)
        if self.made_empty:
            draw_parts(module)
            draw_queries(module)

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


def states_in(cache: Any) -> list[Any] | None:
    """The states of a StateCache, None where there is no cache."""
    require(cache is None or isinstance(cache, StateCache), "past_key_values is a StateCache, or None",
            past_key_values=type(cache).__name__)  # fmt: skip
    return None if cache is None else cache.states


def carried_on(cache: StateCache | None, states: list[Any], x: Tensor) -> StateCache:
    """The cache after the tokens x [B, N, C]."""
    silent = [i for i, state in enumerate(states) if state is None and x.numel()]
    require(
        not silent, "every layer gives a state; use_cache=False for mechanisms that have none", layers=silent
    )
    cache = StateCache() if cache is None else cache
    cache.states, cache.seen = states, cache.seen + x.shape[1]
    return cache


def tail(x: Tensor, keep: int | Tensor) -> Tensor:
    """The last `keep` tokens of [B, N, C], all where it is 0, or those at the indices `keep`."""
    if not isinstance(keep, int):
        return x[:, keep]
    return x[:, -keep:] if keep else x


class RegardForCausalLM(RegardModel, GenerationMixin):
    """A decoder: input_ids [B, N] -> logits [B, N, vocab].

    Labels are the tokens themselves, -100 where none is scored: a token's logits are held to the next label. Texts that
    are packed into a row, as position_ids, seq_idx or cu_seq_lens_q say (nn/options.py), are each as if alone.
    """

    def __init__(self, config: RegardConfig) -> None:
        super().__init__(config)
        self.model = Stack(config, "causal_self")
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0, position_ids: Tensor | None = None, seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        options = read_options(self.config, kwargs, packs=True)
        x, cache = self.embedded(input_ids, inputs_embeds), past_key_values
        (batch, n, _), states = x.shape, states_in(cache)
        token_mask, seen = padding(attention_mask, n), 0 if cache is None else cache.seen
        texts = packed_texts(batch, n, position_ids, seq_idx, options, token_mask, attention_mask, seen)
        use_cache = self.caches(use_cache, texts)
        out = self.model(x, token_mask, states, texts=texts, between=options.hidden)
        logits, loss = self.lm_head(tail(out.hidden, logits_to_keep)), None
        if labels is not None:
            loss = token_loss(logits, next_labels(labels, texts), options)
        cache = carried_on(cache, out.states, x) if use_cache else None
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=out.between
        )

    def caches(self, use_cache: bool | None, texts: list[int] | None) -> bool:
        """Whether states are returned: if asked for, or by default outside training; never of packed texts."""
        if texts is not None and use_cache:
            raise Unsupported("use_cache with packed texts: a row of several has no one state")
        if use_cache is None:
            return self.config.use_cache and not self.training and texts is None
        return use_cache


class RegardForMaskedLM(RegardModel):
    """An encoder: input_ids [B, N] -> logits [B, N, vocab]; labels are not shifted, -100 is not scored. Packed too."""

    def __init__(self, config: RegardConfig) -> None:
        super().__init__(config)
        self.model = Stack(config, "self")
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None, **kwargs: Any,
    ) -> MaskedLMOutput:  # fmt: skip
        options = read_options(self.config, kwargs, packs=True)
        x = self.embedded(input_ids, inputs_embeds)
        token_mask = padding(attention_mask, x.shape[1])
        texts = packed_texts(
            x.shape[0], x.shape[1], position_ids, seq_idx, options, token_mask, attention_mask, 0
        )
        out = self.model(x, token_mask, texts=texts, between=options.hidden)
        logits = self.lm_head(out.hidden)
        loss = None if labels is None else token_loss(logits, labels, options)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.between)


class Encoder(nn.Module):
    """The encoder of an encoder-decoder, as generate calls it."""

    main_input_name = "input_ids"

    def __init__(self, config: RegardConfig, embed: nn.Module) -> None:
        super().__init__()
        self.config, self.stack = config, Stack(config, "self", "encoder_mechanisms")
        # in a list, so that it is not a module of the encoder's own
        self.embedding: list[nn.Module] = [embed]

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                inputs_embeds: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:  # fmt: skip
        options = read_options(self.config, kwargs, packs=False)
        x = self.embedding[0](input_ids) if inputs_embeds is None else inputs_embeds
        out = self.stack(x, padding(attention_mask, x.shape[1]), between=options.hidden)
        return BaseModelOutput(last_hidden_state=out.hidden, hidden_states=out.between)


class RegardForSeq2SeqLM(RegardModel, GenerationMixin):
    """An encoder-decoder: input_ids [B, M] and decoder_input_ids [B, N] -> logits [B, N, vocab].

    labels [B, N] stand under the decoder's own tokens: label i is what should follow decoder_input_ids[:, : i + 1].
    Where labels are given alone, the decoder is asked them shifted to the right, behind decoder_start_token_id.
    """

    def __init__(self, config: RegardConfig) -> None:
        config.is_encoder_decoder = True
        super().__init__(config)
        self.encoder = Encoder(config, self.embed)
        self.model = Stack(config, "causal_self", cross=True)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed, self.encoder.embedding = value, [value]

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels one place to the right, behind decoder_start_token_id; what is not scored is padding there."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        require(start is not None and pad is not None, "labels alone need decoder_start_token_id and pad_token_id",
                decoder_start_token_id=start, pad_token_id=pad)  # fmt: skip
        shifted = F.pad(labels[:, :-1], (1, 0), value=start)
        return shifted.masked_fill(shifted == IGNORED, pad)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None, past_key_values: Any = None, labels: Tensor | None = None,
        use_cache: bool | None = None, inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        options = read_options(self.config, kwargs, packs=False)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds,
                                           output_hidden_states=options.hidden, return_dict=True)  # fmt: skip
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        memory, cache = encoder_outputs[0], past_key_values
        x = self.embedded(decoder_input_ids, decoder_inputs_embeds)
        states = states_in(cache)
        out = self.model(x, padding(decoder_attention_mask, x.shape[1]), states, memory,
                         padding(attention_mask, memory.shape[1]), between=options.hidden)  # fmt: skip
        logits = self.lm_head(out.hidden)
        return Seq2SeqLMOutput(
            loss=None if labels is None else token_loss(logits, labels, options),
            logits=logits,
            past_key_values=carried_on(cache, out.states, x) if use_cache else None,
            decoder_hidden_states=out.between,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
        )


def register() -> None:
    """Make AutoConfig and the AutoModel classes know these models. Nothing does so by itself."""
    AutoConfig.register(RegardConfig.model_type, RegardConfig, exist_ok=True)
    for auto, model in ((AutoModelForCausalLM, RegardForCausalLM), (AutoModelForMaskedLM, RegardForMaskedLM),
                        (AutoModelForSeq2SeqLM, RegardForSeq2SeqLM)):  # fmt: skip
        auto.register(RegardConfig, model, exist_ok=True)
    register_vision()
    # by these names Trainer's label smoothing knows that a decoder's labels are shifted
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RegardConfig.model_type] = RegardForCausalLM.__name__
