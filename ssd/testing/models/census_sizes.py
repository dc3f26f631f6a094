"""Sizes of the census' tiny models: common ones, and what single model types need instead."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 2,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "time_step_rank": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "state_size": 16,
    "is_decoder": True,
}
_LATENT: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4}
"""Multi-head latent attention: ``head_dim`` is the rotary part."""
_PER_LAYER: dict[str, Any] = {"vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 16}
_SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 32,
    "position_embedding_size": 32,
}
_SMALL_AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "subsampling_conv_channels": (8, 8),
    "output_proj_dims": 32,
}
_SLIDING: list[str] = ["sliding_attention", "full_attention"] * 2
_NO_IMAGES: dict[str, Any] = {"image_token_id": 5, "video_token_id": 5, "audio_token_id": 5}


def _text(model_type: str, **own: Any) -> dict[str, Any]:
    """Returns a text part of the common sizes."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
    return {"model_type": model_type, **{name: COMMON[name] for name in names}, **own}


_LATENT_SIZES: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "qk_rope_head_dim": 8,
}
_DOTS3: dict[str, Any] = {
    **_LATENT_SIZES,
    **{f"swa_{name}": size for name, size in _LATENT_SIZES.items()},
    "moe_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
}
_BYTES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_QWEN4: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
}

OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
        ),
        _LATENT,
    ),
    "blt": {
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": _BYTES,
        "encoder_config": {**_BYTES, "hidden_size_global": 64},
        "decoder_config": {**_BYTES, "hidden_size_global": 64},
        "global_config": _BYTES,
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _text("dots3_note_text", **_DOTS3),
        "vision_config": {
            **_SMALL_VISION,
            "num_hidden_layers": 1,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        "audio_config": {**_SMALL_AUDIO, "adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128},
    "fuyu": {"text_config": _text("persimmon"), "image_size": 30, "patch_size": 10},
    "gemma3": {"vision_config": _SMALL_VISION},
    "gemma3n_text": {
        **_PER_LAYER,
        "num_kv_shared_layers": 0,
        "layer_types": _SLIDING,
    },
    "gemma4": {
        "text_config": _text("gemma4_text", **_PER_LAYER, layer_types=_SLIDING, sliding_window=8, head_dim=16),
        "vision_config": _SMALL_VISION,
        "audio_config": _SMALL_AUDIO,
    },
    "gemma4_text": {**_PER_LAYER, "layer_types": _SLIDING},
    "gemma4_unified": {
        "text_config": _text("gemma4_unified_text", layer_types=_SLIDING, sliding_window=8, head_dim=16),
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
        "audio_config": {"audio_embed_dim": 16},
    },
    "got_ocr2": {
        "text_config": _text("qwen2", num_key_value_heads=2),
        "vision_config": {**_SMALL_VISION, "output_channels": 16, "mlp_dim": 32, "global_attn_indexes": (0,)},
        "image_token_index": 5,
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {**_LATENT, "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "moshi": {"audio_vocab_size": 32, "ffn_dim": 192, "depth_decoder_config": {"num_hidden_layers": 1}},
    "moss_transcribe_diarize": {
        "text_config": _text("qwen3", num_key_value_heads=2, head_dim=16),
        "audio_config": {**_SMALL_AUDIO, "max_source_positions": 16, "num_mel_bins": 16},
        "audio_token_id": 5,
    },
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": {**_text("qwen4_exp_text", num_key_value_heads=2, head_dim=16), **_QWEN4}},
    "reformer": {
        "attention_head_size": 16,
        "axial_pos_embds": False,
        "feed_forward_size": 96,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "zamba": {
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 2,
        "use_mamba_kernels": False,
        "adapter_rank": 8,
    },
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
