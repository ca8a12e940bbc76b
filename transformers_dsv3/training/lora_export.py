"""Adapters of stacked experts as adapters of single experts, the names that servers and older PEFT know."""

import json
import re
from pathlib import Path

from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from ..files import write_json


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def stack_of(name: str, targets: list[str]) -> tuple[str, str]:
    """The module of experts that a `lora_A` tensor belongs to, and which of its stacks.

    PEFT wraps the stacks in the order of the module's parameters, so the innermost wrapper is the first one's.
    """
    experts = re.sub(r"(\.base_layer)*\.lora_A\.weight$", "", name)
    layer = experts.removeprefix("base_model.model.")
    stacks = [s for s in PROJECTIONS if any(f".{layer}.{s}".endswith(f".{target}") for target in targets)]
    return experts, stacks[0] if ".base_layer." in name else stacks[-1]


def export_per_expert(adapter: str | Path, output: str | Path, n_experts: int) -> None:
    """Writes an adapter that PEFT saved with each expert's tensors under its own name, as the official checkpoint's.

    For programs that read adapters by those names: `...mlp.experts.3.gate_proj.lora_A.weight`. A gate's and an up's
    adapter share the first factor of the stack and take half of the second each, so that function and rank are the
    same. With the plugin PEFT reads the result back too, with twice the rank on gates and ups, which it stacks.

    Args:
        adapter: folder of `adapter_config.json` and `adapter_model.safetensors`. Of a stack's tensors `lora_A` is
            `(E R, in)`, expert by expert, and `lora_B` `(out, R E)`, the experts innermost.
        output: folder to write, made if needed; it must hold no adapter yet.
        n_experts: routed experts of a layer, `config.n_routed_experts` of the base model.

    Raises:
        FileNotFoundError: if the adapter is not there.
        FileExistsError: if there is an adapter in `output`.
        ValueError: if the adapter does not adapt routed experts, or another number of them, or names its targets by a
            pattern.
    """
    adapter, output = Path(adapter), Path(output)
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"{adapter} has no {name}: it is no adapter that PEFT saved")
        if (output / name).exists():
            raise FileExistsError(f"{output / name} is there already")
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    targets = [t for t in config.get("target_parameters") or [] if t.split(".")[-1] in PROJECTIONS]
    if not targets:
        raise ValueError(f"{adapter} does not adapt routed experts: there is nothing to take apart")
    if isinstance(config.get("target_modules"), str):
        raise ValueError(f"{adapter / CONFIG}: target_modules is a pattern, not a list of names")
    weights = load_file(adapter / WEIGHTS)
    split = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    names, ranks, alphas = set(config.get("target_modules") or []), {}, {}
    for name in sorted(name for name in weights if ".experts." in name and name.endswith("lora_A.weight")):
        experts, stack = stack_of(name, targets)
        a, b = weights[name], weights[name.replace("lora_A", "lora_B")]
        if len(a) % n_experts or a.shape[0] != b.shape[1]:
            raise ValueError(f"{name} has {len(a)} rows, which is no whole rank for {n_experts} experts")
        a_ERI = a.unflatten(0, (n_experts, -1))
        b_EOR = b.unflatten(1, (-1, n_experts)).permute(2, 0, 1)
        layer = experts.removeprefix("base_model.model.")
        key = get_pattern_key(config.get("alpha_pattern") or {}, f"{layer}.{stack}")
        alpha = (config.get("alpha_pattern") or {}).get(key, config["lora_alpha"])
        for projection, part_EOR in zip(PROJECTIONS[stack], b_EOR.chunk(len(PROJECTIONS[stack]), dim=1), strict=True):
            names.add(f"{layer}.{projection}")
            # Of all experts, whether by the stack's name or by their own
            pattern = rf"{re.escape(layer)}(\.\d+)?\.{projection}"
            ranks[pattern], alphas[pattern] = a_ERI.shape[1], alpha
            for expert in range(n_experts):
                prefix = f"{experts}.{expert}.{projection}"
                split[f"{prefix}.lora_A.weight"] = a_ERI[expert].contiguous().clone()
                split[f"{prefix}.lora_B.weight"] = part_EOR[expert].contiguous().clone()
    config["target_modules"] = sorted(names)
    config["target_parameters"] = [t for t in config["target_parameters"] if t not in targets] or None
    for field, own, default in (("rank_pattern", ranks, config["r"]), ("alpha_pattern", alphas, config["lora_alpha"])):
        # First those that match single experts' names only: the first that matches counts
        config[field] = {k: v for k, v in own.items() if v != default or config.get(field)} | (config.get(field) or {})
    output.mkdir(parents=True, exist_ok=True)
    save_file(split, output / WEIGHTS, metadata={"format": "pt"})
    write_json(output / CONFIG, config)
