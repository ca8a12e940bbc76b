"""DeepSeek-V3 models (arXiv 2412.19437): backbone, causal language model, classification heads."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_dsv3 import DeepseekV3Attention
from .checkpoint_conversion_dsv3 import mtp_renamings
from .checkpoint_dsv3 import Dsv3CheckpointMixin
from .configuration_dsv3 import DeepseekV3Config
from .decoder_dsv3 import DeepseekV3DecoderLayer
from .decoding_dsv3 import Decoding
from .distributed_dsv3 import Dsv3DistributedMixin
from .engines_dsv3 import engine_layer
from .generation_dsv3 import Dsv3GenerationMixin
from .inputs_dsv3 import begins_anew, check_inputs, new_token_mask
from .language_model_dsv3 import Dsv3TrainedMixin, language_model_forward
from .moe_dsv3 import DeepseekV3TopkRouter
from .mtp_dsv3 import Dsv3MtpLayer
from .norm_dsv3 import DeepseekV3RMSNorm
from .objectives_dsv3 import (
    TrainingState,
    await_loss,
    carry_mtp_loss,
    tell_decoder_the_targets,
    warn_of_unbalanced_training,
)
from .outputs_dsv3 import Dsv3CausalLMOutputWithPast
from .quantized_dsv3 import Dsv3QuantizedMixin
from .training_pass_dsv3 import RouterPass, TrainingPass, mark, running


logger = logging.get_logger(__name__)


NATIVE_MODEL_FORWARD = native.DeepseekV3Model.forward
NATIVE_LANGUAGE_MODEL_FORWARD = native.DeepseekV3ForCausalLM.forward


class DeepseekV3PreTrainedModel(
    Dsv3TrainedMixin, Dsv3CheckpointMixin, Dsv3DistributedMixin, Dsv3QuantizedMixin, native.DeepseekV3PreTrainedModel
):
    """Weights, loading and saving that all DeepSeek-V3 models share.

    Args:
        config: the model's dimensions and settings.

    Raises:
        ValueError: `config` is of another class, or its fields contradict each other.
    """

    config: DeepseekV3Config
    config_class = DeepseekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV3DecoderLayer", "Dsv3MtpLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": DeepseekV3DecoderLayer,
        "attentions": DeepseekV3Attention,
        "router_logits": OutputRecorder(DeepseekV3TopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # MTP layers share the embedding and the head of the model; official checkpoints carry copies of them
    _keys_to_ignore_on_load_unexpected = [r"(layers|mtp)\.\d+\.(embed_tokens|shared_head\.head)\.weight"]

    def __init__(self, config: DeepseekV3Config, *args: Any, **kwargs: Any):
        if type(config) is native.DeepseekV3Config:  # as programs make it that do not know of the plugin
            config = DeepseekV3Config(**config.to_dict())
        if not isinstance(config, DeepseekV3Config):
            raise ValueError(
                f"{type(self).__name__} needs a transformers_dsv3.DeepseekV3Config, not a {type(config).__module__}."
                f"{type(config).__name__}: use `transformers_dsv3.DeepseekV3Config(**config.to_dict())`."
            )
        config.check_fields()
        PreTrainedModel.__init__(self, config, *args, **kwargs)  # not those of native's models, which make its modules
        if not config.num_nextn_predict_layers:
            # accelerate's FSDP refuses names that it does not find
            self._no_split_modules = ["DeepseekV3DecoderLayer"]


class Beginning(NamedTuple):
    """What the layers of a pass start from, and what is known when they have ended; see [`DeepseekV3Model.begin`].

    Args:
        inputs_embeds: `(B, Q, D)`. layer_inputs: the arguments that all layers share.
        given_positions: `position_ids` as they were given. past_length: cached positions before this pass.
        token_mask: `(B, Q)` bool, False for padding; None where there is none, or nothing is trained.
        router_pass: what routers in training know of it; None where nothing is trained.
    """

    inputs_embeds: torch.Tensor
    layer_inputs: dict[str, Any]
    given_positions: torch.Tensor | None
    past_length: int | torch.Tensor
    token_mask: torch.Tensor | None
    router_pass: RouterPass | None


class DeepseekV3Model(DeepseekV3PreTrainedModel, native.DeepseekV3Model):
    """The decoder without a head: latent attention, mixtures of experts, multi-token prediction.

    After DeepSeek-V3's report (arXiv 2412.19437): attention of section 2.1.1, routing and experts of 2.1.2, MTP layers
    of 2.2. `layers` holds the `num_hidden_layers` layers of the main model; `mtp` the MTP layers, which follow them in
    the official checkpoint. A model without any has no `mtp`.
    """

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        config = self.config  # of the plugin's class, where native's was given
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        for_engine = engine_layer(config)
        layer_class = for_engine or DeepseekV3DecoderLayer
        self.layers = nn.ModuleList([layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = native.DeepseekV3RotaryEmbedding(config=config)
        if config.num_nextn_predict_layers and for_engine is None:
            self.mtp = nn.ModuleList([Dsv3MtpLayer(config, depth) for depth in range(config.num_nextn_predict_layers)])
        self.gradient_checkpointing = False
        self.training_state = TrainingState()
        self.decoding = Decoding()
        self.post_init()

    @property
    def mtp_layers(self) -> list[Dsv3MtpLayer]:
        """The MTP layers, by depth."""
        return list(getattr(self, "mtp", ()))

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """`load_state_dict` of official checkpoints, which number the MTP layers behind the others.

        `from_pretrained` renames them by the checkpoint's conversion, which `Trainer` does not when it resumes.
        """
        for renaming in mtp_renamings(self.config, prefix=prefix):
            for name in [name for name in state_dict if name.startswith(prefix)]:
                renamed, _ = renaming.rename_source_key(name)
                if renamed != name:
                    state_dict[renamed] = state_dict.pop(name)  # of torch's own dictionary, not the caller's
        super()._load_from_state_dict(state_dict, prefix, *args)

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
            attention_mask: as in [`DeepseekV3Model.forward`].
            position_ids: `(B or 1, Q)`.
            past_key_values: the cache before this pass.
        """
        if self.config._attn_implementation is None:  # reset around the model, as a composed config does it
            self.set_attn_implementation("sdpa")  # Transformers' default; without any there would be no mask
        return {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        training_pass: TrainingPass | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """
        Args:
            input_ids: `(B, Q)`, or `inputs_embeds` `(B, Q, D)` in its place.
            attention_mask: `(B, S)` over cached and new positions, 0 for padding on either side; or a full 4D mask.
            position_ids: `(B or 1, Q)`; where they begin anew without a cache or a mask, packed sequences that do
                not see each other.
            past_key_values: cache of latents, extended in place.
            use_cache: whether to make a cache where none is given.
            training_pass: losses to carry beside the main one, set up by [`DeepseekV3ForCausalLM`].

        Returns:
            `last_hidden_state` `(B, Q, D)` in the weights' dtype, after the last norm, and the cache, if there is one.
            On request `hidden_states` and `attentions`, tuples over layers, and `router_logits`, fp32 `(B * Q, E)` for
            each mixture layer, before the sigmoid and the correction bias.

        Raises:
            ValueError: for token ids that the embedding does not have, no tokens, or a mask of another batch.
        """
        if native.DeepseekV3Model.forward is not NATIVE_MODEL_FORWARD:  # what somebody has put there
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        if past_key_values is not None and not torch.compiler.is_compiling():
            given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
            hidden_states = self.decoding.run(self, *given, kwargs)
            if hidden_states is not None:
                return MoeModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)
        beginning = self.begin(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, training_pass
        )
        with nullcontext() if beginning.router_pass is None else running(beginning.router_pass):
            outputs: MoeModelOutputWithPast = self._run_layers(
                beginning.inputs_embeds, return_dict=True, **beginning.layer_inputs, **kwargs
            )
        if beginning.router_pass is not None:
            outputs.last_hidden_state = self.finish(outputs.last_hidden_state, beginning, **kwargs)
        return outputs

    def begin(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        training_pass: TrainingPass | None = None,
    ) -> "Beginning":
        """What comes before the layers: inputs are checked and embedded, and what all layers share is made.

        Arguments and errors are those of `forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        check_inputs(
            self.config,
            getattr(self, "embed_tokens", None),  # PEFT takes it from decoders that are given `inputs_embeds`
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_length,
        )

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        rows, length = inputs_embeds.shape[:2]
        token_mask, router_pass = None, None
        # Passes without gradient in training mode are for metrics or for a reference model
        if self.training and torch.is_grad_enabled():
            training_pass = training_pass or TrainingPass()
            training_pass.number_sequences(rows, length, position_ids)
            token_mask = new_token_mask(attention_mask, rows, length, past_length)
            router_pass = RouterPass(training_pass, None if token_mask is None else token_mask.flatten())
            warn_of_unbalanced_training(self)
        given_positions = position_ids
        if position_ids is None:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length)[None]

        # Transformers looks for packed sequences only where there is no cache yet. Positions that begin anew are some;
        # those that jump ahead, as in training for longer contexts, are one sequence, as where native makes the cache.
        makes_cache = use_cache and past_key_values is None
        if makes_cache and not begins_anew(given_positions):
            past_key_values = DynamicCache(config=self.config)
        layer_inputs = self.attention_inputs(inputs_embeds, attention_mask, position_ids, past_key_values)
        if makes_cache and past_key_values is None:
            layer_inputs["past_key_values"] = DynamicCache(config=self.config)
        layer_inputs["use_cache"] = use_cache
        if router_pass is not None:
            layer_inputs["position_ids"] = mark(position_ids, router_pass)
        return Beginning(inputs_embeds, layer_inputs, given_positions, past_length, token_mask, router_pass)

    @capture_outputs
    def _run_layers(self, hidden_states: torch.Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        """The layers of the main model; what Transformers records (attentions, router logits) is of these alone."""
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, **kwargs)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=kwargs["past_key_values"]
        )

    def finish(self, hidden_states: torch.Tensor, beginning: "Beginning", **kwargs: Any) -> torch.Tensor:
        """What comes after the layers in training: losses beside the main one are computed, and go with the result.

        Args:
            hidden_states: `(B, Q, D)`, after the last norm.
            beginning: what `begin` gave. kwargs: those that the layers were given besides.

        Returns:
            `hidden_states`, whose gradient carries these losses.
        """
        if beginning.router_pass is None or beginning.past_length != 0:
            return hidden_states
        training_pass = beginning.router_pass.training_pass
        if training_pass.targets is None:
            return hidden_states
        if training_pass.mtp_loss_weight:
            hidden_states = carry_mtp_loss(
                self,
                hidden_states,
                beginning.inputs_embeds,
                training_pass,
                beginning.token_mask,
                beginning.given_positions,
                beginning.layer_inputs | {"past_key_values": None} | kwargs,
            )
        return hidden_states if training_pass.loss_is_known else await_loss(self, hidden_states, training_pass)


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, Dsv3GenerationMixin, native.DeepseekV3ForCausalLM):
    """The language model: decoder, MTP layers and output head.

    In training the MTP layers' loss (section 2.2) and the sequence-wise balance loss (2.1.2) go with the decoder's
    gradient, weighted by `config.mtp_loss_weight` and `config.seq_aux_loss_weight`; `loss` is without them.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    is_language_model = True

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        config = self.config  # of the plugin's class, where native's was given
        self.model = DeepseekV3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._freeze_idle_mtp_layers()
        self.register_forward_pre_hook(tell_decoder_the_targets, with_kwargs=True)

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
        training_pass: TrainingPass | None = None,
        **kwargs: Any,
    ) -> Dsv3CausalLMOutputWithPast:
        """
        Args:
            labels: `(B, Q)`, -100 where there is no target. Shifted here, as everywhere in Transformers.
            logits_to_keep: compute logits of so many last positions, or of those a tensor names; 0 for all. See
                [`kept_positions`].

        The other arguments are those of [`DeepseekV3Model.forward`].

        Returns:
            `logits` `(B, Q or so many as are kept, vocabulary)` in the weights' dtype, and `loss`, fp32, a mean over
            targets, 0 where `labels` have none. In training, logits that would take more than 512 MiB in fp32 are made
            part by part for the loss, and those of the output when they are read. `skip_logits=True` leaves them out.

        Raises:
            ValueError: as [`DeepseekV3Model.forward`], and for labels of another shape or out of range.
        """
        if native.DeepseekV3ForCausalLM.forward is not NATIVE_LANGUAGE_MODEL_FORWARD:  # what somebody has put there
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        return language_model_forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            training_pass=training_pass,
            **kwargs,
        )


class DeepseekV3ForSequenceClassification(GenericForSequenceClassification, DeepseekV3PreTrainedModel):
    """A score for each label from the last token that is not padding. Reward models are this with one label.

    `logits` are `(B, num_labels)`, of the tokens that [`DeepseekV3Model.forward`] takes; there is no MTP loss.
    """

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        self._freeze_idle_mtp_layers()


class DeepseekV3ForTokenClassification(GenericForTokenClassification, DeepseekV3PreTrainedModel):
    """A score for each label and token: `logits` are `(B, Q, num_labels)`."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        self._freeze_idle_mtp_layers()


# What these do when they are called, for what leaves the call out
FORWARDS = {kind: kind.forward for kind in (DeepseekV3Model, DeepseekV3ForCausalLM)}

# Their names before
Dsv3PreTrainedModel, Dsv3Model, Dsv3ForCausalLM = DeepseekV3PreTrainedModel, DeepseekV3Model, DeepseekV3ForCausalLM
Dsv3ForSequenceClassification = DeepseekV3ForSequenceClassification
Dsv3ForTokenClassification = DeepseekV3ForTokenClassification

__all__ = [
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
    "Dsv3CausalLMOutputWithPast",
]
