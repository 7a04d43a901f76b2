"""Tiny random models of many families, built from their configurations: no weights, no network.

`build("llama")` gives (model, inputs). Query and key weights are sharpened, so that attention is far from uniform
and a wrong mask or a dropped token shows.
"""

import re
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from regard.core import unknown
from regard.testing import hybrids
from regard.testing.tiny import SLIDING, TEXT, ZOO, family, ids

VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
QWEN_VISION: dict[str, Any] = dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=4,
    spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
)  # fmt: skip
QWEN_TOKENS = dict(image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123)
SLIDING_LAYERS = dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"])
SHARP = re.compile(
    r"(q_proj|k_proj|c_attn|\.query\.|\.key\.|qkv|query_key_value|\.q\.|\.k\.|q_a_proj|q_b_proj|kv_a_proj|kv_b_proj)"
    r".*weight"
)
NORMED = re.compile(r"\.(q|k|query|key)_(layer)?norm\.weight$")


def build(name: str, seed: int = 1) -> tuple[Any, dict]:
    """A tiny random model of this family in eval mode, and inputs that it takes."""
    if name not in ZOO:
        raise unknown("model family", name, ZOO)
    torch.manual_seed(seed)
    model, inputs = ZOO[name]()
    return sharpened(model), inputs


@torch.no_grad()
def sharpened(model: Any) -> Any:
    """The model in eval mode, its query and key weights multiplied, so that attention is far from uniform.

    What scales normalised heads is drawn: with ones all keys are of one length, and rounding chooses between them.
    """
    for label, weight in model.named_parameters():
        if SHARP.search(label) and weight.ndim == 2:
            weight.mul_(12)
        if NORMED.search(label):
            weight.add_(torch.rand_like(weight) - 0.5)
    return model.eval()


@family
def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)), dict(input_ids=ids())


@family
def qwen3():
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT, head_dim=8)), dict(input_ids=ids())


@family
def mistral():
    return tf.MistralForCausalLM(tf.MistralConfig(**TEXT, **SLIDING)), dict(input_ids=ids())


@family
def gemma2():
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**TEXT, head_dim=8, **SLIDING)), dict(input_ids=ids())


@family
def gemma3():
    config = tf.Gemma3TextConfig(**TEXT, head_dim=8, **SLIDING, **SLIDING_LAYERS)
    return tf.Gemma3ForCausalLM(config), dict(input_ids=ids())


@family
def gpt2():
    config = tf.GPT2Config(
        vocab_size=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return tf.GPT2LMHeadModel(config), dict(input_ids=ids())


@family
def neox():
    settings = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**settings)), dict(input_ids=ids())


@family
def phi():
    """Rotates half of the width; SmolLM3, below, has a layer without positions; HunYuan normalises what it rotated."""
    settings = {**TEXT, "num_key_value_heads": 4}
    rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    return tf.PhiForCausalLM(tf.PhiConfig(**settings, rope_parameters=rope)), dict(input_ids=ids())


@family
def smollm3():
    config = tf.SmolLM3Config(**TEXT, no_rope_layers=[1, 0, 1])
    return tf.SmolLM3ForCausalLM(config), dict(input_ids=ids())


@family
def hunyuan():
    config = tf.HunYuanDenseV1Config(**TEXT, head_dim=8)
    return tf.HunYuanDenseV1ForCausalLM(config), dict(input_ids=ids())


@family
def gptoss():
    config = tf.GptOssConfig(**TEXT, head_dim=8, num_local_experts=2, num_experts_per_tok=1, **SLIDING)
    return tf.GptOssForCausalLM(config), dict(input_ids=ids())


@family
def deepseek3():
    settings = {**TEXT, "num_key_value_heads": 4}
    config = tf.DeepseekV3Config(
        **settings, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
        n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=3,
    )  # fmt: skip
    return tf.DeepseekV3ForCausalLM(config), dict(input_ids=ids())


@family
def qwen3next():
    settings = {**TEXT, "num_hidden_layers": 4}
    config = tf.Qwen3NextConfig(
        **settings, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    return tf.Qwen3NextForCausalLM(config), dict(input_ids=ids())


@family
def bert():
    config = tf.BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    mask = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
    return tf.BertForMaskedLM(config), dict(input_ids=ids(2), attention_mask=mask)


@family
def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5)), dict(pixel_values=_image(2))


