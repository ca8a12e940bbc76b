"""Reading and writing official DeepSeek-V3 checkpoints through `from_pretrained` and `save_pretrained`.

Reading: the headers of all files are compared with the config and the model before a weight is read, so that a
checkpoint either loads whole or raises an error that names file and tensor. Tensors are then read, some at a time,
into their place in huge pages (see `StoredTensor`, `MergeExperts`): at the peak, memory holds the model and a little
more.

Writing: the official layout, MTP layers included, put in place in one step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import FineGrainedFP8Config, PreTrainedConfig
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.peft import maybe_load_adapters
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .checkpoint_checks_dsv3 import SCALE, CheckpointCheck, mtp_layers_present
from .checkpoint_conversion_dsv3 import (
    MergeExperts,
    deepseek_v3_conversion_mapping,
    mtp_renamings,
    official_name,
    own_storage_above,
)
from .checkpoint_files_dsv3 import CheckpointError, StoredTensor, read_checkpoint, resolve_checkpoint
from .checkpoint_saving_dsv3 import publish, staging
from .checkpoint_scales_dsv3 import loading_problems, unquantised_modules
from .configuration_dsv3 import text_config


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)

# Transformers sets the default dtype and torch.nn.init's functions of the whole process while it loads, so threads
# that load at once would get each other's. Not for ranks, which may be threads and wait for each other.
_loading = threading.RLock()

# Name of our reader of DeepSeek's FP8 format among Transformers' quantization methods (compression/quantizer_fp8.py).
FP8_METHOD = "deepseek_fp8"
# And of our reader of weights that stay packed (compression/packed/quantizer.py)
PACKED_METHOD = "packed_weights"

# Readers of other formats, which their modules register: by format, a function from a file's path, a function from the
# name of another file of the same model to its path, and the user's `quantization_config` to a state dict that has
# `config()` (fields of the config), `completed(config)` (with what one file of several does not tell), `dtype` (that
# `dtype="auto"` means) and `into(model)`, which gives the weights of a model on the meta device.
READERS: dict[str, Callable[[str, Callable[[str], str], Any], Any]] = {}

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Arguments of `from_pretrained` that the config would swallow: attributes of it, or arguments of its own loading.
_NOT_FOR_THE_CONFIG = (
    "dtype",
    "torch_dtype",
    "quantization_config",
    "trust_remote_code",
    "_from_auto",
    "_from_pipeline",
)


class Dsv3CheckpointMixin(_Base):
    """`from_pretrained` and `save_pretrained` of the DeepSeek-V3 models; goes in front of `PreTrainedModel`."""

    # The decoder's place in a model that has other layers too, with a dot behind it
    decoder_prefix = ""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transformers' `from_pretrained` for an official checkpoint, checked before a weight is read.

        - Safetensors only: a place with nothing but pickled weights is refused unless `use_safetensors=False` is
          given.
        - Files that are truncated, missing or contradict their index, and tensors that are missing, of the wrong
          shape or beyond the number of experts raise [`CheckpointError`] naming file and tensor. Other unexpected
          tensors and a missing head are listed by Transformers, as for any model. `ignore_mismatched_sizes=True`
          accepts other shapes. Codes in integers or FP8, and scales of weights, are refused where nothing reads them
          as such. With a quantization method that is not named below only that and the files are checked.
        - MTP layers that the config announces and the files lack (native `save_pretrained` drops them) are left out
          with a warning, and `config.num_nextn_predict_layers` says how many there are.
        - Weights of compressed-tensors' `pack-quantized` and `int-quantized` formats, of GPTQ and of AWQ stay packed,
          8 or 4 bits in groups of 32, where that holds them exactly; what is dequantised to `dtype` instead a warning
          names. `quantization_config=PackedWeightsConfig(dequantize=True)` dequantises all.
        - DeepSeek's FP8 format is dequantised to `dtype` on any device, by default everywhere: absorbed attention
          multiplies by `kv_b_proj` in parts, which needs real weights. Native FP8 kernels can be asked for with
          `quantization_config=FineGrainedFP8Config()`; that path is Transformers' own, and what is not FP8 on disk
          (`eh_proj`) stays so.
        - `gguf_file=` names a file of llama.cpp's `deepseek2` architecture in that place, or the first of several. Its
          Q8_0 and Q4_0 weights stay as they are and are computed with so, so that memory is about the file's size;
          all other types are dequantised. `quantization_config=transformers.GgufConfig(dequantize=True)` makes plain
          weights of all, which can be trained and saved. `dtype` is that of all else, by default the file's: bf16
          where it is quantised. MTP layers are loaded where the file has them.
        - Threads may load at once: they wait for each other.

        Raises:
            CheckpointError: a checkpoint that does not fit, see above.
        """
        location = pretrained_model_name_or_path
        if location is None:
            return super().from_pretrained(location, *model_args, config=config, **kwargs)
        if (gguf_file := kwargs.pop("gguf_file", None)) is not None:
            return cls._from_gguf(os.fspath(location), gguf_file, *model_args, config=config, **kwargs)

        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        held = {name: kwargs.pop(name) for name in _NOT_FOR_THE_CONFIG if name in kwargs}
        # The folder of a PEFT adapter names the model that its weights come from
        _, base_location, _ = maybe_load_adapters(location, dict(hub), **(kwargs.get("adapter_kwargs") or {}))
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            config, kwargs = cls.config_class.from_pretrained(
                base_location if config is None else config, return_unused_kwargs=True, **hub, **kwargs
            )
        files, stored = None, {}
        if kwargs.get("use_safetensors") is not False:
            files = resolve_checkpoint(
                str(base_location), kwargs.get("variant"), getattr(config, "transformers_weights", None), hub
            )
            hub.pop("force_download", None)  # done: what follows reads the fresh files
            if files is not None:
                renamings = [WeightRenaming(*pair) for pair in (kwargs.get("key_mapping") or {}).items()]
                stored = renamed_table(read_checkpoint(files.files, files.index), renamings)
                cls._fit_config(config, stored, str(base_location))
        _choose_fp8_reader(config, held.get("quantization_config"))
        if files is not None and _choose_packed_reader(
            config, held.get("quantization_config"), {**(kwargs.get("key_mapping") or {}), **cls._renamings()}
        ):
            held.pop("quantization_config", None)
        elif files is not None:
            held["quantization_config"] = _with_exceptions(config, held.get("quantization_config"), stored)
        is_rank = torch.distributed.is_available() and torch.distributed.is_initialized()
        with contextlib.nullcontext() if is_rank else _loading:
            return super().from_pretrained(location, *model_args, config=config, **hub, **held, **kwargs)

    @classmethod
    def _from_gguf(
        cls, location: str, gguf_file: str, *model_args: Any, config: Any = None, dtype: Any = None, **kwargs: Any
    ) -> Any:
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        kwargs.pop("adapter_kwargs", None)
        given = kwargs.pop("torch_dtype", None)
        dtype = given if dtype is None else dtype

        def find(name: str) -> str:
            return name if os.path.isfile(name) else cached_file(location, name, **hub)

        weights = READERS["gguf"](find(gguf_file), find, kwargs.pop("quantization_config", None))
        config = cls.config_class(**weights.config()) if config is None else weights.completed(copy.deepcopy(config))
        dtype = weights.dtype if dtype in (None, "auto") else dtype
        is_rank = torch.distributed.is_available() and torch.distributed.is_initialized()
        with contextlib.nullcontext() if is_rank else _loading:
            loaded = super().from_pretrained(
                None, *model_args, config=config, state_dict=weights, dtype=dtype, **kwargs
            )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = location
        return loaded

    @classmethod
    def _load_pretrained_model(
        cls,
        model: Any,
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        """Transformers' step between the model on the meta device and its weights: check the headers, read lazily.

        `expected_keys` comes with an adapter's weights: these are refused unless they fit as a whole.
        """
        if state_dict is not None and hasattr(state_dict, "into"):  # of one of `READERS`
            state_dict = state_dict.into(model)
        files = checkpoint_files or []
        given = [step for step in load_config.weight_mapping or [] if isinstance(step, WeightRenaming)]
        if expected_keys is None and not any(isinstance(s, WeightConverter) for s in load_config.weight_mapping or []):
            # A `model_type` of somebody's own, of which Transformers knows no conversion
            mapping = [*(load_config.weight_mapping or []), *deepseek_v3_conversion_mapping()]
            load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        if load_config.weight_mapping is not None:
            load_config.weight_mapping.extend(mtp_renamings(model.config, model.decoder_prefix))
        if state_dict is None and expected_keys is None and files and all(f.endswith(".safetensors") for f in files):
            stored = renamed_table(read_checkpoint(files), given)
            quantizer = load_config.hf_quantizer
            method = None if quantizer is None else quantizer.quantization_config.quant_method
            is_fp8 = method == FP8_METHOD
            if method == PACKED_METHOD:
                loading = quantizer.loading
                compare = _compares_shapes(load_config)
                _refuse(load_config, fit_problems(model, loading.headers, compare, expected=loading.expected))
                if load_config.device_mesh is not None or is_deepspeed_zero3_enabled() or sys.byteorder != "little":
                    raise CheckpointError(
                        f"{files[0]}: packed weights are read in one process, on a processor whose lowest bytes come "
                        "first. Load the checkpoint dequantised, `save_pretrained` it, and load that"
                    )
                state_dict = loading.tensors
            elif quantizer is None or is_fp8:
                block_size = quantizer.quantization_config.weight_block_size if is_fp8 else None
                _refuse(load_config, fit_problems(model, stored, _compares_shapes(load_config), block_size=block_size))
                # Sharded loading reads slices of mapped files, ZeRO-3 gathers: both are better served by Transformers
                if load_config.device_mesh is None and not is_deepspeed_zero3_enabled() and sys.byteorder == "little":
                    state_dict = _unread(stored, load_config.weight_mapping or [], is_fp8)
                    if is_fp8:
                        # By their names in the model already: Transformers 5.17 leaves what it renames of a quantised
                        # checkpoint in the dtype on disk
                        of_mtp = mtp_renamings(model.config, model.decoder_prefix)
                        state_dict = {_renamed(name, of_mtp): tensor for name, tensor in state_dict.items()}
                elif is_fp8:
                    raise CheckpointError(
                        f"{files[0]}: FP8 weights cannot be dequantised while they are sharded. Load the checkpoint "
                        "in one process, `save_pretrained` it, and load that"
                    )
            else:
                on_disk = {tensor.name: tensor for tensor in stored.values()}
                is_pre_quantized = quantizer.pre_quantized
                _refuse(
                    load_config,
                    loading_problems(model, on_disk, load_config.weight_mapping or [], is_pre_quantized),
                )
        loaded = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        if expected_keys is not None and any(".lora_" in key for key in expected_keys):
            _check_adapter(loaded[0], list(model.peft_config)[-1])
        used = getattr(model, "_weight_conversions", None)
        if expected_keys is None and used is not None:
            # Saving reverts what loading used, which for another model's state dict, with its names, is nothing
            if not any(isinstance(step, WeightConverter) for step in used):
                used = [*used, *deepseek_v3_conversion_mapping()]
            of_mtp = mtp_renamings(model.config, model.decoder_prefix)
            model._weight_conversions = [step for step in used if repr(step) not in map(repr, of_mtp)] + of_mtp
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing, as `DeepseekV3Config.register_for_auto_class`."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Transformers' `save_pretrained` in the official layout, put in place when it is complete.

        MTP layers get the copies of the embedding and of the head that official checkpoints carry. The files are
        written to a hidden folder inside `save_directory` and moved when all are there, the entry point (single file
        or index) last, and weights of an earlier save that would be read in their place are removed. So a save that
        fails leaves the earlier checkpoint as it was, a model can be saved where it was loaded from, and of several
        processes or threads that save to one folder each puts its checkpoint in place whole. Saves that
        upload (`push_to_hub=True`) or that several processes write together go straight to `save_directory`.
        """
        if getattr(self, "_weight_conversions", None) is None:
            # Of a model that was not loaded Transformers would revert what is registered for its type, which does not
            # know how many layers there are
            of_mtp = mtp_renamings(self.config, self.decoder_prefix)
            self._weight_conversions = [*self._conversions_to_save(), *of_mtp]
        distributed = getattr(self.config, "distributed_config", None) is not None
        if not distributed and not kwargs.get("distributed_checkpoint"):
            state_dict = self._with_mtp_copies(state_dict)
            if state_dict is not None and kwargs.get("save_original_format") is False:
                # Nothing is reverted then, experts stay stacked; MTP layers keep their official names all the same
                state_dict = {official_name(name, self.config): tensor for name, tensor in state_dict.items()}
        limit = kwargs.get("max_shard_size")
        arguments = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        if (
            push_to_hub
            or distributed
            or kwargs.get("distributed_checkpoint")
            or os.path.isfile(save_directory)
            or not self.should_save_on_this_rank(is_main_process)
        ):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)

        os.makedirs(save_directory, exist_ok=True)
        with own_storage_above(limit), staging(os.fspath(save_directory)) as folder:
            super().save_pretrained(folder, **arguments)
            self._write_config(folder)
            publish(folder, os.fspath(save_directory), kwargs.get("variant"))

    @classmethod
    def _renamings(cls) -> dict[str, str]:
        """From names in official files to those in the model, but for MTP layers; patterns as Transformers' are."""
        return {}

    @classmethod
    def _fit_config(cls, config: Any, stored: Mapping[str, StoredTensor], location: str) -> None:
        """Changes in the config what the files do not hold: MTP layers that were not saved."""
        _leave_out_absent_mtp_layers(config, stored, location)

    def _write_config(self, folder: str) -> None:
        """Puts right what Transformers wrote of the config."""

    def _conversions_to_save(self) -> list[Any]:
        """What is reverted when a model is saved that was not loaded, but for the names of MTP layers."""
        return list(deepseek_v3_conversion_mapping())

    def _with_mtp_copies(self, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        """The state dict to save, with each MTP layer's copy of embedding and head.

        Copies of their own storage: safetensors refuses shared ones. Nothing is added where the tensors are not at
        hand: adapters, weights that are offloaded (on the meta device), processes that hold no full state dict.
        """
        count = getattr(text_config(self.config), "num_nextn_predict_layers", 0)
        is_adapted = getattr(self, "_hf_peft_config_loaded", False)
        if not count or is_adapted or getattr(self, "hf_quantizer", None) is not None:
            return state_dict
        if state_dict is None:
            state_dict = self.state_dict()
        base = self.decoder_prefix or ("" if self.base_model is self else f"{self.base_model_prefix}.")
        embedding = state_dict.get(f"{base}embed_tokens.weight")
        has_head = any(name == "lm_head" for name, _ in self.named_children())
        head = state_dict.get("lm_head.weight", embedding if has_head and self.config.tie_word_embeddings else None)
        sources = {"embed_tokens.weight": embedding, "shared_head.head.weight": head}
        present = {name: tensor for name, tensor in sources.items() if tensor is not None}
        copies = {
            f"{base}mtp.{depth}.{name}": tensor.detach().to("cpu", copy=True)
            for depth in range(count)
            for name, tensor in present.items()
            if tensor.device.type != "meta" and f"{base}mtp.{depth}.eh_proj.weight" in state_dict
        }
        return {**state_dict, **copies}


def _check_adapter(info: Any, name: str) -> None:
    """Transformers lists what an adapter has no place for, or lacks, and goes on.

    Args:
        name: the adapter's. Tensors of those that the model has already are listed as missing, and are not.
    """
    own = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
    for keys, problem in (
        (info.unexpected_keys, "it has weights for what this model does not adapt or have"),
        (info.missing_keys, "it lacks weights of"),
    ):
        if names := sorted(key for key in keys if own.search(key)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"the adapter does not fit this model: {problem} {', '.join(names[:3])}{more}")


def renamed_table(stored: Mapping[str, StoredTensor], renamings: list[WeightRenaming]) -> dict[str, StoredTensor]:
    """The checkpoint's tensors by the names that Transformers' renamings (the user's `key_mapping`) give them."""
    renamed = {}
    for name, tensor in stored.items():
        tensor.key = _renamed(name, renamings)
        renamed[tensor.key] = tensor
    return renamed


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _leave_out_absent_mtp_layers(config: Any, stored: Mapping[str, StoredTensor], location: str) -> None:
    """Lower `config.num_nextn_predict_layers` to the MTP layers that the files hold, and say so."""
    config = text_config(config)
    announced = getattr(config, "num_nextn_predict_layers", 0)
    if not announced:
        return
    present = mtp_layers_present(list(stored), config.num_hidden_layers, announced)
    if present < announced:
        absent = [f"model.layers.{config.num_hidden_layers + k}" for k in range(present, announced)]
        logger.warning(
            f"{location}: the config announces {announced} MTP layer(s), but there are no MTP tensors of "
            f"{', '.join(absent)}. Loading with num_nextn_predict_layers={present}."
        )
        config.num_nextn_predict_layers = present


def _choose_fp8_reader(config: Any, requested: Any) -> None:
    """Send DeepSeek's FP8 format to our reader, unless the user asked for another one by `quantization_config=`."""
    stored = getattr(config, "quantization_config", None)
    if stored is None or FP8_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    fields = dict(stored) if isinstance(stored, Mapping) else stored.to_dict()
    wanted = getattr(requested, "quant_method", None) if requested is not None else FP8_METHOD
    is_block_fp8 = fields.get("quant_method") == "fp8" and len(fields.get("weight_block_size") or ()) == 2
    if is_block_fp8 and fields.get("activation_scheme", "dynamic") == "dynamic" and wanted == FP8_METHOD:
        config.quantization_config = {**fields, "quant_method": FP8_METHOD}


def _choose_packed_reader(config: Any, requested: Any, key_mapping: Mapping[str, str]) -> bool:
    """Send formats of quantised weights that our reader keeps packed to it; whether that was done."""
    stored, reader = getattr(config, "quantization_config", None), AUTO_QUANTIZATION_CONFIG_MAPPING.get(PACKED_METHOD)
    if stored is None or reader is None:
        return False
    fields = dict(stored) if isinstance(stored, Mapping) else stored.to_dict()
    if (chosen := reader.reading(fields, requested, key_mapping)) is None:
        return False
    config.quantization_config = chosen
    return True


def _with_exceptions(config: Any, requested: Any, stored: Mapping[str, StoredTensor]) -> Any:
    """Native's FP8 config, as asked for, with the layers that the checkpoint holds unquantised among its exceptions.

    Native takes every linear layer for quantised that the config does not name, and DeepSeek's names none.
    """
    fields = getattr(config, "quantization_config", None)
    if not isinstance(requested, FineGrainedFP8Config) or not isinstance(fields, Mapping):
        return requested
    named = requested.modules_to_not_convert or fields.get("modules_to_not_convert") or []
    requested = copy.deepcopy(requested)
    requested.modules_to_not_convert = list(dict.fromkeys([*named, "lm_head", *unquantised_modules(stored)]))
    return requested


def _compares_shapes(load_config: Any) -> bool:
    return not load_config.ignore_mismatched_sizes and load_config.device_mesh is None


def _refuse(load_config: Any, problems: list[str]) -> None:
    """Raise `CheckpointError` with everything that is wrong between the checkpoint's headers and the model."""
    if problems:
        raise CheckpointError(
            f"The checkpoint at {load_config.pretrained_model_name_or_path} does not fit its config; nothing was "
            f"loaded.\n  " + "\n  ".join(problems[:20])
        )


def expected_tensors(model: Any) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of what a model holds."""
    tensors = model.state_dict().items()
    return {official_name(name, model.config): tuple(tensor.shape) for name, tensor in tensors if tensor.numel()}


def fit_problems(
    model: Any,
    stored: Mapping[str, StoredTensor],
    compare_shapes: bool = True,
    block_size: Any = None,
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> list[str]:
    """What is wrong between a checkpoint's headers and a model, which may be on the meta device; empty where it fits.

    See `CheckpointCheck` for the arguments; `expected` unless the model says.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    return CheckpointCheck(
        # Transformers' modules exist at size zero too (no shared experts); a checkpoint need not hold those
        expected=expected or expected_tensors(model),
        stored=stored,
        base_prefix="" if model.base_model is model else model.base_model_prefix,
        optional=lambda name: name in tied or any(pattern.search(name) for pattern in ignored),
        compare_shapes=compare_shapes,
        block_size=block_size,
    ).problems()


def _unread(stored: Mapping[str, StoredTensor], weight_mapping: list[Any], is_fp8: bool) -> dict[str, StoredTensor]:
    """The tensors as Transformers' loader takes them; those that our conversion operations read are deferred.

    Those are experts, and with `is_fp8` every weight with a scale. `stored` has the names after Transformers'
    renamings; the result has those on disk, which the loader renames again.
    """
    merging = [
        step
        for step in weight_mapping
        if isinstance(step, WeightConverter) and isinstance(step.operations[0], MergeExperts)
    ]
    for name, tensor in stored.items():
        is_scaled = is_fp8 and (name.endswith(SCALE) or name + SCALE in stored)
        tensor.deferred = is_scaled or (
            ".experts." in name and any(step.rename_source_key(name)[1] is not None for step in merging)
        )
    return {tensor.name: tensor for tensor in stored.values()}


__all__ = [
    "FP8_METHOD",
    "CheckpointError",
    "Dsv3CheckpointMixin",
    "deepseek_v3_conversion_mapping",
]
