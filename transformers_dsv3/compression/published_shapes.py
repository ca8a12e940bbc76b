"""Shapes of published models of this architecture, as fields of `DeepseekV3Config`: what is not here is DeepSeek-V3's.

`GLM-4.7-Flash` is of another `model_type` (`glm4_moe_lite`), with the same layers.
"""

from __future__ import annotations

from typing import Any


_SMALL_HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_NO_GROUPS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 1}

PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"num_nextn_predict_layers": 1},
    "moonlight-16b-a3b": {
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.446,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "num_nextn_predict_layers": 0,
        **_SMALL_HEADS,
        **_NO_GROUPS,
    },
    # Its totals are the published ones: 1.8 B parameters a token, and a Q8_0 file without the MTP layer of 11.4 GB
    "gigachat3-10b-a1.8b": {
        "vocab_size": 128256,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "moe_intermediate_size": 1280,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        **_SMALL_HEADS,
        "v_head_dim": 192,
        **_NO_GROUPS,
    },
    "glm-4.7-flash": {
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "q_lora_rank": 768,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.8,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "num_nextn_predict_layers": 1,
        **_NO_GROUPS,
    },
    "kimi-k2": {
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        **_NO_GROUPS,
    },
}
