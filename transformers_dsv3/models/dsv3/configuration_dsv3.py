"""Configuration of DeepSeek-V3 models (arXiv 2412.19437, section 4.2 for the published sizes)."""

import json
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.deepseek_v3 import configuration_deepseek_v3 as native


@strict
class DeepseekV3Config(native.DeepseekV3Config):
    r"""
    Configuration of a DeepSeek-V3 model: the fields of native's [`DeepseekV3Config`], the official keys that it leaves
    out of `config.json`, and the fields that training needs. Contradictions are refused when it is built.

    Every default is the published DeepSeek-V3 (671B) value. See native's for the inherited fields.

    Args:
        topk_method (`str`, *optional*, defaults to `"noaux_tc"`):
            How experts are chosen. Only `"noaux_tc"` (sigmoid scores plus a correction bias, section 2.1.2) is
            DeepSeek-V3; V2's `"greedy"` and `"group_limited_greedy"` are refused.
        scoring_func (`str`, *optional*, defaults to `"sigmoid"`):
            Function from router logits to scores. Only `"sigmoid"` is DeepSeek-V3.
        moe_layer_freq (`int`, *optional*, defaults to 1):
            After the first `first_k_dense_replace` layers, every `moe_layer_freq`-th layer is a mixture of experts.
            Native Transformers knows 1 only, and opens a checkpoint of another value as a different model.
        num_key_value_heads (`int`, *optional*):
            Kept for its official key, `num_attention_heads` unless given: latent attention has no grouped heads.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether the models return the router logits of each mixture-of-experts layer.
        mtp_loss_weight (`float`, *optional*, defaults to 0.0):
            λ of the multi-token prediction objective (section 2.2): its loss, averaged over the MTP layers, is trained
            with this weight beside next-token prediction. 0 leaves the MTP layers out of training. A setting of a
            training run, not of the model: never written to `config.json`.
        seq_aux_loss_weight (`float`, *optional*, defaults to 0.0):
            α of the sequence-wise balance loss (section 2.1.2, equations 17 to 20), a setting of a training run too.

    Raises:
        ValueError: naming the field and the rule, when fields contradict each other.
    """

    model_type = "deepseek_v3"

    # Native's plan leaves attention replicated. Here it is sharded by heads: queries and `kv_b_proj` by output rows,
    # `o_proj` by input columns; the latents and the shared rotary keys, and so the cache, are whole on every rank.
    base_model_tp_plan = {
        **native.DeepseekV3Config.base_model_tp_plan,
        "layers.*.self_attn.q_proj": "colwise",  # without a query LoRA
        "layers.*.self_attn.q_b_proj": "colwise",  # with one
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    # MTP layers are sharded alike; their `eh_proj` and norms are replicated, as all norms and routers are
    base_model_tp_plan |= {rule.replace("layers.", "mtp.", 1): style for rule, style in base_model_tp_plan.items()}
    base_model_ep_plan = native.DeepseekV3Config.base_model_ep_plan | {
        rule.replace("layers.", "mtp.", 1): style for rule, style in native.DeepseekV3Config.base_model_ep_plan.items()
    }

    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    n_shared_experts: int | None = 1
    num_key_value_heads: int | None = None
    moe_layer_freq: int = 1
    output_router_logits: bool = False  # native's from Transformers 5.18 on
    mtp_loss_weight: float | int = 0.0
    seq_aux_loss_weight: float | int = 0.0

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: the code is the installed package's, and checkpoints carry no copy of it.

        Transformers calls it after loading with `trust_remote_code=True`, and would put flattened modules beside the
        next checkpoint, without the conversion of expert weights. `push_to_hub(include_code=True)` adds a file that
        imports the package.
        """

    def __post_init__(self, **kwargs: Any):
        # A repository with remote code of its own (Moonlight's, for one) names that code here. These classes serve
        # the model instead, and a checkpoint saved from them carries no code.
        if "auto_map" in kwargs:
            kwargs["auto_map"] = {}
        for name in _COMPUTED:
            kwargs.pop(name, None)  # a key of somebody else's file, which would be set as an attribute
        _check_rope_keys(self.rope_parameters, kwargs)
        # Null in some checkpoints, for models without shared experts or without groups
        for field, absent in (("n_shared_experts", 0), ("n_group", 1), ("topk_group", self.n_group or 1)):
            if getattr(self, field) is None:
                setattr(self, field, absent)
        if kwargs.get("num_nextn_predict_layers", 0) is None:
            kwargs["num_nextn_predict_layers"] = 0
        super().__post_init__(**kwargs)
        if self.architectures:  # type: ignore[has-type]
            # Models of this package had names of their own once
            self.architectures = [_official_architecture(name) for name in self.architectures]  # type: ignore[has-type]
        self.check_fields()

    def check_fields(self) -> None:
        """Refuses fields that contradict each other. Models call it too, for fields changed after construction."""

        def refuse(field: str, rule: str) -> None:
            raise ValueError(f"`{field}={getattr(self, field)!r}`: {rule}")

        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "moe_layer_freq",
            "max_position_embeddings",
        ):
            value = getattr(self, field)
            if value is None or value < 1:
                refuse(field, "must be at least 1")
        for field in (
            "num_hidden_layers",
            "n_shared_experts",
            "first_k_dense_replace",
            "num_nextn_predict_layers",
            "mtp_loss_weight",
            "seq_aux_loss_weight",
        ):
            if getattr(self, field) is None or getattr(self, field) < 0:
                refuse(field, "must not be negative")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            refuse("q_lora_rank", "must be at least 1, or null for queries without a low-rank projection")
        if self.topk_method != "noaux_tc":
            refuse("topk_method", "DeepSeek-V3 routes by 'noaux_tc' only")
        if self.scoring_func != "sigmoid":
            refuse("scoring_func", "DeepSeek-V3 scores experts by 'sigmoid' only")
        if self.qk_rope_head_dim % 2:
            refuse("qk_rope_head_dim", "must be even: rotary embeddings turn pairs of values")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            refuse("pad_token_id", f"must lie within the vocabulary of {self.vocab_size} tokens")
        if self.n_routed_experts % self.n_group:
            refuse("n_routed_experts", f"must be divisible by n_group ({self.n_group})")
        experts_per_group = self.n_routed_experts // self.n_group
        if self.topk_group > self.n_group:
            refuse("topk_group", f"must not exceed n_group ({self.n_group})")
        if self.n_group > 1 and experts_per_group < 2:
            refuse("n_group", f"must leave two experts a group or more, not {experts_per_group}: a group's score is "
                   "the sum of its two best experts")  # fmt: skip
        if self.num_experts_per_tok > self.topk_group * experts_per_group:
            refuse(
                "num_experts_per_tok",
                f"must not exceed the {self.topk_group * experts_per_group} experts of the topk_group "
                f"({self.topk_group}) selected groups of {experts_per_group}",
            )

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers that are mixtures of experts, MTP layers left out."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe(layer)]

    @property
    def active_expert_share(self) -> float:
        """Of a layer's routed experts, the share that one token passes through."""
        return self.num_experts_per_tok / self.n_routed_experts

    @property
    def active_parameters(self) -> int:
        """Parameters of `DeepseekV3ForCausalLM` that one token passes through, MTP layers left out."""
        copies = 1 if self.tie_word_embeddings else 2  # of the embedding, for the output head
        layers = sum(self._active_in_layer(layer) for layer in range(self.num_hidden_layers))
        return layers + self.hidden_size * (copies * self.vocab_size + 1)

    @property
    def active_mtp_parameters(self) -> int:
        """Parameters of the MTP layers that one token passes through, embedding and output head left out."""
        first = self.num_hidden_layers
        layers = sum(self._active_in_layer(first + k) for k in range(self.num_nextn_predict_layers or 0))
        # The projection and the norms of its two inputs and of its output
        return layers + (self.num_nextn_predict_layers or 0) * self.hidden_size * (2 * self.hidden_size + 3)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts, by its number; MTP layers follow the others."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def _active_in_layer(self, layer: int) -> int:
        """Parameters of a decoder layer that one token passes through: of the routed experts, the chosen ones."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        queries = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        count = hidden * latent + self.kv_lora_rank * (1 + heads * (self.qk_nope_head_dim + self.v_head_dim))
        count += heads * self.v_head_dim * hidden
        if self.q_lora_rank is None:
            count += hidden * queries
        else:
            count += self.q_lora_rank * (hidden + 1 + queries)
        if self.attention_bias:
            count += (self.q_lora_rank or 0) + latent + hidden
        if self.is_moe(layer):
            experts = self.num_experts_per_tok + self.n_shared_experts
            count += hidden * (3 * self.moe_intermediate_size * experts + self.n_routed_experts)
        else:
            count += 3 * hidden * self.intermediate_size
        return count + 2 * hidden  # the norms before attention and network

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # Settings of a run: in a file they would make the next one, of another kind perhaps, train with them too
        for field in ("mtp_loss_weight", "seq_aux_loss_weight"):
            output.pop(field, None)
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        return output

    def to_json_string(self, use_diff: bool = True) -> str:
        # The official keys for RoPE beside Transformers 5's `rope_parameters`: readers built on Transformers 4 know no
        # other, and would leave YaRN out without a word. In the file only: in a dict that is changed and read again
        # they would win over `rope_parameters`.
        output = json.loads(super().to_json_string(use_diff))
        rope = output.get("rope_parameters")
        if rope:
            output["rope_theta"] = rope["rope_theta"]
            if rope["rope_type"] != "default":
                output["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        return json.dumps(output, indent=2, sort_keys=True) + "\n"


# Properties of the class, which are computed from the fields and never stored
_COMPUTED = ("moe_layers", "active_expert_share", "active_parameters", "active_mtp_parameters")


def _check_rope_keys(rope_parameters: dict[str, Any] | None, old_keys: dict[str, Any]) -> None:
    """Refuse a config whose two spellings of RoPE differ, such as a file in which one was edited."""
    old = dict(old_keys.get("rope_scaling") or {})
    if "type" in old:
        old.setdefault("rope_type", old.pop("type"))
    if old_keys.get("rope_theta") is not None:
        old["rope_theta"] = old_keys["rope_theta"]
    for key, value in old.items():
        new = (rope_parameters or {}).get(key, value)
        if new != value:
            raise ValueError(
                f"`rope_parameters`: its `{key}={new!r}` contradicts `{key}={value!r}` of `rope_scaling` and "
                "`rope_theta`, the older spelling of the same; make them equal or leave one out"
            )


def _official_architecture(class_name: str) -> str:
    return "DeepseekV3" + class_name.removeprefix("Dsv3") if class_name.startswith("Dsv3") else class_name


class KimiK2Config(DeepseekV3Config):
    """[`DeepseekV3Config`] of Kimi K2, whose checkpoints name the same architecture so."""

    model_type = "kimi_k2"


def text_config(config: Any) -> Any:
    """The config of the text in a model's, which is the same where there is nothing but text."""
    return getattr(config, "text_config", config)


Dsv3Config = DeepseekV3Config  # its name before

__all__ = ["DeepseekV3Config", "Dsv3Config", "KimiK2Config"]
