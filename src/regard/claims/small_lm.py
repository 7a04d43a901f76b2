"""Small language models for claims on explanations: Llama and GPT-2 of a few layers, trained on templated texts.

Texts are drawn anew in every step; only tokens with a label count in the loss.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from regard.claims.lab import generator, seeded
from regard.train.loop import cosine, fit

Draw = Callable[
    [torch.Generator], tuple[Tensor, Tensor]
]  # ids and labels [B, N], labels of the next token or -100


def small_llama(
    vocabulary: int, layers: int, heads: int, width: int, seed: int, tied: bool = False
) -> LlamaForCausalLM:
    """A Llama with heads of width / heads, MLPs of twice the width, its matrices drawn from the seed."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256,
        initializer_range=(0.4 / width) ** 0.5, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with seeded(seed):
        return LlamaForCausalLM(config).eval()


def small_gpt2(
    vocabulary: int, layers: int, heads: int, width: int, tokens: int, seed: int
) -> GPT2LMHeadModel:
    """A GPT-2 of the same shape, without dropout; it learns its positions, so many tokens."""
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_inner=2 * width, n_layer=layers, n_head=heads, n_positions=tokens,
        initializer_range=(0.4 / width) ** 0.5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with seeded(seed):
        return GPT2LMHeadModel(config).eval()


def taught(
    model: PreTrainedModel, draw: Draw, steps: int, rate: float, seed: int, decay: float = 0.01
) -> list[float]:
    """The losses of a training by AdamW, the rate up in a twentieth of the steps, then down by half a cosine."""
    g = generator(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=decay)

    def loss_at(step: int) -> Tensor:
        ids, labels = draw(g)
        return F.cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1), labels.flatten())

    return fit(optimizer, loss_at, steps, schedule=cosine(0.05))


def padded(texts: Sequence[tuple[Tensor, Tensor]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of several kinds of texts as one batch, filled up on the right."""
    width = max(ids.shape[1] for ids, _ in texts)
    both = [[F.pad(x, (0, width - x.shape[1]), value=v) for x, v in zip(t, (pad, -100))] for t in texts]
    ids, labels = (torch.cat(x) for x in zip(*both, strict=True))
    return ids, labels