@family
def clip():
    text = dict(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, projection_dim=16, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config = tf.CLIPConfig(
        text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16
    )
    tokens = ids(2)
    tokens[:, -1] = 2
    return tf.CLIPModel(config), dict(input_ids=tokens, pixel_values=_image(2))


@family
def llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=16), text_config=tf.LlamaConfig(**TEXT),
        image_token_index=120, image_token_id=120, image_seq_length=16, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    tokens = torch.cat([ids(1, 3), torch.full((1, 16), 120), ids(1, 6)], 1)
    inputs = dict(input_ids=tokens, pixel_values=_image(1), attention_mask=torch.ones_like(tokens))
    return tf.LlavaForConditionalGeneration(config), inputs


@family
def qwen25vl():
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    vision = dict(**QWEN_VISION, window_size=16, fullatt_block_indexes=[1])
    config = tf.Qwen2_5_VLConfig(
        text_config=dict(**TEXT, rope_parameters=rope), vision_config=vision, **QWEN_TOKENS
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config), _qwen_inputs()


@family
def qwen3vl():
    rope = dict(rope_type="default", mrope_section=[2, 1, 1], mrope_interleaved=True, rope_theta=1e4)
    vision = dict(**QWEN_VISION, num_position_embeddings=64, deepstack_visual_indexes=[0])
    config = tf.Qwen3VLConfig(
        text_config=dict(**TEXT, head_dim=8, rope_parameters=rope), vision_config=vision, **QWEN_TOKENS
    )
    return tf.Qwen3VLForConditionalGeneration(config), _qwen_inputs()


@family
def gemma3mm():
    vision = {**VISION, "num_hidden_layers": 2}
    config = tf.Gemma3Config(
        text_config=dict(**TEXT, head_dim=8, **SLIDING, **SLIDING_LAYERS), vision_config=vision,
        mm_tokens_per_image=4, image_token_index=120, image_token_id=120, boi_token_index=122, eoi_token_index=123,
    )  # fmt: skip
    tokens = torch.cat(
        [ids(1, 2), torch.tensor([[122]]), torch.full((1, 4), 120), torch.tensor([[123]]), ids(1, 5)], 1
    )
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=_image(1))
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # it begins as zeros
    return model, dict(**inputs, token_type_ids=(tokens == 120).long())


@family
def smolvlm():
    vision = {**VISION, "num_hidden_layers": 2, "patch_size": 4, "image_size": 32}
    config = tf.SmolVLMConfig(
        text_config=dict(**TEXT, model_type="llama"), vision_config=vision, scale_factor=2, image_token_id=120,
        pad_token_id=0,
    )  # fmt: skip
    tokens = torch.cat([ids(1, 3), torch.full((1, 16), 120), ids(1, 6)], 1)
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=_image(1)[None])
    return tf.SmolVLMForConditionalGeneration(config), inputs


@family
def internvl():
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=[32, 32],
        patch_size=[4, 4],
    )  # fmt: skip
    config = tf.InternVLConfig(
        text_config=dict(**TEXT, model_type="llama"), vision_config=vision, image_token_id=120, image_seq_length=16,
        downsample_ratio=0.5,
    )  # fmt: skip
    tokens = torch.cat([ids(1, 3), torch.full((1, 16), 120), ids(1, 6)], 1)
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=_image(1))
    return tf.InternVLForConditionalGeneration(config), inputs


@family
def whisper():
    config = tf.WhisperConfig(
        vocab_size=128, num_mel_bins=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    inputs = dict(input_features=torch.randn(1, 8, 40), decoder_input_ids=ids(1, 6))
    return tf.WhisperForConditionalGeneration(config), inputs


@family
def t5():
    config = tf.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config), dict(input_ids=ids(1, 9), decoder_input_ids=ids(1, 6))


@family
def falcon():
    config = tf.FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return tf.FalconForCausalLM(config), dict(input_ids=ids())


@family
def bloom():
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)), dict(
        input_ids=ids()
    )


@family
def gptj():
    config = tf.GPTJConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    return tf.GPTJForCausalLM(config), dict(input_ids=ids())


# by where they lie: layers that are not all attention over keys of their own
HYBRIDS = tuple(name for name, make in ZOO.items() if make.__module__ == hybrids.__name__)
UNREACHED = ("falcon", "bloom", "gptj")
DECODERS = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "neox", "gptoss")


def _image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def _qwen_inputs() -> dict:
    tokens = torch.cat(
        [ids(1, 2), torch.tensor([[122]]), torch.full((1, 16), 120), torch.tensor([[123]]), ids(1, 5)], 1
    )
    return dict(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=torch.randn(64, 3 * 2 * 4 * 4),
        image_grid_thw=torch.tensor([[1, 8, 8]]), mm_token_type_ids=(tokens == 120).long(),
    )  # fmt: skip


def logits(output: Any) -> Tensor:
    """The tensor that a model's output is compared by."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if output.get(name) is not None:
            return output[name]
    raise KeyError(f"none of logits, logits_per_image, last_hidden_state in {list(output)}")
