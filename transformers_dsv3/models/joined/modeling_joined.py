"""What native's models with a vision tower lack for DeepSeek-V3's text, as a mixin in front of their classes.

Their own forward embeds pictures between the words and calls the decoder, which is ours. Around it stands what the
text model does by itself: losses beside the main one, checked checkpoints with MTP layers, and `generate`, which runs
on the text model around the same decoder and head, once pictures have become embeddings.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.models.deepseek_v3 import configuration_deepseek_v3

from ..dsv3.checkpoint_dsv3 import Dsv3CheckpointMixin
from ..dsv3.configuration_dsv3 import DeepseekV3Config
from ..dsv3.language_model_dsv3 import Dsv3TrainedMixin, language_model_forward
from ..dsv3.modeling_dsv3 import DeepseekV3ForCausalLM, DeepseekV3PreTrainedModel
from ..dsv3.objectives_dsv3 import tell_decoder_the_targets
from ..dsv3.outputs_dsv3 import Dsv3CausalLMOutputWithPast
from ..dsv3.quantized_dsv3 import Dsv3QuantizedMixin
from .features import FeatureCache


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

TEXTS = ("deepseek_v3", "kimi_k2")


class JoinedMixin(Dsv3TrainedMixin, Dsv3CheckpointMixin, Dsv3QuantizedMixin, _Base):
    """Goes in front of a class of native's for pictures and text, whose decoder is a [`DeepseekV3Model`].

    Attributes:
        native_class: native's, which serves any other text. picture_inputs: arguments of `forward` that tell of
            pictures.
    """

    native_class: ClassVar[type]
    picture_inputs: ClassVar[tuple[str, ...]]
    decoder_prefix = "model.language_model."
    is_language_model = True
    accepts_loss_kwargs = True
    _keep_in_fp32_modules_strict = DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict
    _keys_to_ignore_on_load_unexpected = DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected

    def __init__(self, config: Any):
        if (reason := self.refusal(config)) is not None:
            raise ValueError(
                f"{type(self).__name__} of transformers_dsv3 does not take {reason}: "
                f"`transformers.{self.native_class.__name__}` does."
            )
        config = self.prepared(config)
        config.text_config.check_fields()
        super().__init__(config)
        self.config.text_config = self.get_decoder().config  # one object, so that what is set in it holds for both
        self._freeze_idle_mtp_layers()
        self.register_forward_pre_hook(tell_decoder_the_targets, with_kwargs=True)  # type: ignore[arg-type]

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """What of a config's model is left to native's class, or None where this one serves it."""
        text = getattr(getattr(config, "text_config", None), "model_type", None)
        return None if text in TEXTS else f"a text of type {text}, not {' or '.join(TEXTS)}"

    @classmethod
    def prepared(cls, config: Any) -> Any:
        """A copy of a config with text of our class, and one answer to whether the head is the embedding.

        The text's own `tie_word_embeddings` defaults to False, native's beside it to True: a head of its own is lost
        unless both say so. Only where both say that it is the embedding, it is.
        """
        config = copy.deepcopy(config)
        if type(config.text_config) is configuration_deepseek_v3.DeepseekV3Config:  # by programs that know no plugin
            config.text_config = DeepseekV3Config(**config.text_config.to_dict())
        tied = bool(config.tie_word_embeddings and config.text_config.tie_word_embeddings)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """[`Dsv3CheckpointMixin.from_pretrained`] where the text is ours; any other opens in native's class."""
        if not isinstance(config, PreTrainedConfig):
            names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **hub)  # type: ignore[union-attr]
        if cls.refusal(config) is not None:
            return cls.native_class.from_pretrained(  # type: ignore[attr-defined]
                pretrained_model_name_or_path, *model_args, config=config, **kwargs
            )
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if cls.refusal(config) is not None:
            return cls.native_class._from_config(config, **kwargs)  # type: ignore[attr-defined]
        return super()._from_config(config, **kwargs)  # type: ignore[misc]

    @classmethod
    def _fit_config(cls, config: Any, stored: Any, location: str) -> None:
        super()._fit_config(config, stored, location)
        # Native ties a head by its own field alone, so a file of its may have none though the text's config says so
        if config.tie_word_embeddings and not any(name.endswith("lm_head.weight") for name in stored):
            config.text_config.tie_word_embeddings = True

    def _conversions_to_save(self) -> list[Any]:
        conversions = get_model_conversion_mapping(self, add_legacy=False)
        # Those of a part alone are official names: a tower of CLIP's lies in `vision_model`
        return [step for step in conversions if not isinstance(step, PrefixChange) or step.scope_prefix]

    def _write_config(self, folder: str) -> None:
        """Transformers leaves out of a nested config what the text's own class writes into a file."""
        path = os.path.join(folder, "config.json")
        if not os.path.isfile(path):  # of an adapter
            return
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        text = json.loads(self.config.text_config.to_json_string())
        text.pop("transformers_version", None)
        fields["text_config"] = {**text, "architectures": ["DeepseekV3ForCausalLM"]}
        for part in ("text_config", "vision_config"):
            fields[part]["dtype"] = fields["dtype"]
        self._official(fields)
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(fields, indent=2, sort_keys=True) + "\n")

    def _official(self, fields: dict[str, Any]) -> None:
        """Puts what else is official into the fields of a config that is about to be written."""

    @property
    def causal_lm(self) -> DeepseekV3ForCausalLM:
        """The language model around the same decoder and head, without pictures.

        It generates, and serves whatever asks for a [`DeepseekV3ForCausalLM`]. Its weights are this model's own.
        """
        model = self.__dict__.get("_causal_lm")
        if model is None:
            model = DeepseekV3ForCausalLM.__new__(DeepseekV3ForCausalLM)
            DeepseekV3PreTrainedModel.__init__(model, self.config.text_config)
            model.vocab_size = self.config.text_config.vocab_size
            self.__dict__["_causal_lm"] = model  # of this one's parts: no module of its own
        model.model, model.lm_head = self.get_decoder(), self.lm_head
        model.generation_config, model.training = self.generation_config, self.training
        model.name_or_path = self.name_or_path
        return model

    def _forward(self, input_ids: Any, inputs_embeds: Any, past_key_values: Any, **kwargs: Any) -> Any:
        """[`language_model_forward`], checked; `kwargs` are its other arguments and native's, those given."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        if input_ids is not None and not torch.compiler.is_compiling():
            is_first = past_key_values is None or past_key_values.get_seq_length() == 0
            self.check_pictures(input_ids, given, is_first)
        outputs: Dsv3CausalLMOutputWithPast = language_model_forward(
            self,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            **{"attention_mask": None, "position_ids": None, "labels": None, "use_cache": None, "logits_to_keep": 0}
            | given,
        )
        return outputs

    def picture_tokens(self, **pictures: Any) -> dict[str, int]:
        """How many tokens the given pictures take, by the id of the token in whose places they stand."""
        raise NotImplementedError

    def check_pictures(self, input_ids: torch.Tensor, pictures: dict[str, Any], is_first: bool = True) -> None:
        """Refuses prompts whose places for pictures are not as many as the pictures take.

        Args:
            input_ids: `(B, Q)`. pictures: arguments of `forward`, by name.
            is_first: whether nothing is cached: places without any picture are refused then.

        Raises:
            ValueError: saying which are more.
        """
        if input_ids.is_meta or pictures.get("mm_encoder_outputs") is not None:
            return
        given = {name: pictures[name] for name in self.picture_inputs if pictures.get(name) is not None}
        if not given and not is_first:
            return  # a token that the model itself has written
        for field, wanted in self.picture_tokens(**given).items():
            token = getattr(self.config, field)
            found = int((input_ids == token).sum())
            if found == wanted:
                continue
            hint = "give them with their pictures" if not wanted else "use the processor that made the pictures"
            if 0 < found < wanted:
                hint = "were some cut off, by `max_length` or `truncation`? " + hint
            raise ValueError(
                f"`input_ids` has {found} tokens of id {token} (`{field}`), and the pictures take {wanted}: {hint}."
            )

    def merged(self, input_ids: torch.Tensor, keep: bool = False, **pictures: Any) -> torch.Tensor:
        """Embeddings `(B, Q, D)` of a prompt `(B, Q)` with the features of its pictures in their places.

        Args:
            keep: whether features are kept for the next prompt with the same pictures; they have no gradients then.
            pictures: arguments of `forward`.
        """
        raise NotImplementedError

    def _kept_features(self, pictures: Sequence[torch.Tensor], compute: Any) -> list[torch.Tensor]:
        cache = self.__dict__.setdefault("_feature_cache", FeatureCache())
        parts = [module for name, module in self.model.named_children() if name != "language_model"]
        return cache.features(pictures, [weight for part in parts for weight in part.parameters()], compute)  # type: ignore[no-any-return]

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """[`DeepseekV3ForCausalLM.generate`] of a prompt with pictures, `use_mtp=True` and the rest included.

        A picture that was seen before, in the same conversation or another one, does not go through the tower again.

        Raises:
            ValueError: as there, and for pictures that do not fit the prompt.
        """
        names = (*self.picture_inputs, "mm_encoder_outputs")
        pictures = {name: value for name in names if (value := kwargs.pop(name, None)) is not None}
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if pictures and (ids is None or kwargs.get("inputs_embeds") is not None):
            raise ValueError("Pictures go into their places in `input_ids`: give these, and no `inputs_embeds`.")
        if ids is not None and kwargs.get("inputs_embeds") is None:
            cache = kwargs.get("past_key_values")
            self.check_pictures(ids, pictures, cache is None or cache.get_seq_length() == 0)
        if pictures:
            with torch.no_grad():
                embeds = self.merged(ids, keep=not self.training, **pictures)  # type: ignore[arg-type]
            inputs, kwargs["input_ids"], kwargs["inputs_embeds"] = None, ids, embeds
        return self.causal_lm.generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """[`DeepseekV3ForCausalLM.init_continuous_batching`], whose requests may bring pictures.

        `manager.add_request(input_ids, pictures={"pixel_values": ...})` takes what the processor gives.
        """
        manager = self.eval().causal_lm.init_continuous_batching(*args, **kwargs)
        manager.joined = self
        return manager

    def destroy_cached_continuous_batching_manager(self) -> None:
        """Ends a manager that was kept for the next session, and lets its memory go."""
        self.causal_lm.destroy_cached_continuous_batching_manager()


class TextAlone:
    """What `AutoModelForCausalLM` opens a checkpoint with a vision tower by: its text, whose pictures stay out."""

    joined_class: ClassVar[Any]
    config_class: ClassVar[type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any, **kwargs: Any) -> Any:
        """The language model of a checkpoint, a [`DeepseekV3ForCausalLM`]; arguments as the joined class's."""
        cls._check(config)
        loaded = cls.joined_class.from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        return (loaded[0].causal_lm, *loaded[1:]) if isinstance(loaded, tuple) else loaded.causal_lm

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        cls._check(config)
        return cls.joined_class._from_config(config, **kwargs).causal_lm

    @classmethod
    def _check(cls, config: Any) -> None:
        if (reason := cls.joined_class.refusal(config)) is not None:
            raise ValueError(
                f"Unrecognized configuration for AutoModelForCausalLM: {type(config).__name__} with {reason}. Use "
                "AutoModelForImageTextToText."
            )


def text_alone(joined_class: Any) -> type[TextAlone]:
    """[`TextAlone`] of a class with a tower."""
    fields = {"joined_class": joined_class, "config_class": joined_class.config_class, "__module__": __name__}
    return type(f"TextOf{joined_class.__name__}", (TextAlone,), fields)
