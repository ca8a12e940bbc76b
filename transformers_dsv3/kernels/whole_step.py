"""Whether `generate` runs a step of decoding as one CUDA graph: Transformers' compiled path over a static cache."""

from torch import nn


# As in `GenerationMixin._valid_auto_compile_criteria`, which answers with yes or no
DEVICES = ("cuda", "xpu", "neuron", "tpu")


def model_refusal(model: nn.Module) -> str | None:
    """The reason why `generate(…, cache_implementation="static")` does not compile a model's steps, or None.

    Args:
        model: a `PreTrainedModel`.
    """
    if not hasattr(model, "generate"):
        return f"{type(model).__name__} does not generate"
    places = set(getattr(model, "hf_device_map", {}).values())
    if "disk" in places or ("cpu" in places and len(places) > 1):
        return "Transformers compiles no steps of models that are offloaded in part"
    if model.device.type not in DEVICES:
        return f"Transformers compiles steps on GPUs, not on {model.device.type}"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "Transformers compiles no steps over weights that are quantised so"
    if model.generation_config.disable_compile:
        return "generation_config.disable_compile is set"
    return None
