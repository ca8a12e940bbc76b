"""Generation: input checks, prompts padded on the right, which loop runs, what `use_mtp=True` cannot go with."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationMode
from transformers.utils import ModelOutput

from .decoding_loop_dsv3 import decode, loop_refusal
from .inputs_dsv3 import check_inputs
from .mtp_decoding_dsv3 import MtpDecoding, drafting_refusal
from .sampling_dsv3 import NextToken


# Who makes what continues many texts at a time; put there by the part of the package that can
MANAGERS: dict[str, Callable[..., Any]] = {}


class Dsv3GenerationMixin(GenerationMixin):
    """`generate` for DeepSeek-V3 language models."""

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """[`GenerationMixin.generate`], with checked inputs and correct output for prompts padded on the right.

        A prompt padded on the right (as its `attention_mask` tells) is treated as if it were padded on the left; the
        returned sequences start with the prompt as it was given.

        `use_mtp=True` decodes by self-speculation with the model's MTP layers, at any batch size: the same text as
        without for greedy decoding, the same distribution for sampling. Drafting pauses where it does not pay, which
        is measured: so in bf16, whose rounding may depend on how many tokens a pass takes, and in sampling, texts may
        differ from run to run, unless `sampling="exact"` asks for drafts in every pass. See
        [`Dsv3MtpDecoderOnlyOutput`]. Logits processors are called for drafts too, so one's own must not remember their
        calls; stopping criteria see no drafts.

        On the CPU, `do_sample=True` draws from Transformers' distribution without sorting the vocabulary, so a seed
        gives other draws than there. `sampling="exact"`, here or in the generation config, keeps its draws;
        `sampling="fast"` is the default. Where scores or logits are to be returned, Transformers' own loop draws.

        Raises:
            ValueError: for the inputs that [`DeepseekV3Model.forward`] refuses, for what `use_mtp=True` cannot be
                combined with, and for another `sampling`.
        """
        prompt_name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
        prompt = inputs if inputs is not None else kwargs.get(prompt_name)
        if not isinstance(prompt, torch.Tensor) or prompt.dim() != (2 if prompt_name == "input_ids" else 3):
            return super().generate(inputs, *args, **kwargs)
        input_ids, inputs_embeds = (prompt, None) if prompt_name == "input_ids" else (None, prompt)
        mask, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        past_length = past.get_seq_length() if past is not None else 0
        embedding = self.get_input_embeddings()
        check_inputs(self.config, embedding, input_ids, inputs_embeds, mask, None, past_length, wait_for_device=True)
        if not isinstance(mask, torch.Tensor) or mask.shape != prompt.shape[:2] or bool(mask[:, -1].all()):
            return super().generate(inputs, *args, **kwargs)

        if past is not None:
            raise ValueError(
                "A prompt padded on the right cannot be generated from with `past_key_values`: its tokens would lie "
                "elsewhere in the cache than in the prompt. Pad it on the left."
            )
        given_ids = inputs if inputs is not None else kwargs.get("input_ids")
        order = mask.bool().int().argsort(dim=1, stable=True)  # padding first, tokens behind it in their order
        kwargs.pop("position_ids", None)
        kwargs["attention_mask"] = mask.gather(1, order)
        rows = torch.arange(prompt.shape[0], device=prompt.device)[:, None]
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(kwargs.get(name), torch.Tensor) and kwargs[name].shape[:2] == order.shape:
                kwargs[name] = kwargs[name][rows, order]
        output = super().generate(None if inputs is None else inputs[rows, order], *args, **kwargs)
        sequences = output.sequences if isinstance(output, ModelOutput) else output
        if isinstance(output, ModelOutput):
            output.past_key_values = None  # for the same reason
        if given_ids is not None:
            copies = sequences.shape[0] // given_ids.shape[0]
            sequences[:, : given_ids.shape[1]] = given_ids.repeat_interleave(copies, dim=0)
        return output

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
    ) -> Any:
        """A manager of continuous batching, for `generate_batch` and whoever else asks: an engine on pages of latents.

        Transformers' own sizes its pages for keys of `config.head_dim` values, which latents do not have. Members and
        arguments are those of its `ContinuousBatchingManager`, but for tensor parallelism, offloading and pauses.

        Raises:
            ValueError: for settings that cannot go with it, and models that do not run over pages.
        """
        if (kept := self.__dict__.get("_cached_continuous_batching_manager")) is not None:
            return kept
        config = self.generation_config if generation_config is None else generation_config
        if continuous_batching_config is None:
            continuous_batching_config = getattr(config, "continuous_batching_config", None)
        if not isinstance(continuous_batching_config, ContinuousBatchingConfig):
            continuous_batching_config = ContinuousBatchingConfig()
        return MANAGERS["continuous_batching"](self, config, continuous_batching_config, workload_hints)

    def destroy_cached_continuous_batching_manager(self) -> None:
        """Ends a manager that was kept for the next session, and lets its memory go."""
        if (kept := self.__dict__.pop("_cached_continuous_batching_manager", None)) is not None:
            kept.destroy()

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        given = {"sampling": kwargs.pop("sampling")} if "sampling" in kwargs else {}
        config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        # A field of this package's: Transformers keeps such fields of a config, and takes no argument for them
        config.sampling = given.get("sampling", getattr(config, "sampling", None))
        if config.sampling not in (None, "fast", "exact"):
            raise ValueError(f"`sampling` must be 'fast' or 'exact', not {config.sampling!r}.")
        return config, model_kwargs

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if loop_refusal(self, input_ids, stopping_criteria, generation_config, synced_gpus, model_kwargs):
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        exact = getattr(generation_config, "sampling", None) == "exact"  # a caller may have prepared none
        choose = NextToken(logits_processor, generation_config.do_sample, exact)
        return decode(self, input_ids, choose, stopping_criteria, generation_config, streamer, model_kwargs)

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        if not generation_config.use_mtp:
            super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
            return
        if generation_mode != GenerationMode.ASSISTED_GENERATION or generation_config.prompt_lookup_num_tokens:
            raise ValueError("`use_mtp=True` decodes greedily or by sampling: leave beams, DoLa, prompt lookup out.")
        if not self.model.mtp_layers:
            raise ValueError(
                "`use_mtp=True` needs MTP layers, and this model has none (`num_nextn_predict_layers=0`, or its "
                "checkpoint came without their weights)."
            )
        if generation_mode_kwargs.get("assistant_model") is not None:
            raise ValueError("`use_mtp=True` and `assistant_model` both draft tokens: give one of them.")
        if generation_mode_kwargs.get("synced_gpus"):
            raise ValueError(
                "`use_mtp=True` cannot run with `synced_gpus`: ranks would make different numbers of passes."
            )
        if isinstance(self, FSDPModule):
            raise ValueError("`use_mtp=True` cannot run on a model that FSDP has sharded: gather it first.")
        if getattr(self, "_pp_stage", None) is not None:
            raise ValueError(
                "`use_mtp=True` cannot run under pipeline parallelism (`pp_size`): MTP layers need the last stage's "
                "hidden states and the first one's embedding. Leave it out, or use tensor parallelism (`tp_size`)."
            )
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError("`use_mtp=True` cannot run with `guidance_scale`, whose second model would see drafts.")
        if generation_config.output_attentions or generation_config.output_hidden_states:
            raise ValueError("`use_mtp=True` does not collect attentions or hidden states.")

    def _assisted_decoding(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        inputs_tensor: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not generation_config.use_mtp:
            return super()._assisted_decoding(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                inputs_tensor=inputs_tensor,
                **kwargs,
            )
        if reason := drafting_refusal(logits_processor):
            raise ValueError(f"`use_mtp=True` cannot run with this logits processor: {reason}")
        for name in ("assistant_model", "assistant_tokenizer", "tokenizer"):
            kwargs.pop(name, None)
        return MtpDecoding(self, input_ids, logits_processor, stopping_criteria, generation_config, streamer).run(
            kwargs
        )
