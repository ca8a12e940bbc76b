"""The sections of a model card that tell how a model is loaded, what it cannot do, and on which terms it is shared."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from .card_sources import CardSources
from .markdown import block, count, document, plain


# What vLLM's attention over latents takes together, and which models without a query LoRA llama.cpp knows
VLLM_LATENTS = (320, 576)
LLAMA_CPP_LAYERS = (26, 27, 48)
AUTO_CLASSES = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "Model": ("AutoModel", "feature-extraction"),
}


def auto_class(architecture: str) -> tuple[str, str]:
    """The Auto class that opens an architecture, and its task on the Hub."""
    for suffix, found in AUTO_CLASSES.items():
        if architecture.endswith(suffix):
            return found
    return AUTO_CLASSES["ForCausalLM"]


def usage_section(sources: CardSources, name: str, base: str | None) -> str:
    """How to load it, with the plugin and without, by whom it cannot be loaded and why.

    Args:
        name: as `from_pretrained` takes it.
        base: the same of an adapter's base model.
    """
    if sources.adapter is not None:
        return document(["## Use", *_adapter_usage(sources, name, base)])
    config = sources.config
    assert config is not None
    parts = ["## Use", *_model_usage(sources, config, name)]
    if auto_class(sources.architecture)[1] == "text-generation":
        parts += [f"**vLLM**: {_vllm(config, name)}", *_llama_cpp(config, name)]
    return document(parts)


def limits_section(sources: CardSources) -> str:
    return document(["## Limits", "\n".join(f"- {limit}" for limit in _limits(sources))])


def license_section(license: str | None, license_name: str | None, license_link: str | None) -> str:
    if license in (None, "unknown"):
        told = "Not stated. Ask those who share the model before you use it."
    else:
        named = plain(license if license_name is None else license_name)
        told = f"{named}." if license_link is None else f"[{named}]({license_link})."
    return document(["## Licence", f"{told} The records do not know the licence of the training data."])


def _model_usage(sources: CardSources, config: DeepseekV3Config, name: str) -> Iterator[str]:
    loader, task = auto_class(sources.architecture)
    yield "With the `transformers-dsv3` package installed (`pip install .` in its source):"
    lines = [
        "import transformers_dsv3  # registers its classes over `deepseek_v3`",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
        f"model = {loader}.from_pretrained({json.dumps(name)})",
        'inputs = tokenizer("The", return_tensors="pt")',
    ]
    if task == "text-generation":
        mtp = ", use_mtp=True" if config.num_nextn_predict_layers else ""
        lines += [
            f"output = model.generate(**inputs, max_new_tokens=64{mtp})",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    else:
        lines.append("output = model(**inputs)")
    yield block("\n".join(lines), "python")
    if config.moe_layer_freq != 1:
        yield (
            "**Plain Transformers** opens it as a different model: it does not know "
            f"`moe_layer_freq={config.moe_layer_freq}`."
        )
        return
    without = ""
    if config.num_nextn_predict_layers:
        without = " It leaves the MTP layers out, lists their tensors as unexpected, and knows no `use_mtp`."
    packed = (getattr(config, "quantization_config", None) or {}).get("quant_method") == "compressed-tensors"
    needs = " with the `compressed-tensors` package installed," if packed else ""
    yield (
        f"**Plain Transformers** opens the same files,{needs} without the import and without `trust_remote_code`, in "
        f"its own `deepseek_v3` class.{without}"
    )


def _vllm(config: DeepseekV3Config, name: str) -> str:
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    numbers = f"`kv_lora_rank + qk_rope_head_dim` is {latent}"
    if latent not in VLLM_LATENTS:
        either = " or ".join(map(str, VLLM_LATENTS))
        return f"not this model. Its attention over latents takes {either} values, and here {numbers}."
    return f"`vllm serve {name} --model-impl transformers` ({numbers}, one of the sizes that it takes)."


def _llama_cpp(config: DeepseekV3Config, name: str) -> Iterator[str]:
    layers = config.num_hidden_layers
    if not config.q_lora_rank and layers not in LLAMA_CPP_LAYERS:
        known = f"{', '.join(map(str, LLAMA_CPP_LAYERS[:-1]))} or {LLAMA_CPP_LAYERS[-1]}"
        yield (f"**llama.cpp**: not this model. Without a query LoRA it takes {known} layers; there are {layers}.")
        return
    file = name.rstrip("/").rpartition("/")[2]
    widths = (config.hidden_size, config.intermediate_size, config.moe_intermediate_size, config.q_lora_rank or 0)
    is_in_groups = not any(width % 32 for width in (*widths, config.num_attention_heads * config.v_head_dim))
    kind, others = ("q8_0", "`q4_0`, `bf16` and `f32`") if is_in_groups else ("bf16", "`f32`")
    mtp = ", and the MTP layers, by which it drafts" if config.num_nextn_predict_layers else ""
    yield (
        "**llama.cpp**, from a GGUF file that the package writes with the tokenizer and the chat template in it"
        f"{mtp} (other types are {others}; needs `pip install gguf`):"
    )
    yield block(f"transformers-dsv3 export-gguf {name} --output {file}-{kind}.gguf --type {kind}", "bash")


def _adapter_usage(sources: CardSources, name: str, base: str | None) -> Iterator[str]:
    base = base or "THE-BASE-MODEL"
    lines = [
        "import transformers_dsv3  # registers its classes over `deepseek_v3`",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
        f"model = PeftModel.from_pretrained(model, {json.dumps(name)})",
    ]
    yield "With the `transformers-dsv3` package (`pip install .` in its source) and PEFT installed:"
    yield block("\n".join(lines), "python")
    if _opens_without_plugin(sources):
        yield "**Without the package**, PEFT puts it on Transformers' own `deepseek_v3` class too."
    else:
        yield (
            "**Without the package** it does not open: PEFT takes the MLPs of Transformers' own class for routed "
            "experts. Merge it first."
        )
    yield (
        "**vLLM, SGLang and llama.cpp** load whole checkpoints, so merge it; what that saves is an official "
        "`deepseek_v3` checkpoint:"
    )
    merge = 'model.merge_and_unload().save_pretrained("./merged")  # and the tokenizer beside it'
    yield block(merge, "python")


def _opens_without_plugin(sources: CardSources) -> bool:
    """Whether native PEFT puts every adapted module where it belongs: attention, and experts as parameters."""
    adapter = sources.adapter or {}
    modules = adapter.get("target_modules") or []
    modules = [modules] if isinstance(modules, str) else modules
    attention = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    return all(module.rpartition(".")[2] in attention for module in modules)


def _limits(sources: CardSources) -> Iterator[str]:
    training, config = sources.training, sources.config
    tokenizer = sources.checkpoint.tokenizer
    if training is not None and training["tokens"] is not None:
        source = training["data"].get("source")
        seen = f"{count(training['tokens'], 'token')}{'' if source is None else f' of {plain(source)}'}"
        yield f"This run trained on {seen}. Text and languages other than those above were not measured."
    else:
        yield "How much it was trained on is not known. Text and languages other than those above were not measured."
    if tokenizer is not None and not tokenizer["chat_template"]:
        yield "Its tokenizer has no chat template: it continues text, and was not made for instructions."
    length = None if training is None else _trained_length(training)
    if length is not None and config is not None and length < config.max_position_embeddings:
        yield (
            f"It was trained on pieces of {length:,} tokens; what it does on up to {config.max_position_embeddings:,} "
            "was not measured."
        )
    if config is not None and config.num_nextn_predict_layers and sources.adapter is None:
        yield "Its MTP layers need the `transformers-dsv3` package; other programs leave them out."
    if config is not None and config.moe_layers and not any(r.routing for r in sources.evaluations.values()):
        yield "How evenly its experts are used was not evaluated."
    if not any(record.tasks or record.human_eval for record in sources.evaluations.values()):
        yield "No task was evaluated, neither of lm-evaluation-harness nor HumanEval."
    if not any(record.speed for record in sources.evaluations.values()):
        yield "Its speed was not measured."
    yield "Bias, safety, and whether what it says is true: not measured."


def _trained_length(training: dict) -> int | None:
    for name in ("block_size", "max_length"):
        value = training["settings"].get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None
