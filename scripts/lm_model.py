"""The tokenizer, the architecture and the optimizer of the shipped language model."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT, VOCABULARY = 2048, 2048
SPECIAL = ["<pad>", "<s>", "</s>"]


def build_tokenizer(prose: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits one by one; <s> in front by default."""
    tokenizer = Tokenizer(models.BPE())
    alone, bytes_ = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((prose[i : i + 5000] for i in range(0, len(prose), 5000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM, kind: str) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for the rest, or AdamW for all; `peak` is the highest rate."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in layers} if kind == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ]
    if chosen:
        made.append(torch.optim.Muon(layers, lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def save(model: LlamaForCausalLM, tokenizer, path: Path) -> None:
    """A Hugging Face checkpoint: weights in half precision, opened in float32; the head is the embedding."""
    weights = {name: p.half() for name, p in model.state_dict().items() if name != "lm_head.weight"}
    model.config.dtype = torch.float32
    model.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)
