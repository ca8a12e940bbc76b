"""A checkpoint to one of few bits a weight, calibrated on a text, layer by layer.

The result has the official names, compressed-tensors' `pack-quantized` weights (see packed/format.py), and the MTP
layers. Everything that does not fit is refused before any work (compression_job.py). Where experts are to be removed,
that is done first, and healed, and what is left is rounded.

    OUTPUT_PARENT/.NAME.compressing/     while it is being made
        run.json                         what it is made from and how
        pruned/                          with fewer experts, healed, when it is whole
        checkpoint/                      files of finished layers; OUTPUT itself when all are there
        step-00003.json                  what came of a finished step
        *.rows                           activations between two steps

A step is the embedding, a layer, or what stands behind the layers. A command that is killed leaves all of its finished
steps, and the same command goes on behind them: the result is the same to the bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..evaluation.checkpoint_folder import CONFIG
from ..evaluation.checkpoint_identity import config_digest
from ..files import partial_path, put_in_place, settle, write_json
from ..models.dsv3.checkpoint_files_dsv3 import read_header
from ..models.dsv3.checkpoint_saving_dsv3 import lock_folder, unlock_folder
from ..models.dsv3.modeling_dsv3 import DeepseekV3ForCausalLM
from ..models.dsv3.norm_dsv3 import DeepseekV3RMSNorm
from ..option_error import OptionError
from .compressed_files import CompressedFiles
from .compressed_layout import Layout, quantization_config
from .compression_job import CompressionJob, prepare, pruned_job, work_folder
from .compression_record import COMPRESSION_RECORD, CompressionRecord, Layer, Text
from .gptq import Rounded, round_to_nearest
from .layer_compression import LayerCompressor
from .prune_and_heal import KEPT_EXPERTS, prune_and_heal
from .row_file import RowFile
from .settings import CompressionSettings


# Weights, what describes them and what was measured of them, which are not those of the compressed checkpoint
_NOT_COPIED = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|bin|pt|pth|gguf)|config\.json|README\.md|evaluation.*\.json"
    r"|.*_(record|results|state)\.json"
)


def compress(
    checkpoint: str | Path,
    output: str | Path,
    settings: CompressionSettings | None = None,
    *,
    text: Sequence[str | Path] | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> CompressionRecord:
    """Rounds the weights of a checkpoint to few bits, in groups of 32, and writes it as a new one.

    Linear layers, routed experts, the embedding and the head are rounded, those of MTP layers too; `kv_b_proj`,
    routers and norms stay as they are. With the method "gptq" each matrix is rounded by what its inputs are on the
    text, which come from the layers before as they were rounded: routed experts by the tokens routed to them, or by
    those of the whole layer where these are fewer than `settings.min_tokens`. Embedding and head are rounded to
    nearest.

    With `settings.prune` experts are removed before, and with `settings.heal` what is left is trained on the text;
    then the model is in memory, see `prune_and_heal`.

    Args:
        checkpoint: folder of an official checkpoint with its tokenizer; in bf16, fp32, fp16 or DeepSeek's FP8.
        output: folder to make. A hidden folder beside it has what is finished until then; called again after it was
            stopped, the same call goes on from there.
        settings: bits, method, how much text, and what is done before.
        text: UTF-8 text files and folders of some. None: the part of the standard library that `quickstart` trains on.
        memory: bytes that may be used; half of what the machine has unless given.
        progress: whether to show a progress bar.

    Returns:
        The record, which is also in `output` as compression_record.json.

    Raises:
        OptionError: before any work, for what cannot be done; names the option of `transformers-dsv3 compress`.
        ValueError: for weights that are not finite; names the tensor.
    """
    settings = settings or CompressionSettings()
    job = prepare(Path(checkpoint), Path(output), settings, text, memory)
    work = work_folder(job.output)
    work.mkdir(exist_ok=True)
    held = lock_folder(os.fspath(work), wait=False)
    if held is None:
        raise OptionError("--output", f"another command is making {job.output}")
    try:
        return _run(job, work, progress)
    finally:
        unlock_folder(held)


def _run(job: CompressionJob, work: Path, progress: bool) -> CompressionRecord:
    run_file, folder = work / "run.json", work / "checkpoint"
    if not folder.is_dir():  # new, or left by a command that was stopped behind its last step
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir()
    description = job.description()
    if not run_file.is_file():
        write_json(run_file, description)
    _check_same(work, json.loads(run_file.read_text(encoding="utf-8")), description)
    given = job
    if job.settings.prune:
        job = _pruned(job, work / "pruned", progress)
    finished: list[dict[str, Any]] = []
    while (path := _step_file(work, len(finished))).is_file():
        finished.append(json.loads(path.read_text(encoding="utf-8")))
    total = sum(_values(job, name) for name in job.layout.bits)
    done = sum(_values(job, name) for name in _names(job.layout, range(len(finished))) if name in job.layout.bits)
    with (
        torch.no_grad(),
        tqdm(
            total=total, initial=done, desc="compressing", unit="weight", unit_scale=True, disable=not progress
        ) as bar,
    ):
        files = CompressedFiles(job.layout, folder, bar)
        steps = _Steps(job, work, files) if job.settings.method == "gptq" else None
        for number in range(len(finished), len(job.layout.steps)):
            started = time.perf_counter()
            outcome: dict[str, Any] = {"layer": None}
            if steps is None:
                _round_all(job, number, files)
            else:
                outcome = steps.run(number)
            outcome["seconds"] = time.perf_counter() - started
            write_json(_step_file(work, number), outcome)
            if steps is not None:
                steps.clean(number)
            finished.append(outcome)
    return _publish(job, given, work, finished)


def _pruned(job: CompressionJob, folder: Path, progress: bool) -> CompressionJob:
    """Removes experts, unless that is done already; the job that is left."""
    if not folder.is_dir():
        settings = job.settings
        assert job.text is not None
        how = {"by": settings.prune_by, "seed": settings.seed, "heal_steps": settings.heal, "progress": progress}
        prune_and_heal(job.folder.path, folder, settings.prune, job.text.windows, **how)  # type: ignore[arg-type]
    return pruned_job(job, folder)


def _check_same(work: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with what another command has begun."""
    settings = before["settings"]
    changed = [
        f"{key} was {settings.get(key)}" for key, value in now["settings"].items() if settings.get(key) != value
    ]
    changed += [f"another {name}" for name in ("checkpoint", "text") if now[name] != before[name]]
    if changed:
        raise OptionError(
            "--output",
            f"{work} has the layers of a command that was stopped and is not this one ({', '.join(changed)}). Give "
            "the same command to finish it, or remove that folder to begin anew",
        )


