"""Adapters of stacked experts as adapters of single experts, the names that servers and older PEFT know."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .checkpoints import write_json


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def split_expert_adapters(
    weights: dict[str, torch.Tensor], config: dict[str, Any], n_experts: int
) -> dict[str, torch.Tensor]:
    """Tensors of an adapter with those of stacked experts apart: `...mlp.experts.3.gate_proj.lora_A.weight`.

    A gate's and an up's adapter share the first factor of the stacked one and take half of the second each, so that
    the function is the same, and the rank.

    Args:
        weights: the adapter's tensors as PEFT saves them: `lora_A` `(E R, in)`, expert by expert, and `lora_B`
            `(out, R E)`, the experts innermost.
        config: the adapter's config, of which `target_parameters` says which stack a tensor belongs to.
        n_experts: E.

    Raises:
        ValueError: if a tensor's shape is not that of so many experts.
    """
    split = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for name_a in sorted(name for name in weights if ".experts." in name and name.endswith("lora_A.weight")):
        name_b = name_a.replace("lora_A", "lora_B")
        experts = re.sub(r"(\.base_layer)*\.lora_A\.weight$", "", name_a)
        layer = experts.removeprefix("base_model.model.")
        stacks = [p for p in PROJECTIONS if any(f"{layer}.{p}".endswith(t) for t in config["target_parameters"])]
        # PEFT wraps the stacks in the order of the module's parameters, so the innermost is the first
        stack = stacks[0] if ".base_layer." in name_a else stacks[-1]
        a, b = weights[name_a], weights[name_b]
        if len(a) % n_experts or a.shape[0] != b.shape[1]:
            raise ValueError(f"{name_a} has {len(a)} rows, which is no whole rank for {n_experts} experts")
        a_ERI = a.unflatten(0, (n_experts, -1))
        b_EOR = b.unflatten(1, (-1, n_experts)).permute(2, 0, 1)
        for projection, part_EOR in zip(PROJECTIONS[stack], b_EOR.chunk(len(PROJECTIONS[stack]), dim=1), strict=True):
            for expert in range(n_experts):
                prefix = f"{experts}.{expert}.{projection}"
                split[f"{prefix}.lora_A.weight"] = a_ERI[expert].contiguous().clone()
                split[f"{prefix}.lora_B.weight"] = part_EOR[expert].contiguous().clone()
    return split


def export_per_expert(adapter: str | Path, output: str | Path, n_experts: int) -> None:
    """Writes an adapter that PEFT saved with each expert's tensors under its own name, as the official checkpoint's.

    For programs that read adapters by those names. PEFT reads the result back too, with twice the rank on gates and
    ups, which it stacks.

    Args:
        adapter: folder of `adapter_config.json` and `adapter_model.safetensors`.
        output: folder to write, made if needed; it must hold no adapter yet.
        n_experts: routed experts of a layer, `config.n_routed_experts` of the base model.

    Raises:
        FileNotFoundError: if the adapter is not there.
        FileExistsError: if there is an adapter in `output`.
        ValueError: if the adapter does not adapt routed experts, or another number of them.
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
    weights = split_expert_adapters(load_file(adapter / WEIGHTS), config, n_experts)
    modules = config.get("target_modules") or []
    if isinstance(modules, str):
        raise ValueError(f"{adapter / CONFIG}: target_modules is a pattern, not a list of names")
    names = set(modules)
    for target in targets:
        stem, stack = target.rsplit(".", 1)
        names.update(f"{stem}.{projection}" for projection in PROJECTIONS[stack])
    config["target_modules"] = sorted(names)
    config["target_parameters"] = None
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in [p for p in config.get(key) or {} if p.endswith("gate_up_proj")]:
            value = config[key].pop(pattern)
            config[key].update({pattern.replace("gate_up_proj", p): value for p in PROJECTIONS["gate_up_proj"]})
            # What the stack gets when it is read back
            config[key][pattern] = 2 * value
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / WEIGHTS, metadata={"format": "pt"})
    write_json(output / CONFIG, config)
