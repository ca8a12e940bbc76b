"""`export_gguf`: a checkpoint to a GGUF file for llama.cpp, tensor by tensor."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from ...files import file_refusal, partial_path, put_in_place
from ...kernels.cpu.operators import GROUP
from ...models.dsv3.checkpoint_checks_dsv3 import mtp_layers_present
from ...models.dsv3.checkpoint_files_dsv3 import CheckpointError, listing, read_checkpoint, resolve_checkpoint
from ...models.dsv3.configuration_dsv3 import DeepseekV3Config
from ...option_error import OptionError
from ..checkpoint_weights import CheckpointWeights
from .config import config_refusal, metadata_of, warn_of_llama_cpp
from .format import (
    ARCHITECTURE,
    BF16,
    BITS,
    EXPERTS,
    F32,
    KEY_PART,
    KV_B,
    Q4_0,
    Q8_0,
    VALUE_PART,
    encode,
    gguf_name,
    pack_blocks,
    row_bytes,
    split_kv_b,
)
from .tokenizer import metadata_of_tokenizer, tokenizer_refusal


# Names of `--type`: the number of matrices' type, and llama.cpp's of the file
TYPES = {"f32": (F32, 0), "bf16": (BF16, 32), "q8_0": (Q8_0, 7), "q4_0": (Q4_0, 2)}
# Those that llama.cpp's tool makes of a bf16 file
TOOL = "llama-quantize"
TOOL_TYPES = (
    "q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k q4_1 q5_0 q5_1 iq4_nl iq4_xs".split()
)  # fmt: skip
_ALIGNMENT = 32


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file to be written, and what writes its rows."""

    name: str
    ggml_type: int
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.ggml_type, self.shape[-1])


def export_gguf(
    checkpoint: str | os.PathLike, output: str | os.PathLike, type: str = "q8_0", progress: bool = True
) -> Path:
    """Writes a checkpoint as a GGUF file for llama.cpp, with its tokenizer, chat template and MTP layers.

    The model is never held: experts are read one by one, shards as they are. A file is complete or not there: a
    process that is killed leaves `OUTPUT.partial`, which the next one overwrites.

    - `q8_0` and `q4_0` round as `quantize` does: every matrix in groups of 32, embedding and head to 8 bits in both.
      Norms and routers stay in fp32, and `kv_b_proj`, which attention folds into its queries, in bf16.
    - Weights that the checkpoint has in 8 bits or fewer (compressed-tensors, symmetric groups) keep their whole
      numbers and scales: up to 4 bits become Q4_0, others Q8_0, bit for bit. `f32` and `bf16` dequantise them, and
      DeepSeek's FP8 always.
    - Types such as `q4_k_m` are made by llama.cpp's `llama-quantize`, from a bf16 file that is removed afterwards.

    Args:
        checkpoint: folder or Hub repository of an official checkpoint with a byte-level BPE tokenizer.
        output: the file to write. A GGUF file that is there is replaced when the new one is complete.
        type: `f32`, `bf16`, `q8_0`, `q4_0`, or one of `llama-quantize`.
        progress: whether to show a progress bar.

    Returns:
        The path of the file.

    Raises:
        OptionError: before anything is written, for an unknown type, an output that cannot be written, a checkpoint
            that is none of DeepSeek-V3's or has what llama.cpp has not, no tokenizer or one that it does not know,
            widths that are no multiple of 32 where groups are asked for, too little room on the disk.
        CheckpointError: for a checkpoint whose files contradict themselves or its config; names file and tensor.
    """
    output = Path(output)
    name = type.lower()
    if name not in TYPES and name not in TOOL_TYPES:
        raise OptionError("--type", f"{type!r} is none of {', '.join([*TYPES, *TOOL_TYPES])}")
    tool = None if name in TYPES else shutil.which(TOOL)
    if name not in TYPES and tool is None:
        raise OptionError(
            "--type",
            f"{type} is made by llama.cpp's {TOOL}, which is not on the PATH: install llama.cpp and put its programs "
            f"there, or take one of {', '.join(TYPES)}",
        )
    if (refusal := file_refusal(output) or _taken(output)) is not None:
        raise OptionError("--output", refusal)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise OptionError("--type", "writing GGUF needs the package gguf: `pip install gguf`") from error

    metadata, planned = _plan(os.fspath(checkpoint), name if name in TYPES else "bf16")
    needed = sum(tensor.nbytes for tensor in planned)
    if tool is not None:  # that file, and the other beside it, no tensor of which is larger than in Q8_0
        needed += needed * 17 // 32
    free = shutil.disk_usage(output.absolute().parent).free
    if needed > free:
        raise OptionError("--output", f"the file takes {needed:,} bytes, and {output.absolute().parent} has {free:,}")
    partial = partial_path(output)
    if tool is None:
        _write(partial, metadata, planned, progress)
    else:
        whole = output.with_name(output.name + ".bf16.partial")
        # The tool outlives a process that is killed, and goes on with the files that it has open: not with these
        whole.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
        try:
            _write(whole, metadata, planned, progress)
            _run_tool([tool, str(whole), str(partial), name.upper()], partial)
        finally:
            whole.unlink(missing_ok=True)
    put_in_place(partial, output)
    return output


