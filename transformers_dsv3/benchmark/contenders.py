"""The implementations that run in this process, on one copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

from ..compression.quantize import quantize
from ..models.dsv3 import DeepseekV3ForCausalLM
from .devices import Device
from .rounds import Turn
from .workloads import Inputs, Workload, decode, make_optimizer, prefill, training_step


NATIVE_CLASS = modeling_deepseek_v3.DeepseekV3ForCausalLM


@dataclass(frozen=True)
class Variant:
    """A form of the weights that the plugin runs with.

    Args:
        build: from the model as it is to the one that is timed.
        linear_dtype: what its linear layers multiply in, None for the model's own dtype.
        copies: memory it takes besides the model as it is, in copies of that one in bf16.
    """

    build: Callable[[DeepseekV3ForCausalLM], DeepseekV3ForCausalLM]
    linear_dtype: torch.dtype | None = None
    copies: float = 0.0


def _quantized(bits: int, activations: str | None) -> Callable[[DeepseekV3ForCausalLM], DeepseekV3ForCausalLM]:
    # A twin on the same weights is rounded, since the model as it is is measured too
    return lambda model: quantize(share_weights(model, DeepseekV3ForCausalLM), bits, activations=activations)


VARIANTS = {
    "plain": Variant(lambda model: model),
    "int8": Variant(_quantized(8, "8"), torch.int8, copies=0.53),
    "int4": Variant(_quantized(4, "8"), torch.int8, copies=0.35),
    "int8-whole-activations": Variant(_quantized(8, "16"), copies=0.53),
    "int4-whole-activations": Variant(_quantized(4, "16"), copies=0.35),
}
STATIC = "static"
NATIVE = "transformers"
PLUGIN = "plugin"


def variant_name(variant: str) -> str:
    """What the table calls the plugin with one form of the weights."""
    return PLUGIN if variant == "plain" else f"{PLUGIN} {variant}"


def static_name(name: str) -> str:
    """What the table calls a model that decodes with a static cache."""
    return f"{name} {STATIC}"


def share_weights(model: DeepseekV3ForCausalLM, cls: type[PreTrainedModel] = NATIVE_CLASS) -> PreTrainedModel:
    """The same model in another class, on the same storage: no weight is copied.

    Args:
        cls: native's class, or the plugin's own for a twin whose modules can be replaced one by one.

    Raises:
        RuntimeError: where a parameter of the new model is not one of the old, as with quantised weights.
    """
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise RuntimeError("the checkpoint's weights are quantised, and it would need others")
    config = copy.deepcopy(model.config)
    if cls is NATIVE_CLASS:
        fields = {key: value for key, value in config.to_dict().items() if key not in ("architectures", "dtype")}
        config = configuration_deepseek_v3.DeepseekV3Config(**fields)
    with torch.device("meta"):
        twin = cls._from_config(config, dtype=model.dtype)
    result = twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    # Not part of a state dict
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config=twin.config).to(model.device)
    twin.tie_weights()
    left = [name for name, tensor in [*twin.named_parameters(), *twin.named_buffers()] if tensor.is_meta]
    if result.missing_keys or left:
        raise RuntimeError(f"{cls.__name__} has weights of its own: {(result.missing_keys or left)[0]}")
    return twin.eval()


def plain_generation(model: PreTrainedModel) -> PreTrainedModel:
    """Sets what `generate` goes by: greedy, and never ending early."""
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


class ModelContender:
    """A model of this process.

    Args:
        use_mtp: decode by self-speculation.
        linear_dtype: what its linear layers multiply in, which decides the ceiling they are compared with.
        device: where the model lies.
        static: decode with a static cache, whose steps Transformers compiles on a GPU.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        linear_dtype: torch.dtype,
        use_mtp: bool = False,
        device: Device | None = None,
        static: bool = False,
    ):
        self.name = name
        self.device = device or Device()
        self.static = static
        self.model = plain_generation(model)
        self.linear_dtype = linear_dtype
        self.use_mtp = use_mtp
        # With drafts, how many are accepted decides how often the weights are read
        self.weights = None if use_mtp else model
        self.optimizer: torch.optim.Optimizer | None = None

    def measure(self, workload: Workload, inputs: Inputs, new_tokens: int) -> Turn:
        """One turn of a workload; `new_tokens` are timed where it decodes."""
        if workload.decodes:
            return decode(self.model, inputs, new_tokens, self.use_mtp, self.device, self.static)
        if workload.what == "prefill":
            return prefill(self.model, inputs, self.device)
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model)
        self.model.train()
        try:
            return training_step(self.model, self.optimizer, inputs, self.device)
        finally:
            self.model.eval()

    def rest(self) -> None:
        """Frees what only one workload needed."""
        self.optimizer = None
        if self.static:
            # Graphs and their memory; and the next cache is to be as long as it has to be, not as the longest before
            torch.compiler.reset()
            self.model.__dict__.pop("_previous_max_cache_length", None)
        self.device.tidy()


@torch.inference_mode()
def agreement(model: PreTrainedModel, other: PreTrainedModel, seed: int, length: int = 64) -> dict[str, float]:
    """How far the logits of two models lie apart on random tokens.

    Returns:
        `relative_error`, the largest difference over the largest logit, and `argmax`, the share of positions with the
        same best token.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.config.vocab_size, (1, length), generator=generator).to(model.device)
    one, two = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, other))
    return {
        "relative_error": ((one - two).abs().max() / one.abs().max()).item(),
        "argmax": (one.argmax(-1) == two.argmax(-1)).float().mean().item(),
    }


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The class of a model and the switches that decide which backends serve it, for the JSON file."""
    return {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "attn_implementation": model.config._attn_implementation,
        "experts_implementation": model.config._experts_implementation,
        "transformers": transformers.__version__,
    }