def _step_file(work: Path, number: int) -> Path:
    return work / f"step-{number:05d}.json"


def _names(planned: Layout, steps: range) -> list[str]:
    return [name for step in steps for number in planned.steps[step] for name in planned.files[number]]


def _values(job: CompressionJob, name: str) -> int:
    rows, width = job.source.tensors[name].shape
    return rows * width


def _round_all(job: CompressionJob, step: int, files: CompressedFiles) -> None:
    """The tensors of a step, each weight on its own."""
    for name in _names(job.layout, range(step, step + 1)):
        weight, bits = job.source.read(name), job.layout.bits.get(name)
        files.put(name, weight if bits is None else round_to_nearest(weight, bits))


class _Steps:
    """The steps of a calibrated compression, each from what the one before has left on disk."""

    def __init__(self, job: CompressionJob, work: Path, files: CompressedFiles):
        assert job.text is not None
        self.job, self.files, self.windows = job, files, job.text.windows
        self.mtp_layers = job.config.num_nextn_predict_layers
        with torch.device("meta"):
            model = DeepseekV3ForCausalLM._from_config(job.config).model.eval()
        model.rotary_emb = type(model.rotary_emb)(config=model.config)
        count, length = self.windows.shape
        shape = (count, length - self.mtp_layers)
        self.layers = LayerCompressor(model, job.source, files, job.settings, shape, work)
        # Embeddings of all tokens, those included that only MTP layers see
        self.embedded = RowFile(work / "embedded.rows", self.windows.numel(), job.config.hidden_size)

    def run(self, number: int) -> dict[str, Any]:
        """One step. Its files are overwritten where it was begun before."""
        config = self.job.config
        given, made = self._stream(number), self._stream(number + 1)
        if number == 0:
            self._embed(made)
            return {"layer": None}
        if number <= config.num_hidden_layers:
            layer = number - 1
            return asdict(self.layers.compress(layer, given, made))
        if number == config.num_hidden_layers + 1:
            _round_all(self.job, number, self.files)
            self._normalise("model.norm.weight", given, made)
            return {"layer": None}
        layer = number - 2
        depth = layer - config.num_hidden_layers
        pair, out = self.layers.rows("pair"), self.layers.rows("output")
        self.layers.project(depth, given, lambda part: self._embeddings(part, depth + 1), pair)
        report = self.layers.compress(layer, pair, out)
        self._normalise(f"model.layers.{layer}.shared_head.norm.weight", out, made)
        pair.remove()
        out.remove()
        return asdict(report)

    def clean(self, number: int) -> None:
        """Removes what only a finished step needed."""
        self._stream(number).remove()

    def _stream(self, number: int) -> RowFile:
        return self.layers.rows(f"before-{number:05d}")

    def _embed(self, made: RowFile) -> None:
        _, length = self.windows.shape
        name = "model.embed_tokens.weight"
        weight, bits = self.job.source.read(name), self.job.layout.bits.get(name)
        rounded = weight if bits is None else round_to_nearest(weight, bits)
        tokens = self.windows.flatten()
        self.embedded.create()
        for start in range(0, len(tokens), self.layers.tokens_at_once):
            part = slice(start, start + self.layers.tokens_at_once)
            if isinstance(rounded, Rounded):
                looked_up = Rounded(rounded.whole[tokens[part]], rounded.scale[tokens[part]]).dequantized()
            else:
                looked_up = rounded[tokens[part]].float()
            self.embedded.write(part, looked_up)
        self.files.put(name, rounded)
        made.create()
        for part in self.layers.parts():
            made.write(part, self._embeddings(part, 0))

    def _embeddings(self, part: slice, ahead: int) -> torch.Tensor:
        """Embeddings of the tokens `ahead` places on from a part of those of all windows, fp32 `(n, D)`."""
        position = torch.arange(part.start, part.stop)
        window, place = position // self.layers.window, position % self.layers.window
        return self.embedded.read(window * self.windows.shape[1] + place + ahead)

    def _normalise(self, name: str, given: RowFile, made: RowFile) -> None:
        norm = DeepseekV3RMSNorm(self.job.config.hidden_size, eps=self.job.config.rms_norm_eps)
        norm.weight.copy_(self.job.source.read(name))
        made.create()
        for part in self.layers.parts():
            made.write(part, norm(given.read(part)))


