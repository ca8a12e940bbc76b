"""The sections of a model card that tell what a model is, how it was trained and what was measured on it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..evaluation.checkpoint_record import ParameterCounts
from ..evaluation.evaluation_record import PARTS, EvaluationRecord
from ..evaluation.evaluation_table import figures_of
from ..evaluation.machine import BUSY
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config
from .card_figures import FOLDER, CardFigure
from .card_sources import CardSources
from .markdown import block, code, count, data_size, document, duration, figure, plain, share, table


# Bytes of a value, by the name that safetensors has for its type
_VALUE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_CONFIG_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PARTS = dict(zip(PARTS, ("held-out text", "experts", "speed", "tasks", "HumanEval")))
# Settings that are longer are in the record alone
_MOST_CHARACTERS = 300
_LAYER = re.compile(r"(?:model\.)?layers\.\d+\.")


def introduction(sources: CardSources) -> str:
    """A sentence or two: what it is, from what, trained on what."""
    checkpoint, training = sources.checkpoint, sources.training
    base = sources.base_name
    if sources.adapter is not None:
        kind = plain(_kind(sources.adapter.get("peft_type")))
        text = f"A {kind} adapter of {count(sum(checkpoint.stored_as.values()), 'parameter')}"
        text += "" if base is None else f" for {code(base)}, a DeepSeek-V3 model"
    else:
        text = "A DeepSeek-V3 model"
        if (counts := sources.parameters) is not None:
            mtp = f" (and {_millions(counts.mtp)} in MTP layers)" if counts.mtp else ""
            text += f" of {_millions(counts.main)} parameters{mtp}, {_millions(counts.active)} active for a token"
    if training is None:
        return f"{text}. There is no record of its training: what it was trained on is not known."
    origin = "trained"
    if sources.adapter is None:
        origin = "trained from scratch" if base is None else f"trained from {code(base)}"
    data = f" on {plain(training['data']['source'])}" if training["data"].get("source") else ""
    return f"{text}, {origin} by {plain(training['method'])}{data}."


def model_section(sources: CardSources) -> str:
    checkpoint = sources.checkpoint
    rows: list[tuple[str, str]] = []
    if (adapter := sources.adapter) is not None:
        rows += _adapter_rows(adapter)
    rows += [
        ("stored as", _stored_as(sources)),
        ("sha256 over tensors and configuration", code(checkpoint.checkpoint.sha256)),
    ]
    if (tokenizer := checkpoint.tokenizer) is not None:
        chat = "with" if tokenizer["chat_template"] else "without"
        rows.append(
            ("tokenizer", f"{code(tokenizer['class'])} of {tokenizer['entries']:,} entries, {chat} a chat template")
        )
    else:
        rows.append(("tokenizer", "none in the folder"))
    if sources.config is not None:
        title = "" if adapter is None else "Its base model:"
        architecture = table(_architecture_rows(sources, sources.config))
        parts = [architecture, table(rows)] if adapter is None else [table(rows), title, architecture]
    else:
        parts = [table(rows), "Its base model's architecture is not known here."]
    return document(["## Model", *parts])


def training_section(sources: CardSources, figures: dict[str, CardFigure]) -> str:
    if (training := sources.training) is None:
        return "## Training\n\nNot known: the folder has no `training_record.json`.\n"
    rows = [("method", plain(training["method"])), *_base_rows(training), *_data_rows(training["data"])]
    rows += [
        ("steps", f"{training['steps']:,}"),
        ("tokens", "not counted" if training["tokens"] is None else f"{training['tokens']:,}"),
    ]
    if (trained := training["parameters"]) is not None:
        of_all = trained["trained"] / trained["total"]
        rows.append(("trained", f"{trained['trained']:,} of {trained['total']:,} parameters ({share(of_all)})"))
    rows += [
        ("time", _time(training)),
        ("processes", f"{training['processes']:,}"),
        *_circumstances(training, "at its end, the run itself included"),
    ]
    results = [
        (plain(_metric(entry["metric"])), plain(entry["data"]), *_before_after(entry), _beside(entry))
        for entry in training["results"]
    ]
    parts = [
        "## Training",
        table(rows),
        "From the first command to the last:" if len(training["commands"]) > 1 else "The command:",
        block(" && \\\n  ".join(training["commands"]), "bash"),
        _details("Arguments of the trainer", _value_rows(training["arguments"])),
        _details("Settings of the method", _value_rows(training["settings"])),
        _picture(figures.get("training.png")),
        "What the run measured on data that it was not trained on:" if results else "",
        table(results, ("figure", "data", "before", "after", "beside")),
        *_completions(training),
    ]
    return document(parts)


def evaluation_section(sources: CardSources, figures: dict[str, CardFigure]) -> str:
    if not sources.evaluations:
        return (
            "## Evaluation\n\nNot measured: there is no record of `transformers-dsv3 evaluate`"
            f"{'' if sources.training is None or not sources.training['results'] else ' beside the figures above'}.\n"
        )
    parts = ["## Evaluation"]
    for name, record in sources.evaluations.items():
        parts += _evaluation(name, record)
    parts.append(_picture(figures.get("routing.png")))
    return document(parts)


def _millions(number: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _adapter_rows(adapter: dict[str, Any]) -> Iterator[tuple[str, str]]:
    names = {
        "peft_type": "kind",
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "rank_pattern": "ranks of single modules",
        "target_modules": "adapted modules",
        "target_parameters": "adapted parameters",
        "modules_to_save": "modules trained whole",
    }
    for field, name in names.items():
        value = adapter.get(field)
        if value in (None, [], {}):
            continue
        if field == "peft_type":
            value = _kind(value)
        yield name, _by_place(value) if isinstance(value, list) else _value(value)


def _kind(peft_type: Any) -> str:
    """PEFT's constant as the paper writes it."""
    return "LoRA" if peft_type == "LORA" else str(peft_type or "PEFT")


