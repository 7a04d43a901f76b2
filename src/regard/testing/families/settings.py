"""Tiny settings of decoders: what every configuration is given where it has the field, and what single ones need.

Data alone.
"""

import re
from typing import Any

LAYERS = 4
# field of a configuration -> its value; fields that a configuration does not have are left out
GENERIC: dict[str, Any] = {
    # tokens
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "forced_eos_token_id": None,
    # widths
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "embedding_size": 32, "input_embedding_size": 32,
    "word_embed_proj_dim": 32, "embedding_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "dff": 48, "dim_ff": 48, "d_ff": 48, "d_inner": 48,
    "expert_ffn_hidden_size": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "shared_experts_intermediate_size": 16, "intermediate_size_mlp": 48,
    "moe_shared_expert_intermediate_size": 16, "dense_intermediate_size": 48, "prefix_dense_intermediate_size": 48,
    "hidden_size_per_layer_input": 8, "attention_hidden_size": 32, "router_hidden_size": 16, "lru_width": 32,
    # depth
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "decoder_layers": LAYERS, "encoder_layers": LAYERS, "num_decoder_layers": LAYERS, "num_encoder_layers": LAYERS,
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0, "num_blocks": LAYERS,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "dim_head": 8, "d_head": 8, "attention_head_size": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "global_head_dim": 8,
    "kv_channels": 8, "qk_head_dim": 12, "rotary_dim": 4,
    # latent and indexed attention
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8,
    # lengths
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256, "max_target_positions": 256,
    "max_source_positions": 32, "sliding_window": 6, "attention_window_size": 6, "sliding_window_size": 6,
    "attention_chunk_size": 8, "window_size": 6, "local_attention": 12, "context_length": 256,
    # experts
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 1,
    "moe_topk": 1, "moe_k": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "zero_expert_num": 1, "top_k_experts": 1,
    # recurrences
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 4, "linear_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_dt_rank": 4, "mamba_chunk_size": 8, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "mamba_expand": 2, "n_groups": 1, "ssm_state_size": 8, "state_size": 8, "chunk_size": 8,
    "n_mamba_heads": 2, "mamba_ngroups": 1, "time_step_rank": 4, "block_size": 8, "block_multiple_of": 16,
    # others
    "is_decoder": True,
    "laurel_rank": 4, "altup_num_inputs": 2, "hc_mult": 2, "d_rel": 4, "rel_extent": 32, "num_codebooks": 1,
    "image_size": 32, "patch_size": 8, "projection_dim": 16, "num_mel_bins": 8, "depth": 2,
    "audio_vocab_size": 128,
    "hidden_size_global": 32, "encoder_hash_byte_group_vocab": 64, "dropout": 0.0,
}  # fmt: skip

# beside these where keys are latents: every query head has one of its own
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": None}

FULL, SLIDE, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
READING = dict(num_hidden_layers=5, num_kv_shared_layers=2, layer_types=[SLIDE, FULL, FULL, SLIDE, FULL])
INDEXER = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2
)
# family -> what it needs beside these; None takes a setting out
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(
        rope_parameters={FULL: MROPE, SLIDE: MROPE}, layer_types=[SLIDE, FULL, SLIDE, FULL]
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=2, moe_top_k=1),
    ),
    "gemma3n_text": dict(**READING, activation_sparsity_pattern=[0.0] * 5),
    "gemma4_text": READING,
    "gemma4_unified_text": READING,
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=[LINEAR, FULL, LINEAR, FULL], position_embedding_type="rope"),
    "inkling2_text": dict(initializer_range=0.2),
    "inkling_text": dict(initializer_range=0.2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", FULL, "conv", FULL]),
    "longcat_flash": dict(head_dim=4, n_routed_experts=4, moe_topk=2, zero_expert_num=2),
    "mamba2": dict(head_dim=16),
    "minimax_m3_vl_text": dict(
        layer_types=[FULL, "minimax_m3_sparse"] * 2, index_block_size=4, index_topk_blocks=2
    ),
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[16, 16], attn_layers=["local", "local"]),
    "xlstm": dict(hidden_size=128, embedding_dim=128),
    "xmod": dict(languages=["en_XX"], default_language="en_XX"),
    "zamba": dict(
        num_key_value_heads=4,
        attention_hidden_size=64,
        attention_head_dim=16,
        layers_block_type=[LINEAR, "hybrid"] * 2,
    ),
    "zamba2": dict(num_key_value_heads=4, layers_block_type=[LINEAR, "hybrid"] * 2, use_mem_rope=True),
}
# family -> why it cannot stand alone
UNBUILT: dict[str, str] = {
    "gemma4_assistant": "it drafts for another model and reads that model's keys",
    "gemma4_unified_assistant": "it drafts for another model and reads that model's keys",
}
# family -> parts of names of weights and how much louder they are made; for most, queries and keys are enough
LOUDER: dict[str, dict[str, float]] = {
    "minicpm3": {"q_b_proj": 1 / 12},
    "youtu": {"q_b_proj": 1 / 12},
    "zamba": {"v_proj": 12, "o_proj": 12, "feed_forward": 30, "linear": 30},
}
SHARP = re.compile(
    r"(q_proj|k_proj|c_attn|\.query\.|\.key\.|qkv|query_key_value|\.q\.|\.k\.|q_a_proj|q_b_proj|kv_a_proj|kv_b_proj)"
    r".*weight"
)
