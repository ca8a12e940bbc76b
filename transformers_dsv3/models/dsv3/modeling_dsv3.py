"""DeepSeek-V3 models (arXiv 2412.19437): backbone, causal language model, classification heads."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...kernels.selection import chosen
from .attention_dsv3 import Dsv3Attention
from .checkpoint_dsv3 import Dsv3CheckpointMixin
from .configuration_dsv3 import Dsv3Config
from .decoder_dsv3 import Dsv3DecoderLayer
from .generation_dsv3 import Dsv3GenerationMixin
from .inputs_dsv3 import check_inputs
from .linear_dsv3 import Dsv3Linear
from .moe_dsv3 import Dsv3Experts, Dsv3TopkRouter
from .mtp_dsv3 import Dsv3MtpLayer, mtp_labels, shift_left
from .norm_dsv3 import Dsv3RMSNorm


@dataclass
class Dsv3CausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """[`MoeCausalLMOutputWithPast`] and, while training with `config.mtp_loss_weight`, the MTP loss.

    Args:
        mtp_loss (`torch.FloatTensor`, a scalar): mean over the MTP layers, not weighted, no gradient. In `loss` with
            its weight already.
    """

    mtp_loss: torch.FloatTensor | None = None


class Dsv3PreTrainedModel(Dsv3CheckpointMixin, PreTrainedModel):
    """Weights, loading and saving that all DeepSeek-V3 models share."""

    config: Dsv3Config
    config_class = Dsv3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Dsv3DecoderLayer", "Dsv3MtpLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": Dsv3DecoderLayer,
        "attentions": Dsv3Attention,
        "router_logits": OutputRecorder(Dsv3TopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # MTP layers share the embedding and the head of the model; official checkpoints carry copies of them
    _keys_to_ignore_on_load_unexpected = [r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"]

    def __init__(self, config: Dsv3Config, *args: Any, **kwargs: Any):
        if not isinstance(config, Dsv3Config):
            raise ValueError(
                f"{type(self).__name__} needs a Dsv3Config, not a {type(config).__name__}: "
                "use `Dsv3Config(**config.to_dict())`."
            )
        config.check_fields()
        super().__init__(config, *args, **kwargs)

    def train(self, mode: bool = True) -> "Dsv3PreTrainedModel":
        super().train(mode)
        self._freeze_idle_mtp_layers()
        return self

    def _freeze_idle_mtp_layers(self) -> None:
        """Keeps MTP layers that no loss reaches out of the optimizer, and out of what DistributedDataParallel awaits.

        Only what was frozen here is made trainable again, when `config.mtp_loss_weight` was set in the meantime: what
        users and adapters freeze stays so.
        """
        if self.base_model is self:
            return  # the model around it knows the loss
        trains = self.config.mtp_loss_weight > 0 and isinstance(self, Dsv3ForCausalLM)
        for layer in self.base_model.mtp_layers:
            if not trains:
                layer.frozen_as_idle = layer.frozen_as_idle or layer.eh_proj.weight.requires_grad
                layer.requires_grad_(False)
            elif layer.frozen_as_idle:
                layer.requires_grad_(True)
                layer.frozen_as_idle = False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for a decorator in the source of this file, but the experts live in moe_dsv3.py
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """`"auto"` where nothing was asked for, or what the environment asks for; see `kernels/selection.py`."""
        return super().get_correct_experts_implementation(requested_experts or chosen["experts"])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Dsv3TopkRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Dsv3Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)


class Dsv3Model(Dsv3PreTrainedModel):
    """The decoder without a head.

    `layers` holds the `num_hidden_layers` layers of the main model, then the MTP layers, numbered as in the official
    checkpoint.
    """

    def __init__(self, config: Dsv3Config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [Dsv3DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
            + [Dsv3MtpLayer(config, depth) for depth in range(config.num_nextn_predict_layers)]
        )
        self.norm = Dsv3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def mtp_layers(self) -> list[Dsv3MtpLayer]:
        """The MTP layers, by depth."""
        return list(self.layers[self.config.num_hidden_layers :])

    def attention_inputs(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """The arguments that every layer of one pass shares: causal mask, rotary angles, cache.

        Args:
            inputs_embeds: `(B, Q, D)`, read for shape, dtype and device only.
            attention_mask: as in [`Dsv3Model.forward`].
            position_ids: `(B or 1, Q)`.
            past_key_values: the cache before this pass.
        """
        return {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """
        Args:
            input_ids: `(B, Q)`, or `inputs_embeds` `(B, Q, D)` in its place.
            attention_mask: `(B, S)` over cached and new positions, 0 for padding on either side; or a full 4D mask.
            position_ids: `(B or 1, Q)`; where they restart at 0 without a cache or a mask, packed sequences that do
                not see each other.
            past_key_values: cache of latents, extended in place.
            use_cache: whether to make a cache where none is given.

        Raises:
            ValueError: for token ids out of range, no tokens, a row that is all padding, or more positions than
                `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, past_length)

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length)[None]

        layer_inputs = self.attention_inputs(inputs_embeds, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            # Made after the mask, since Transformers looks for packed sequences only where there is no cache
            past_key_values = layer_inputs["past_key_values"] = DynamicCache(config=self.config)
        hidden_states = inputs_embeds
        for layer in islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(hidden_states, **layer_inputs, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class Dsv3ForCausalLM(Dsv3PreTrainedModel, Dsv3GenerationMixin):
    """The language model: decoder, MTP layers and output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: Dsv3Config):
        super().__init__(config)
        self.model = Dsv3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Dsv3Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._freeze_idle_mtp_layers()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Dsv3CausalLMOutputWithPast:
        """
        Args:
            labels: `(B, Q)`, -100 where there is no target. Shifted here, as everywhere in Transformers.
            logits_to_keep: compute logits of so many last positions, or of those an index tensor names; 0 for all.

        The other arguments are those of [`Dsv3Model.forward`].
        """
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])

        loss = mtp_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and self.config.mtp_loss_weight and self.model.mtp_layers:
                if inputs_embeds is None:
                    inputs_embeds = self.model.embed_tokens(input_ids)
                mtp_loss = self.mtp_loss(hidden_states, inputs_embeds, labels, attention_mask, position_ids, **kwargs)
                loss = loss + self.config.mtp_loss_weight * mtp_loss

        return Dsv3CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            mtp_loss=mtp_loss.detach() if mtp_loss is not None else None,
        )

    def mtp_loss(
        self,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Cross-entropy of the MTP layers, averaged over them (equations 24 and 25 without the weight λ).

        Args:
            hidden_states: `(B, S, D)`, the last hidden state of the main model.
            inputs_embeds: `(B, S, D)`, embeddings of the tokens it ran on.
            labels, attention_mask, position_ids: those of [`Dsv3ForCausalLM.forward`].
            num_items_in_batch: what the sum over positions is divided by, as `Trainer` gives it; the number of targets
                of a layer where it is not given.
        """
        positions = position_ids
        if positions is None:
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        layer_inputs = self.model.attention_inputs(inputs_embeds, attention_mask, positions, None)
        kwargs.pop("shift_labels", None)  # of the main loss
        losses = []
        for depth, layer in enumerate(self.model.mtp_layers):
            hidden_states = layer(hidden_states, shift_left(inputs_embeds, depth + 1, 0.0), **layer_inputs)
            targets = mtp_labels(labels, depth, position_ids, attention_mask)
            if num_items_in_batch is None:
                num_items = targets.ne(-100).sum().clamp(min=1)  # a loss of 0, not of 0 / 0, where there is no target
            else:
                num_items = num_items_in_batch
            loss = self.loss_function(
                logits=self.lm_head(hidden_states),
                labels=None,
                vocab_size=self.config.vocab_size,
                shift_labels=targets,
                num_items_in_batch=num_items,
                **kwargs,
            )
            losses.append(loss)
        return torch.stack(losses).mean()


class Dsv3ForSequenceClassification(GenericForSequenceClassification, Dsv3PreTrainedModel):
    """A score for each label from the last token that is not padding. Reward models are this with one label."""

    def __init__(self, config: Dsv3Config):
        super().__init__(config)
        self._freeze_idle_mtp_layers()


class Dsv3ForTokenClassification(GenericForTokenClassification, Dsv3PreTrainedModel):
    """A score for each label and token."""

    def __init__(self, config: Dsv3Config):
        super().__init__(config)
        self._freeze_idle_mtp_layers()


__all__ = [
    "Dsv3CausalLMOutputWithPast",
    "Dsv3ForCausalLM",
    "Dsv3ForSequenceClassification",
    "Dsv3ForTokenClassification",
    "Dsv3Model",
    "Dsv3PreTrainedModel",
]