def _by_place(modules: list[str]) -> str:
    """Names of modules, those of several layers as one."""
    places = Counter(_LAYER.sub("layers.*.", module) for module in modules)
    names = [code(place) + ("" if number == 1 else f" ({number} layers)") for place, number in sorted(places.items())]
    return ", ".join(names)


def _stored_as(sources: CardSources) -> str:
    checkpoint = sources.checkpoint
    types = ", ".join(f"{name} ({values:,} values)" for name, values in checkpoint.stored_as.items())
    copies = ""
    if checkpoint.parameters is not None and checkpoint.parameters.mtp:
        copies = ", with each MTP layer's copy of embedding and head"
    return f"{types}{copies}; {data_size(checkpoint.bytes)} in {count(checkpoint.files, 'file')}"


def _architecture_rows(sources: CardSources, config: DeepseekV3Config) -> Iterator[tuple[str, str]]:
    yield "architecture", code(sources.architecture)
    yield from _parameter_rows(sources.parameters, config)
    moe = len(config.moe_layers)
    dense = config.num_hidden_layers - moe
    mtp = config.num_nextn_predict_layers or 0
    layers = f"{config.num_hidden_layers:,}: {dense:,} dense, {count(moe, 'mixture', 'mixtures')} of experts"
    yield "layers", layers + (f"; {count(mtp, 'MTP layer')} behind them" if mtp else "")
    yield "hidden size", f"{config.hidden_size:,}"
    query = f"query LoRA of rank {config.q_lora_rank:,}" if config.q_lora_rank else "no query LoRA"
    yield (
        "attention",
        f"{count(config.num_attention_heads, 'head')}; keys and values from a latent of {config.kv_lora_rank:,}; "
        f"{query}; {config.qk_nope_head_dim} + {config.qk_rope_head_dim} (rotary) dimensions a head for keys, "
        f"{config.v_head_dim} for values",
    )
    if moe:
        groups = f" in {config.topk_group} of {config.n_group} groups" if config.n_group > 1 else ""
        yield (
            "experts",
            f"{config.n_routed_experts:,} routed, {config.num_experts_per_tok} a token{groups}, "
            f"{config.n_shared_experts} shared; inner size {config.moe_intermediate_size:,}",
        )
    if dense:
        yield "inner size of dense layers", f"{config.intermediate_size:,}"
    yield "context", f"{config.max_position_embeddings:,} positions{_rope(config)}"
    yield "vocabulary", f"{config.vocab_size:,} entries"
    yield "cache", _cache(sources, config)
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
        yield "quantised", code(fields.get("quant_method", "not known"))


def _parameter_rows(counts: ParameterCounts | None, config: DeepseekV3Config) -> Iterator[tuple[str, str]]:
    if counts is None:
        yield "parameters", "not counted: the files do not hold them one by one, or are not at hand"
        return
    mtp = f", and {counts.mtp:,} in its MTP layers" if counts.mtp else ""
    yield "parameters", f"{counts.main:,}{mtp}"
    chosen = f": {config.num_experts_per_tok} of {config.n_routed_experts} routed experts" if config.moe_layers else ""
    yield "active a token", f"{counts.active:,}{chosen}"


def _rope(config: DeepseekV3Config) -> str:
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    return "" if kind == "default" else f", RoPE extended by {kind} with factor {rope.get('factor', 'not known')}"


def _cache(sources: CardSources, config: DeepseekV3Config) -> str:
    """Bytes a token in the type that the weights have."""
    # MTP layers have caches of their own, while they draft
    values = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    told = _CONFIG_DTYPES.get(str(config.dtype).removeprefix("torch."))
    stored = [name for name in sources.checkpoint.stored_as if name in _VALUE_BYTES] if sources.adapter is None else []
    name = told or (stored[0] if len(stored) == 1 else None)
    formula = f"{config.num_hidden_layers:,} layers × ({config.kv_lora_rank:,} + {config.qk_rope_head_dim:,})"
    if name is None:
        return f"{values:,} values a token ({formula})"
    return f"{values * _VALUE_BYTES[name]:,} bytes a token ({formula} × {_VALUE_BYTES[name]} bytes)"


