"""A model's config to the metadata of a GGUF file, and back, by llama.cpp's keys for `deepseek2`.

llama.cpp holds DeepSeek-V3's attention for attention with one shared key of R + the rotary width, so `key_length` and
`value_length` are those of the latents, and `…_mla` those of the heads. It counts MTP layers among the blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ...models.dsv3.checkpoint_files_dsv3 import CheckpointError
from .format import ARCHITECTURE


logger = logging.getLogger(__name__)

_SIGMOID = 2
# llama.cpp takes models of so many layers for ones without a low-rank projection of queries
_LAYERS_WITHOUT_Q_LORA = (26, 27)


def config_refusal(config: Any) -> str | None:
    """Why llama.cpp's `deepseek2` cannot be a model of this config, in one line; None where it can."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if config.attention_bias:
        return "`attention_bias=True`: llama.cpp's deepseek2 has no biases"
    if config.moe_layer_freq != 1:
        return f"`moe_layer_freq={config.moe_layer_freq}`: llama.cpp's deepseek2 knows 1 only"
    if not getattr(config, "rope_interleave", True):
        return "`rope_interleave=False`: llama.cpp's deepseek2 turns neighbouring values"
    if config.hidden_act != "silu":
        return f"`hidden_act={config.hidden_act!r}`: llama.cpp's deepseek2 has silu only"
    if kind not in ("default", "linear", "yarn"):
        return f"`rope_type={kind!r}`: default, linear and yarn can be written"
    if kind == "yarn":
        scales = rope.get("mscale"), rope.get("mscale_all_dim")
        if rope.get("attention_factor") is not None or ((scales[0] or scales[1]) and scales[0] != scales[1]):
            return f"`mscale={scales[0]}`, `mscale_all_dim={scales[1]}`: llama.cpp takes them to be equal"
    return None


def warn_of_llama_cpp(config: Any, mtp_layers: int) -> None:
    """What llama.cpp cannot do with a file that is right all the same."""
    if mtp_layers > 1:
        logger.warning("llama.cpp drafts with one MTP layer only; the file has %s.", mtp_layers)
    if mtp_layers and config.q_lora_rank is None:
        logger.warning("llama.cpp drafts with MTP layers only where queries have a low-rank projection (q_lora_rank).")
    if config.q_lora_rank is not None and config.num_hidden_layers in _LAYERS_WITHOUT_Q_LORA:
        logger.warning(
            "llama.cpp takes a model of %s layers for one without q_lora_rank, and will not open the file.",
            config.num_hidden_layers,
        )


def metadata_of(config: Any, mtp_layers: int, file_type: int) -> dict[str, Any]:
    """Keys and values of the file's metadata but for the tokenizer's, in the order in which they are written.

    Args:
        config: of a model without `config_refusal`.
        mtp_layers: how many the file has.
        file_type: llama.cpp's number of the type of most weights.
    """
    rope = config.rope_parameters
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers + mtp_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "leading_dense_block_count": min(config.first_k_dense_replace, config.num_hidden_layers),
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": _SIGMOID,
    }
    if config.n_group > 1:
        fields |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        fields |= {
            "rope.scaling.original_context_length": int(
                rope.get("original_max_position_embeddings") or config.max_position_embeddings
            ),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
        }
        if scale := rope.get("mscale_all_dim"):
            fields["rope.scaling.yarn_log_multiplier"] = 0.1 * scale
    if mtp_layers:
        fields["nextn_predict_layers"] = mtp_layers
    general = {"general.type": "model", "general.file_type": file_type, "general.quantization_version": 2}
    return general | {f"{ARCHITECTURE}.{key}": value for key, value in fields.items()}


def _decimal(value: float) -> float:
    """A float32 as the shortest decimal that is it: 1e-06 instead of 9.999999974752427e-07."""
    text = next(f"{value:.{digits}g}" for digits in range(1, 10) if _same_float32(float(f"{value:.{digits}g}"), value))
    return float(text)


def _same_float32(a: float, b: float) -> bool:
    return torch.tensor(a, dtype=torch.float32).item() == torch.tensor(b, dtype=torch.float32).item()


def _one(value: Any) -> Any:
    """llama.cpp writes some counts a layer; those of a dense layer may be 0."""
    return max(value) if isinstance(value, list) else value


def config_of(metadata: Mapping[str, Any], tensor_names: Collection[str]) -> dict[str, Any]:
    """Fields of the config of the model in a GGUF file.

    Args:
        metadata: of the file, arrays of strings as how many there are.
        tensor_names: of the file.

    Raises:
        CheckpointError: for another architecture, another router than DeepSeek-V3's, and metadata that lacks a key.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"the GGUF file is of architecture {architecture!r}, not {ARCHITECTURE!r}")

    def read(key: str, *default: Any) -> Any:
        value = metadata.get(f"{ARCHITECTURE}.{key}", *default)
        if value is None and not default:
            raise CheckpointError(f"the GGUF file's metadata lacks {ARCHITECTURE}.{key}")
        return _decimal(value) if isinstance(value, float) else _one(value)

    if (gating := read("expert_gating_func", 0)) != _SIGMOID:
        raise CheckpointError(
            f"the GGUF file's {ARCHITECTURE}.expert_gating_func is {gating}; DeepSeek-V3's router is {_SIGMOID}, "
            "sigmoid (DeepSeek-V2 has the same architecture in GGUF)"
        )
    layers = read("block_count") - read("nextn_predict_layers", 0)
    present = [f"blk.{layers + depth}.nextn.eh_proj.weight" in tensor_names for depth in range(128)]
    rotary = read("rope.dimension_count")
    rope = {"rope_theta": read("rope.freq_base", 10_000.0), "rope_type": read("rope.scaling.type", "default")}
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    if rope["rope_type"] != "default":
        rope["factor"] = read("rope.scaling.factor")
    if rope["rope_type"] == "yarn":
        rope |= {
            "original_max_position_embeddings": read("rope.scaling.original_context_length"),
            "beta_fast": read("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": read("rope.scaling.yarn_beta_slow", 1.0),
        }
        if multiplier := read("rope.scaling.yarn_log_multiplier", 0.0):
            rope |= dict.fromkeys(("mscale", "mscale_all_dim"), round(multiplier / 0.1, 6))
    vocabulary = read("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    if not vocabulary:
        raise CheckpointError("the GGUF file has neither a vocabulary nor its size")
    config = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": vocabulary if isinstance(vocabulary, int) else len(vocabulary),
        "max_position_embeddings": read("context_length"),
        "hidden_size": read("embedding_length"),
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": present.index(False),
        "intermediate_size": read("feed_forward_length"),
        "moe_intermediate_size": read("expert_feed_forward_length"),
        "num_attention_heads": read("attention.head_count"),
        "q_lora_rank": read("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": read("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        # Older files, where `kv_b_proj` is whole, have the heads' widths here
        "qk_nope_head_dim": read("attention.key_length_mla", None) or read("attention.key_length"),
        "v_head_dim": read("attention.value_length_mla", None) or read("attention.value_length"),
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "first_k_dense_replace": read("leading_dense_block_count", 0),
        "n_routed_experts": read("expert_count"),
        "num_experts_per_tok": read("expert_used_count"),
        "n_shared_experts": read("expert_shared_count", 0),
        "routed_scaling_factor": read("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(read("expert_weights_norm", False)),
        "n_group": read("expert_group_count", 1) or 1,
        "topk_group": read("expert_group_used_count", 1) or 1,
        "tie_word_embeddings": "output.weight" not in tensor_names,
    }
    config["qk_nope_head_dim"] -= rotary
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config
