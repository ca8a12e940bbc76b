"""What compressing a model gives, from its configuration alone: bytes by part, memory, speed; and which settings do.

The file is the official layout with `packed/format.py`'s three tensors for each weight of 2 to 8 bits: the weights, a
scale of 16 bits for each group of 32, and the shape. Routers, norms and `kv_b_proj`, whose weight is folded into the
queries, stay whole. MTP layers are counted with the copies of embedding and head that official checkpoints repeat in
each of them, and that no memory holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..kernels.cpu import library
from ..kernels.cpu.operators import GROUP
from ..models.dsv3.configuration_dsv3 import DeepseekV3Config, KimiK2Config
from ..option_error import OptionError
from .expert_choice import kept_experts
from .published_shapes import PUBLISHED
from .settings import WHOLE, CompressionSettings


PARTS = (
    "embedding",
    "head",
    "attention",
    "dense MLP",
    "shared experts",
    "routed experts",
    "routers and norms",
    "MTP",
)
# Bytes of one parameter of what ratios are counted from
RATIOS_FROM = {"bf16": 2, "fp32": 4}
_CONFIGS = {"deepseek_v3": DeepseekV3Config, "kimi_k2": KimiK2Config}
_READ_BYTES = 2**28


# From the gentlest on: what comes later is smaller and loses more. Pruned models are to be healed
LADDER = (
    CompressionSettings(8),
    CompressionSettings(4),
    CompressionSettings(4, experts_bits=3),
    *(CompressionSettings(4, experts_bits=3, prune=share) for share in (0.25, 0.375, 0.5, 0.625, 0.75)),
)


@dataclass(frozen=True)
class _Weights:
    """Equal weights of one part.

    Args:
        part: one of `PARTS`.
        kind: "linear", "experts" or "head", which are quantised by their own settings; "whole"; "fp32".
        in_bytes: whether files hold each in a byte, whatever its bits: embeddings.
        rows, columns: of each. Vectors have one row.
        count: how many there are.
        read: how many of them one token reads.
        in_memory: whether they are in memory too.
    """

    part: str
    kind: str
    rows: int
    columns: int
    count: int = 1
    read: float = 1
    in_memory: bool = True
    in_bytes: bool = False

    @property
    def parameters(self) -> int:
        return self.count * self.rows * self.columns

    def stored(self, bits: int) -> int:
        """Bytes in a file."""
        if self.kind == "fp32" or bits == WHOLE:
            return self.parameters * (4 if self.kind == "fp32" else 2)
        if self.in_bytes:
            return self.parameters + self.parameters // GROUP * 2
        return self.parameters * bits // 8 + self.parameters // GROUP * 2 + self.count * 16

    def resident(self, bits: int) -> int:
        """Bytes in memory, where weights have 8 bits or 4: those of 3 and 2 are widened when they are loaded."""
        if self.kind == "fp32" or bits == WHOLE:
            return self.stored(bits)
        return self.parameters * (4 if bits <= 4 else 8) // 8 + self.parameters // GROUP * 2


@dataclass(frozen=True)
class Row:
    """One part of a plan: parameters and bytes, those of a bf16 file `before` and those of the compressed one."""

    part: str
    parameters_before: int
    bytes_before: int
    parameters: int
    bytes: int

    @property
    def bits(self) -> float:
        """Of one weight that is left, scales included."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Plan:
    """What settings make of a model.

    Attributes:
        settings: these.
        experts_before, experts: routed experts of a layer, and those that are left.
        rows: by part, those that the model has.
        weight_bytes: of the weights in memory.
        context: tokens of the sequence that is counted with.
        cache_bytes: of its latents in bf16.
        bytes_read: in memory, for one token at the end of that context.
    """

    settings: CompressionSettings
    experts_before: int
    experts: int
    rows: tuple[Row, ...]
    weight_bytes: int
    context: int
    cache_bytes: int
    bytes_read: int

    @property
    def file_bytes(self) -> int:
        """Of all tensors; headers of files are some bytes a tensor more."""
        return sum(row.bytes for row in self.rows)

    @property
    def bf16_bytes(self) -> int:
        """Of the tensors of the uncompressed file."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def parameters(self) -> tuple[int, int]:
        """Before and after. Copies in MTP layers count as often as files hold them."""
        return sum(row.parameters_before for row in self.rows), sum(row.parameters for row in self.rows)

    @property
    def memory_bytes(self) -> int:
        """To run it: weights and cache. Activations of a step, and of a prompt, come on top."""
        return self.weight_bytes + self.cache_bytes

    def ratio(self, of: str = "bf16") -> float:
        """How many times smaller the file is than one in bf16, or fp32."""
        return (self.bf16_bytes if of == "bf16" else 4 * self.parameters[0]) / self.file_bytes

    def tokens_per_second(self, bandwidth: float) -> float:
        """At the most, where memory is read at `bandwidth` bytes a second and nothing else takes time."""
        return bandwidth / self.bytes_read


@dataclass(frozen=True)
class Choice:
    """The gentlest plan that reaches a target, or, where `reached` is False, the one that comes nearest to it."""

    plan: Plan
    reached: bool


def plan(config: DeepseekV3Config, settings: CompressionSettings, context: int = 4096) -> Plan:
    """Counts what a compressed model of a configuration takes. Nothing is read, and nothing allocated.

    Args:
        config: of the model to be compressed.
        context: tokens of one sequence, for the cache and for what a token reads.

    Raises:
        OptionError: for a share of experts that cannot be removed, and, naming the field of the configuration, where a
            width does not divide into groups of 32.
    """
    _check_widths(config, settings)
    if context < 1:
        raise OptionError("--context", f"must be at least 1, not {context}")
    experts = kept_experts(config, settings.prune)
    before, after = (list(_weights(config, count)) for count in (config.n_routed_experts, experts))
    rows = []
    for part in PARTS:
        was, left = ([weights for weights in these if weights.part == part] for these in (before, after))
        if was:
            rows.append(
                Row(
                    part,
                    sum(weights.parameters for weights in was),
                    sum(weights.stored(WHOLE) for weights in was),
                    sum(weights.parameters for weights in left),
                    sum(weights.stored(settings.of(weights.kind)) for weights in left),
                )
            )
    resident = [(weights, weights.resident(settings.of(weights.kind))) for weights in after if weights.in_memory]
    latents = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers * context
    read = sum(size * weights.read / weights.count for weights, size in resident if weights.part != "MTP")
    return Plan(
        settings=settings,
        experts_before=config.n_routed_experts,
        experts=experts,
        rows=tuple(rows),
        weight_bytes=sum(size for _, size in resident),
        context=context,
        cache_bytes=latents,
        bytes_read=round(read) + latents,
    )


def gentlest(
    config: DeepseekV3Config,
    target_ratio: float | None = None,
    fit_bytes: int | None = None,
    ratio_from: str = "bf16",
    context: int = 4096,
) -> Choice:
    """The first settings of `LADDER` whose file is small enough, and whose model runs in so much memory.

    Args:
        target_ratio: how many times smaller the file is to be.
        fit_bytes: memory for weights and cache.
        ratio_from: "bf16" or "fp32", what the ratio counts from.
        context: tokens of a sequence, for the cache.

    Raises:
        OptionError: for a target that is none, and as `plan` does.
    """
    if target_ratio is None and fit_bytes is None:
        raise OptionError("--target-ratio", "give it, or --fit")
    if target_ratio is not None and not 1 <= target_ratio < float("inf"):
        raise OptionError("--target-ratio", f"must be 1 or more, not {target_ratio}")
    if fit_bytes is not None and fit_bytes < 1:
        raise OptionError("--fit", f"must be above 0, not {fit_bytes}")
    if ratio_from not in RATIOS_FROM:
        raise OptionError("--ratio-from", f"is one of {', '.join(RATIOS_FROM)}, not {ratio_from!r}")
    tried = []
    for settings in LADDER:
        try:
            tried.append(plan(config, settings, context))
        except OptionError as error:
            if error.option != "--prune":
                raise
            continue  # a share that this many experts do not divide into
        reached = target_ratio is None or tried[-1].ratio(ratio_from) >= target_ratio
        if reached and (fit_bytes is None or tried[-1].memory_bytes <= fit_bytes):
            return Choice(tried[-1], True)
    # Of equally small ones the gentlest
    smallest = min(tried, key=lambda made: made.memory_bytes if target_ratio is None else made.file_bytes)
    return Choice(smallest, False)


def settings_that_reach(
    config: DeepseekV3Config,
    settings: CompressionSettings,
    target_ratio: float | None = None,
    fit_bytes: int | None = None,
    ratio_from: str = "bf16",
) -> CompressionSettings:
    """Settings with the bits and the share of experts of `gentlest`, healed where experts are removed.

    Raises:
        OptionError: nothing reaches the target; names the settings that come nearest. And as `gentlest` does.
    """
    choice = gentlest(config, target_ratio, fit_bytes, ratio_from)
    made = choice.plan
    if not choice.reached:
        fitting = target_ratio is None or made.ratio(ratio_from) >= target_ratio
        raise OptionError(
            "--fit" if fitting else "--target-ratio",
            f"cannot be reached: nearest come {made.settings}, {made.ratio(ratio_from):.2f} times smaller than in "
            f"{ratio_from} and {made.memory_bytes / 2**30:.2f} GiB to run",
        )
    chosen = {name: getattr(made.settings, name) for name in ("bits", "experts_bits", "head_bits", "prune")}
    return replace(settings, **chosen, heal=settings.heal if made.settings.prune else 0)


def model_config(source: str | Path) -> DeepseekV3Config:
    """The configuration of a checkpoint's folder, of a `config.json`, or of one of the `PUBLISHED` shapes by name.

    Raises:
        OptionError: there is none, it cannot be read, it is of another architecture, or of a checkpoint that is
            quantised already.
    """
    path = Path(source)
    if not path.exists() and str(source).lower() in PUBLISHED:
        return DeepseekV3Config(**PUBLISHED[str(source).lower()])
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        names = ", ".join(PUBLISHED)
        raise OptionError("CHECKPOINT", f"{path} is not there; a folder, a config.json, or one of {names}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise OptionError("CHECKPOINT", f"{path} is not a configuration in JSON ({error})") from error
    if model_type not in _CONFIGS:
        raise OptionError("CHECKPOINT", f"{path}: its model_type is {model_type!r}, not {' or '.join(_CONFIGS)}")
    if (refusal := quantized_refusal(fields)) is not None:
        raise OptionError("CHECKPOINT", f"{path}: {refusal}")
    return _CONFIGS[model_type].from_dict(fields)


def quantized_refusal(fields: Mapping[str, Any]) -> str | None:
    """Why a checkpoint of this `config.json` is not compressed: it is already, in another way than DeepSeek's FP8."""
    stored = fields.get("quantization_config")
    if stored is None:
        return None
    held = stored if isinstance(stored, dict) else {"quant_method": stored}
    method = held.get("quant_method", "an unknown method")
    if method == "fp8" and held.get("weight_block_size"):
        return None
    return f"the checkpoint is quantised already, by {method}; give the one that it was made from"