def _publish(
    job: CompressionJob, given: CompressionJob, work: Path, finished: list[dict[str, Any]]
) -> CompressionRecord:
    """Puts the checkpoint in its place: the folder that is whole gets its name in one step.

    Args:
        given: what was asked for, before experts were removed.
    """
    folder = work / "checkpoint"
    for path in given.folder.path.iterdir():
        if path.is_file() and not _NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
            settle(folder / path.name)
    for path in folder.glob(partial_path(Path("*")).name):
        path.unlink()
    fields = {**job.folder.fields, "quantization_config": quantization_config(job.layout)}
    write_json(folder / CONFIG, fields)
    shards = [job.layout.file_name(number) for number in range(len(job.layout.files))]
    size = sum((folder / shard).stat().st_size for shard in shards)
    if len(shards) > 1:
        _write_index(folder, shards)
    before = sum(os.stat(path).st_size for path in given.source.files)
    weights, whole = job.layout.weights, given.layout.weights
    kept = _kept_experts(job)
    text = job.text
    record = CompressionRecord(
        source=given.folder.path.resolve().name,
        config_sha256=config_digest(given.folder),
        settings=asdict(given.settings),
        text=None if text is None else Text(text.source, len(text.windows), text.windows.numel(), text.sha256),
        weights=weights,
        weights_before=whole,
        bytes_before=before,
        bytes_after=size,
        bits_per_weight=8 * size / weights,
        ratio=before / size,
        ratio_from_bf16=2 * whole / size,
        ratio_from_fp32=4 * whole / size,
        layers=[
            Layer(step["layer"], step["tokens_per_expert"], step["methods"], kept.get(step["layer"], []))
            for step in finished
            if step["layer"] is not None
        ],
        seconds=sum(step["seconds"] for step in finished),
    )
    write_json(folder / COMPRESSION_RECORD, record.to_dict(), indent=1, rows=True)
    put_in_place(folder, job.output)
    shutil.rmtree(work, ignore_errors=True)
    return record


def _kept_experts(job: CompressionJob) -> dict[int, list[int]]:
    """Of layers that experts were removed from, by number: those that are left, by the numbers that they had."""
    path = job.folder.path / KEPT_EXPERTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_index(folder: Path, shards: list[str]) -> None:
    headers = {shard: read_header(os.fspath(folder / shard)) for shard in shards}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for header in headers.values() for tensor in header.values())},
        "weight_map": {name: shard for shard, header in headers.items() for name in sorted(header)},
    }
    write_json(folder / "model.safetensors.index.json", index)