def _base_rows(training: dict[str, Any]) -> Iterator[tuple[str, str]]:
    base = training["base"]
    if base is not None:
        digest = base.get("sha256")
        yield "from", code(base["name"]) + ("" if digest is None else f", sha256 {code(digest)}")


def _data_rows(data: dict[str, Any], of: str = "data") -> Iterator[tuple[str, str]]:
    """Each entry of a record's `data`; nested ones under their own names."""
    if not data:
        yield of, "not known"
    for name, value in data.items():
        words = name.replace("_", " ")
        if isinstance(value, dict):
            yield from _data_rows(value, words)
        elif name == "source":
            yield of, plain(value)
        elif name == "sha256" or name == "fingerprint":
            yield f"{of}: {words}", code(value)
        else:
            yield f"{of}: {words}", f"{value:,}" if isinstance(value, int) else plain(value)


def _circumstances(told: dict[str, Any], moment: str) -> Iterator[tuple[str, str]]:
    """Machine, versions, source and date of a record that was begun at a `moment`."""
    hardware, versions = told["hardware"], told["versions"]
    memory = hardware.get("memory_bytes")
    machine = [
        plain(hardware.get("cpu") or "processor not known"),
        "cores not known" if hardware.get("cores") is None else count(hardware["cores"], "core"),
        *([] if memory is None else [f"{memory / 2**30:.0f} GiB of memory"]),
        f"device {plain(hardware.get('device') or 'not known')}",
    ]
    yield "machine", ", ".join(machine)
    if hardware.get("load_average") is not None:
        yield f"load average {moment}", f"{hardware['load_average']:.2f}"
    yield "versions", ", ".join(f"{plain(name)} {plain(version or 'not known')}" for name, version in versions.items())
    yield "source", "commit not known" if told["commit"] is None else f"commit {code(told['commit'])}"
    yield "date", plain(told["date"][:10])


def _time(training: dict[str, Any]) -> str:
    if training["seconds"] is None:
        return "not known"
    load, cores = (training["hardware"].get(name) for name in ("load_average", "cores"))
    # What the run itself adds is as many as there are cores, at most
    busy = load is not None and cores is not None and load > (1 + BUSY) * cores
    return f"{duration(training['seconds'])} of training steps{', beside other programs' if busy else ''}"


def _metric(name: str) -> str:
    return {"loss": "loss, nats a token", "bits_per_byte": "bits per byte"}.get(name, name.replace("_", " "))


def _before_after(entry: dict[str, Any]) -> tuple[str, str]:
    read = share if entry["metric"] == "accuracy" else figure
    before = "" if entry["before"] is None else read(entry["before"])
    return before, read(entry["after"])


def _beside(entry: dict[str, Any]) -> str:
    return ", ".join(f"{plain(name)} {figure(value)}" for name, value in entry["beside"].items())


def _value_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(code(name), _value(value)) for name, value in values.items() if value is not None]


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return code(text) if len(text) <= _MOST_CHARACTERS else "see the record"


def _details(title: str, rows: list[tuple[str, str]]) -> str:
    """A table that opens at a click."""
    return f"<details><summary>{title}</summary>\n\n{table(rows)}\n\n</details>" if rows else ""


def _picture(drawn: CardFigure | None) -> str:
    return "" if drawn is None else f"![{plain(drawn.caption)}]({FOLDER}/{drawn.name})"


def _completions(training: dict[str, Any]) -> Iterator[str]:
    completions = training.get("completions") or []
    if completions:
        yield "What it writes behind a prompt, sampled as its generation settings say:"
    for completion in completions:
        yield block(completion["prompt"] + completion["text"])


def _evaluation(name: str, record: EvaluationRecord) -> Iterator[str]:
    measured = [words for part, words in _PARTS.items() if getattr(record, part) is not None]
    title = ", ".join(measured)
    yield f"### {title[:1].upper()}{title[1:]}"
    yield block(record.command, "bash")
    yield table(
        [tuple(plain(cell) for cell in row) for row in figures_of(record)], ("measured", "figure", "beside it")
    )
    facts = []
    if (base := record.checkpoint.base) is not None:
        facts.append(("base model", f"{code(base.name)}, sha256 {code(base.sha256)}"))
    if record.text is not None:
        size = f"{count(record.text['documents'], 'document')}, {record.text['bytes']:,} bytes"
        facts.append(("text", f"{plain(record.text['source'])}: {size}, sha256 {code(record.text['sha256'])}"))
    if record.settings.get("limit") is not None:
        facts.append(("limit", f"the first {record.settings['limit']} documents of each task, for a try"))
    if record.human_eval is not None:
        facts.append(("sandbox of HumanEval", plain(record.human_eval.get("sandbox", "not known"))))
    facts += [
        ("seed", f"{record.seed}"),
        *_circumstances(vars(record), "before"),
        ("record", f"[{plain(name)}]({name})"),
    ]
    yield _details("Where, when and with what", facts)