def reading_bandwidth() -> float:
    """Bytes a second at which this machine reads its memory, with torch's number of threads; takes 0.1 s."""
    buffer = torch.ones(_READ_BYTES // 4)  # written, so that every page is really there

    def by_sums() -> float:
        started = time.perf_counter()
        buffer.view(-1, 65536).sum(dim=1)
        return time.perf_counter() - started

    def read() -> float:
        return by_sums() if library.unavailable is not None else library.read_seconds(buffer)

    return buffer.nbytes / min(read() for _ in range(4))


def _check_widths(config: DeepseekV3Config, settings: CompressionSettings) -> None:
    """Every input of a weight that is to be quantised has to be whole groups wide."""
    linear = {"hidden_size": config.hidden_size, "v_head_dim": config.num_attention_heads * config.v_head_dim}
    if config.q_lora_rank is not None:
        linear["q_lora_rank"] = config.q_lora_rank
    if config.n_shared_experts and config.moe_layers:
        linear["moe_intermediate_size"] = config.n_shared_experts * config.moe_intermediate_size
    if len(config.moe_layers) < config.num_hidden_layers:
        linear["intermediate_size"] = config.intermediate_size
    experts = {"hidden_size": config.hidden_size, "moe_intermediate_size": config.moe_intermediate_size}
    widths = {"linear": linear, "experts": experts, "head": {"hidden_size": config.hidden_size}}
    for kind, fields in widths.items():
        for field, width in fields.items():
            if settings.of(kind) != WHOLE and width % GROUP:
                raise OptionError(
                    "CHECKPOINT",
                    f"`{field}={getattr(config, field)!r}`: inputs of weights have to be multiples of {GROUP} wide, "
                    f"and this makes one of {width}",
                )


def _weights(config: DeepseekV3Config, experts: int) -> Iterator[_Weights]:
    """All tensors of a checkpoint with so many routed experts a layer."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    # Nothing but this package opens tied ones quantised
    heads = "whole" if config.tie_word_embeddings else "head"
    yield _Weights("embedding", heads, vocabulary, hidden, read=1 / vocabulary, in_bytes=True)
    if not config.tie_word_embeddings:
        yield _Weights("head", heads, vocabulary, hidden)
    yield _Weights("routers and norms", "whole", 1, hidden)
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer, experts)
    for depth in range(config.num_nextn_predict_layers or 0):
        for weights in _layer(config, config.num_hidden_layers + depth, experts):
            yield replace(weights, part="MTP")
        yield _Weights("MTP", "whole", 1, hidden, count=3, read=3)
        yield _Weights("MTP", "linear", hidden, 2 * hidden)
        yield _Weights("MTP", heads, vocabulary, hidden, in_memory=False, in_bytes=True)
        yield _Weights("MTP", heads, vocabulary, hidden, in_memory=False)


def _layer(config: DeepseekV3Config, layer: int, experts: int) -> Iterator[_Weights]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)

    def attention(rows: int, columns: int, kind: str = "linear") -> _Weights:
        return _Weights("attention", kind, rows, columns)

    biases = [latent + config.qk_rope_head_dim, hidden]
    if config.q_lora_rank is None:
        yield attention(queries, hidden)
    else:
        yield attention(config.q_lora_rank, hidden)
        yield attention(1, config.q_lora_rank, "whole")
        yield attention(queries, config.q_lora_rank)
        biases.append(config.q_lora_rank)
    yield attention(latent + config.qk_rope_head_dim, hidden)
    yield attention(1, latent, "whole")
    yield attention(heads * (config.qk_nope_head_dim + config.v_head_dim), latent, "whole")
    yield attention(hidden, heads * config.v_head_dim)
    for width in biases if config.attention_bias else []:
        yield attention(1, width, "whole")
    yield _Weights("routers and norms", "whole", 1, hidden, count=2, read=2)

    def network(part: str, kind: str, width: int, count: int = 1, read: int = 1) -> Iterator[_Weights]:
        yield _Weights(part, kind, width, hidden, count=2 * count, read=2 * read)
        yield _Weights(part, kind, hidden, width, count=count, read=read)

    if not config.is_moe(layer):
        yield from network("dense MLP", "linear", config.intermediate_size)
        return
    width = config.moe_intermediate_size
    if config.n_shared_experts:
        yield from network("shared experts", "linear", config.n_shared_experts * width)
    yield from network("routed experts", "experts", width, experts, config.num_experts_per_tok)
    yield _Weights("routers and norms", "whole", experts, hidden)
    yield _Weights("routers and norms", "fp32", 1, experts)
