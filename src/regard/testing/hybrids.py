"""Tiny models whose layers are not all attention over keys of their own.

Some layers hold the states of a recurrence or a convolution, alone or beside keys, and some read the keys of an
earlier layer. Layer kinds are mixed so that a mistake in counting layers shows.
"""

from typing import Any

import torch
import transformers as tf

from regard.testing.tiny import SLIDING, family, ids, text

MAMBA = dict(mamba_d_state=8, mamba_dt_rank=4)
MAMBA2 = dict(
    mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_d_conv=4, mamba_expand=2,
    mamba_chunk_size=8,
)  # fmt: skip
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts_per_tok=1, moe_intermediate_size=16)
LINEAR, FULL, SLIDE = "linear_attention", "full_attention", "sliding_attention"


def of(kind: Any, config: Any, **louder: float) -> tuple[Any, dict]:
    """The model and its inputs. `louder` scales weights by a part of their names, so that attention shows."""
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for part, factor in louder.items():
                if part in name:
                    weight.mul_(factor)
    return model, dict(input_ids=ids())


# -- states in some layers, keys in others


@family
def jamba():
    settings = text(attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, **MAMBA)
    return of(tf.JambaForCausalLM, tf.JambaConfig(**{**settings, "num_hidden_layers": 4}))


@family
def bamba():
    return of(tf.BambaForCausalLM, tf.BambaConfig(**text(attn_layer_indices=[1, 2]), **MAMBA2))


@family
def granitehybrid():
    settings = text(layer_types=[LINEAR, FULL, FULL], num_local_experts=2, num_experts_per_tok=1)
    settings.update(shared_intermediate_size=16, position_embedding_type="rope", **MAMBA2)
    config = tf.GraniteMoeHybridConfig(**settings)
    return of(tf.GraniteMoeHybridForCausalLM, config)


@family
def nemotronh():
    config = tf.NemotronHConfig(
        **text(num_hidden_layers=None, layer_types=[LINEAR, FULL, "mlp", "moe", FULL], head_dim=8), **EXPERTS,
        mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8, chunk_size=8, n_routed_experts=2,
        moe_shared_expert_intermediate_size=16,
    )  # fmt: skip
    return of(tf.NemotronHForCausalLM, config)


@family
def qwen35():
    config = tf.Qwen3_5TextConfig(**text(head_dim=8, layer_types=[LINEAR, FULL, FULL]), **DELTA)
    return of(tf.Qwen3_5ForCausalLM, config)


@family
def olmohybrid():
    config = tf.OlmoHybridConfig(**text(layer_types=[LINEAR, FULL, FULL]), **DELTA)
    return of(tf.OlmoHybridForCausalLM, config)


@family
def kimilinear():
    config = tf.KimiLinearConfig(
        **text(num_key_value_heads=4, layer_types=[LINEAR, FULL, FULL]), **EXPERTS, num_local_experts=2, topk_group=1,
        linear_head_dim=8, linear_num_heads=4, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
    )  # fmt: skip
    return of(tf.KimiLinearForCausalLM, config)


@family
def lfm2():
    config = tf.Lfm2Config(**text(layer_types=["conv", FULL, FULL], block_multiple_of=16))
    return of(tf.Lfm2ForCausalLM, config)


@family
def lfm3():
    config = tf.Lfm3Config(**text(head_dim=8, layer_types=["conv", SLIDE, FULL]), **SLIDING)
    return of(tf.Lfm3ForCausalLM, config)


@family
def minimax():
    config = tf.MiniMaxConfig(
        **text(layer_types=[FULL, LINEAR, FULL]), num_local_experts=2, num_experts_per_tok=1, block_size=8
    )
    return of(tf.MiniMaxForCausalLM, config, o_proj=12)


@family
def recurrentgemma():
    config = tf.RecurrentGemmaConfig(
        **text(max_position_embeddings=None), lru_width=32, attention_window_size=6,
        block_types=["recurrent", "attention", "attention"],
    )  # fmt: skip
    return of(tf.RecurrentGemmaForCausalLM, config, q_proj=0.1, k_proj=0.1)


# -- states and keys in one layer


@family
def falconh1():
    return of(tf.FalconH1ForCausalLM, tf.FalconH1Config(**text(), **MAMBA2, mamba_d_ssm=64))


@family
def zamba():
    config = tf.ZambaConfig(
        **text(num_hidden_layers=4, num_key_value_heads=4), **MAMBA, n_mamba_heads=2,
        layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
    )  # fmt: skip
    return of(tf.ZambaForCausalLM, config, v_proj=12, o_proj=12, feed_forward=30, linear=30)


@family
def zamba2():
    config = tf.Zamba2Config(
        **text(num_hidden_layers=4, num_key_value_heads=4), n_mamba_heads=4, mamba_d_state=8,
        chunk_size=8, use_mem_rope=True, use_shared_attention_adapter=True, adapter_rank=4,
        layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
    )  # fmt: skip
    return of(tf.Zamba2ForCausalLM, config, v_proj=12, o_proj=12, down_proj=12, linear=12)


@family
def zaya():
    config = tf.ZayaConfig(
        **text(intermediate_size=None, head_dim=8, layer_types=["hybrid", "hybrid_sliding", "hybrid"]), **SLIDING,
        num_experts=2, moe_intermediate_size=16, router_hidden_size=16,
    )  # fmt: skip
    model, inputs = of(tf.ZayaForCausalLM, config)
    for name, weight in model.named_parameters():
        if name.endswith(".temp"):  # of its keys, which begins at zero
            torch.nn.init.constant_(weight, 2.0)
    return model, inputs


@family
def inkling():
    config = tf.InklingTextConfig(
        **text(head_dim=8, layer_types=["hybrid", "hybrid_sliding", "hybrid"]), **EXPERTS, n_routed_experts=2,
        n_shared_experts=1, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
        sliding_window_size=6, d_rel=4, rel_extent=32, initializer_range=0.2,
    )  # fmt: skip
    return of(tf.InklingForCausalLM, config)


# -- layers that read the keys of an earlier one

READING = dict(
    num_hidden_layers=5, num_kv_shared_layers=2, layer_types=[SLIDE, FULL, FULL, SLIDE, FULL], head_dim=8
)
PER_LAYER = dict(vocab_size_per_layer_input=128, hidden_size_per_layer_input=8)


@family
def gemma3n():
    config = tf.Gemma3nTextConfig(
        **text(**READING), **SLIDING, **PER_LAYER, laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 5,
    )  # fmt: skip
    return of(tf.Gemma3nForCausalLM, config)


@family
def gemma4():
    config = tf.Gemma4TextConfig(**text(**READING), **SLIDING, **PER_LAYER, global_head_dim=16)
    return of(tf.Gemma4ForCausalLM, config)


@family
def gemma4unified():
    config = tf.Gemma4UnifiedTextConfig(**text(**READING), **SLIDING, global_head_dim=16)
    return of(tf.Gemma4UnifiedForCausalLM, config)
