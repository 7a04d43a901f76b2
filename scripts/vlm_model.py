"""The vision-language model that regard ships, before it is trained, and the folder it is saved to."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from regard.tasks.scene_questions import SPOKEN
from regard.tasks.scenes import SIDE

PATCH = 4
TOKENS = (SIDE // PATCH) ** 2
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
WORDS = [*SPECIAL.values(), "<unk>", *dict.fromkeys(SPOKEN)]
ID = {word: i for i, word in enumerate(WORDS)}
MEAN, STD = 0.3, 0.3
CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
)


def new_model(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=96,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=128, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=ID["<pad>"],
        bos_token_id=ID["<s>"], eos_token_id=ID["</s>"], tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=ID["<image>"], image_seq_length=TOKENS,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def processor() -> LlavaProcessor:
    words = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ID["<s>"])])
    known = {name: token for name, token in SPECIAL.items() if name != "image_token"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", padding_side="left", **known,
        extra_special_tokens={"image_token": SPECIAL["image_token"]},
    )  # fmt: skip
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