def _taken(path: Path) -> str | None:
    """Why a file that is there is not replaced: what is no GGUF file was hardly meant, as a checkpoint's weights."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        known = file.read(4) in (b"", b"GGUF")
    return None if known else f"{path} is there and is no GGUF file, so it is not replaced"


def _run_tool(command: list[str], result: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except BaseException:  # it cannot be started, or was stopped by a user
        result.unlink(missing_ok=True)
        raise
    if done.returncode or not result.is_file():
        result.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-2000:]}")


def _plan(checkpoint: str, type: str) -> tuple[dict[str, Any], list[_Planned]]:
    """Metadata and tensors of the file, all that can be wrong with the checkpoint found."""
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise OptionError("CHECKPOINT", str(error)) from error
    if not isinstance(config, DeepseekV3Config):
        raise OptionError("CHECKPOINT", f"{checkpoint} is a {config.model_type!r} model, not DeepSeek-V3")
    if (refusal := config_refusal(config)) is not None:
        raise OptionError("CHECKPOINT", f"{checkpoint}: {refusal}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # as many kinds as there are ways to lack a tokenizer
        raise OptionError("CHECKPOINT", f"{checkpoint} has no tokenizer that can be read: {error}") from error
    if (refusal := tokenizer_refusal(tokenizer, config.vocab_size)) is not None:
        raise OptionError("CHECKPOINT", f"the tokenizer of {checkpoint} cannot be written: {refusal}")
    files = resolve_checkpoint(checkpoint)
    if files is None:
        raise OptionError("CHECKPOINT", f"{checkpoint} has no safetensors files")
    stored = read_checkpoint(files.files, files.index)
    mtp_layers = mtp_layers_present(list(stored), config.num_hidden_layers, config.num_nextn_predict_layers)
    try:
        weights = CheckpointWeights(stored, getattr(config, "quantization_config", None))
    except CheckpointError as error:
        raise OptionError("CHECKPOINT", f"{checkpoint}: {error}") from error
    warn_of_llama_cpp(config, mtp_layers)
    number, file_type = TYPES[type]
    planned = _Planner(config, weights, number).tensors(mtp_layers)
    return metadata_of(config, mtp_layers, file_type) | metadata_of_tokenizer(tokenizer, config), planned


class _Planner:
    """Lists the tensors of the file, and refuses what does not fit."""

    def __init__(self, config: Any, weights: CheckpointWeights, ggml_type: int):
        self.config, self.weights, self.ggml_type = config, weights, ggml_type
        self.problems: list[str] = []
        self.odd: list[str] = []

    def tensors(self, mtp_layers: int) -> list[_Planned]:
        config = self.config
        width = config.hidden_size
        # 4 bits of embedding and head cost more than those of all other matrices together
        ends = Q8_0 if self.ggml_type == Q4_0 else self.ggml_type
        planned = [self._matrix("model.embed_tokens.weight", (config.vocab_size, width), ends)]
        for layer in range(config.num_hidden_layers + mtp_layers):
            planned += self._layer(layer)
        planned.append(self._float("model.norm.weight", (width,)))
        if not config.tie_word_embeddings:
            planned.append(self._matrix("lm_head.weight", (config.vocab_size, width), ends))
        if self.problems:
            raise CheckpointError(f"the checkpoint does not fit its config: {listing(self.problems)}")
        if self.odd:
            raise OptionError("--type", f"groups of {GROUP} do not divide the inputs of {listing(self.odd)}")
        return planned

    def _layer(self, layer: int) -> list[_Planned]:
        c, prefix = self.config, f"model.layers.{layer}."
        attention, width, key = f"{prefix}self_attn.", c.hidden_size, c.qk_nope_head_dim + c.qk_rope_head_dim
        heads = c.num_attention_heads
        planned = [self._float(f"{prefix}input_layernorm.weight", (width,))]
        if c.q_lora_rank is None:
            planned.append(self._matrix(f"{attention}q_proj.weight", (heads * key, width)))
        else:
            planned += [
                self._matrix(f"{attention}q_a_proj.weight", (c.q_lora_rank, width)),
                self._float(f"{attention}q_a_layernorm.weight", (c.q_lora_rank,)),
                self._matrix(f"{attention}q_b_proj.weight", (heads * key, c.q_lora_rank)),
            ]
        planned += [
            self._matrix(f"{attention}kv_a_proj_with_mqa.weight", (c.kv_lora_rank + c.qk_rope_head_dim, width)),
            self._float(f"{attention}kv_a_layernorm.weight", (c.kv_lora_rank,)),
            *self._key_value(layer),
            self._matrix(f"{attention}o_proj.weight", (width, heads * c.v_head_dim)),
            self._float(f"{prefix}post_attention_layernorm.weight", (width,)),
        ]
        if layer < min(c.first_k_dense_replace, c.num_hidden_layers):
            planned += self._network(f"{prefix}mlp.", c.intermediate_size)
        else:
            planned.append(self._float(f"{prefix}mlp.gate.weight", (c.n_routed_experts, width)))
            planned.append(self._float(f"{prefix}mlp.gate.e_score_correction_bias", (c.n_routed_experts,)))
            planned += [self._experts(layer, name, part) for name, part in EXPERTS.items()]
            if c.n_shared_experts:
                shared = c.n_shared_experts * c.moe_intermediate_size
                planned += self._network(f"{prefix}mlp.shared_experts.", shared)
        if layer >= c.num_hidden_layers:
            planned.append(self._matrix(f"{prefix}eh_proj.weight", (width, 2 * width)))
            planned += [
                self._float(f"{prefix}{norm}.weight", (width,)) for norm in ("enorm", "hnorm", "shared_head.norm")
            ]
        return planned

    def _network(self, prefix: str, inner: int) -> list[_Planned]:
        width = self.config.hidden_size
        shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        return [self._matrix(f"{prefix}{part}.weight", shape) for part, shape in shapes.items()]

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if (problem := self.weights.problem(name, shape)) is not None:
            self.problems.append(problem)

    def _type(self, name: str, ggml_type: int) -> int:
        """What a matrix becomes: what it is, where it is quantised already and the file is to be."""
        if ggml_type in BITS and not self.problems and (bits := self.weights.bits(name)) is not None:
            return Q4_0 if bits <= BITS[Q4_0] else Q8_0
        return ggml_type

    def _rows(self, name: str, ggml_type: int) -> Iterator[torch.Tensor]:
        """The bytes of a matrix, some rows at a time."""
        try:
            for rows in self.weights.chunks(name):
                if ggml_type in BITS and self.weights.bits(name) is not None:
                    yield _blocks_of_codes(*self.weights.codes(name, rows), ggml_type)
                else:
                    yield encode(self.weights.read(name, rows, torch.float32), ggml_type)
        except ValueError as error:
            raise CheckpointError(f"'{name}' cannot be written: {error}") from error

    def _float(self, name: str, shape: tuple[int, ...]) -> _Planned:
        """A norm, a router or a bias, which are fp32 in every file."""
        return self._matrix(name, shape, F32)

    def _matrix(self, name: str, shape: tuple[int, ...], ggml_type: int | None = None) -> _Planned:
        self._check(name, shape)
        found = self._type(name, self.ggml_type if ggml_type is None else ggml_type)
        if found in BITS and shape[-1] % GROUP:
            self.odd.append(f"{name} ({shape[-1]})")
        in_file = gguf_name(name)
        assert in_file is not None
        return _Planned(in_file, found, shape, lambda: self._rows(name, found))

    def _experts(self, layer: int, in_file: str, part: str) -> _Planned:
        """One projection of all experts, which are read one by one."""
        c = self.config
        shape = (c.moe_intermediate_size, c.hidden_size)
        shape = shape[::-1] if part == "down_proj" else shape
        names = [f"model.layers.{layer}.mlp.experts.{e}.{part}.weight" for e in range(c.n_routed_experts)]
        for name in names:
            self._check(name, shape)
        # Of experts with different bits the most: fewer fit into them
        found = max((self._type(name, self.ggml_type) for name in names), key=lambda t: BITS.get(t, 0))
        if found in BITS and shape[-1] % GROUP:
            self.odd.append(f"model.layers.{layer}.mlp.experts.*.{part}.weight ({shape[-1]})")
        return _Planned(
            f"blk.{layer}.{in_file}",
            found,
            (len(names), *shape),
            lambda: (rows for name in names for rows in self._rows(name, found)),
        )

    def _key_value(self, layer: int) -> list[_Planned]:
        """`kv_b_proj`, in two parts and never in groups: attention multiplies by it in parts, folded."""
        c, name = self.config, f"model.layers.{layer}.{KV_B}"
        heads, keys, values, rank = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
        self._check(name, (heads * (keys + values), rank))
        ggml_type = BF16 if self.ggml_type in BITS else self.ggml_type

        def part(which: int) -> Iterator[torch.Tensor]:
            whole = torch.cat([self.weights.read(name, rows, torch.float32) for rows in self.weights.chunks(name)])
            yield encode(split_kv_b(whole, c)[which], ggml_type)

        return [
            _Planned(f"blk.{layer}.{KEY_PART}", ggml_type, (heads, rank, keys), lambda: part(0)),
            _Planned(f"blk.{layer}.{VALUE_PART}", ggml_type, (heads, values, rank), lambda: part(1)),
        ]


def _blocks_of_codes(whole: torch.Tensor, scale: torch.Tensor, ggml_type: int) -> torch.Tensor:
    """Whole numbers int8 `(N, K)` with their scales as they are, as blocks.

    Raises:
        ValueError: for a scale that fp16 does not hold.
    """
    half = scale.half()
    if not bool(half.isfinite().all()):
        raise ValueError(f"a scale is {scale.float().abs().max().item():g}, which fp16 does not hold")
    if ggml_type == Q8_0:
        return pack_blocks(whole, half)
    first, second = (whole + 8).view(torch.uint8).unflatten(-1, (-1, GROUP)).chunk(2, dim=-1)
    return pack_blocks((first | second << 4).flatten(-2), half)


def _write(path: Path, metadata: dict[str, Any], planned: list[_Planned], progress: bool) -> None:
    """The whole file. What fails, or is stopped by a user, leaves nothing."""
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in metadata.items():
        _add(writer, key, value)
    import numpy as np

    for tensor in planned:
        kind = gguf.GGMLQuantizationType(tensor.ggml_type)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        total = sum(tensor.nbytes for tensor in planned)
        with (
            open(path, "ab") as file,
            tqdm(
                total=total, desc=path.name.removesuffix(".partial"), unit="B", unit_scale=True, disable=not progress
            ) as bar,
        ):
            _pad(file)
            for tensor in planned:
                start = file.tell()
                for rows in tensor.parts():
                    file.write(memoryview(rows.reshape(-1).numpy()))
                    bar.update(rows.numel())
                assert file.tell() - start == tensor.nbytes, tensor.name
                _pad(file)
    except BaseException:
        with contextlib.suppress(OSError):
            writer.close()
        path.unlink(missing_ok=True)
        raise


def _add(writer: Any, key: str, value: Any) -> None:
    """Counts are unsigned, as llama.cpp writes them."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
