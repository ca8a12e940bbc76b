"""Checkpoints compressed layer by layer, beside the model itself on the weights that the files stand for."""

import ast
import json
import re
import shutil
import signal
import statistics
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fp8_files import write_fp8_checkpoint
from packed_files import check_saved_again
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as NativeModel
from typer.testing import CliRunner

from tests import programs
from tests.conftest import WIDTHS_OVER_BYTES
from transformers_dsv3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers_dsv3.compression import compress as compress_module
from transformers_dsv3.compression import compression_job
from transformers_dsv3.compression.calibration_text import calibration_text
from transformers_dsv3.compression.compress import compress
from transformers_dsv3.compression.compression_record import read_compression_record
from transformers_dsv3.compression.gguf.export import export_gguf
from transformers_dsv3.compression.packed.format import unpack
from transformers_dsv3.compression.prune_and_heal import prune_and_heal
from transformers_dsv3.compression.settings import CompressionSettings, parse_memory
from transformers_dsv3.data.byte_bpe import TokenBlocks
from transformers_dsv3.data.text_files import build_corpus, standard_library
from transformers_dsv3.evaluation.held_out_text import read_texts
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.kernels.cpu.step import Program
from transformers_dsv3.models.dsv3.moe_dsv3 import DeepseekV3Experts
from transformers_dsv3.option_error import OptionError
from transformers_dsv3_cli.main import app


WIDTHS = {**WIDTHS_OVER_BYTES, "num_nextn_predict_layers": 2}
SETTINGS = CompressionSettings(experts_bits=3, tokens=2560, window=64, min_tokens=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes((Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_bytes()[:6000])
    return path


@pytest.fixture(scope="module")
def checkpoint(make_model, byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_model(**WIDTHS).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    (folder / "notes.txt").write_text("kept")
    return folder


@pytest.fixture(scope="module")
def compressed(checkpoint, text, tmp_path_factory):
    """The folder, and the residual stream behind each layer as the compression had it."""
    folder = tmp_path_factory.mktemp("compressed")
    streams = {}
    original = compress_module._Steps.run

    def run(self, number):
        outcome = original(self, number)
        made = self._stream(number + 1)
        streams[number] = made.read(slice(0, made.shape[0]))
        streams["windows"] = self.windows
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_module._Steps, "run", run)
        compress(checkpoint, folder / "out", SETTINGS, text=[text])
    return folder / "out", streams


def stored(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def weights_of(folder):
    """What the files stand for, fp32, and the bits of each packed weight: by the format's definition."""
    tensors, weights, bits = stored(folder), {}, {}
    for name, tensor in tensors.items():
        weight = name.removesuffix("_packed")
        if weight == name:
            if tensor.dtype == torch.int8:  # the embedding
                bits[name], scale = 8, tensors[f"{name}_scale"]
                assert scale.dtype == torch.bfloat16
                weights[name] = tensor.float() * scale.float().repeat_interleave(32, dim=1)
            elif not name.endswith(("_scale", "_shape")):
                weights[name] = tensor
            continue
        rows, columns = tensors[f"{weight}_shape"].tolist()
        bits[weight] = tensor.shape[1] * 32 // columns
        scale = tensors[f"{weight}_scale"]
        assert scale.dtype == torch.bfloat16 and scale.shape == (rows, columns // 32)
        weights[weight] = unpack(tensor, bits[weight]).float() * scale.float().repeat_interleave(32, dim=1)
    return weights, bits


def twin(folder):
    """The plain model of the weights that the files stand for."""
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(fields))
    result = model.load_state_dict(weights_of(folder)[0], strict=False)
    assert set(result.missing_keys) <= model.all_tied_weights_keys.keys() and not result.unexpected_keys
    return model.eval()


def test_every_tensor_is_there_packed_or_as_it_was(checkpoint, compressed):
    folder, _ = compressed
    before, (weights, bits) = stored(checkpoint), weights_of(folder)
    assert weights.keys() == before.keys()
    for name, tensor in before.items():
        if name not in bits:
            assert name.endswith(("norm.weight", "kv_b_proj.weight", "mlp.gate.weight", "_bias"))
            assert torch.equal(weights[name], tensor) and weights[name].dtype == tensor.dtype
        else:
            head = "embed_tokens" in name or "head" in name
            assert bits[name] == (8 if head else 3 if ".experts." in name else 4), name
            assert (weights[name] - tensor).norm() < {3: 0.4, 4: 0.25, 8: 0.01}[bits[name]] * tensor.norm(), name
    assert any(".eh_proj" in name for name in bits) and "model.layers.3.mlp.experts.7.up_proj.weight" in bits


def test_the_rest_of_the_folder_comes_along(checkpoint, compressed):
    folder, _ = compressed
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt"} <= names
    fields, before = (json.loads((path / "config.json").read_text()) for path in (folder, checkpoint))
    config = fields.pop("quantization_config")
    assert fields == before and config["quant_method"] == "compressed-tensors"
    assert not list(folder.parent.glob(".*"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored(folder).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(folder).values())


def test_targets_of_the_config_are_what_is_packed(compressed):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    matching = pytest.importorskip("compressed_tensors.utils.match")
    folder, _ = compressed
    weights, bits = weights_of(folder)
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(fields)
    for name in weights:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue
        found = [
            group.weights.num_bits
            for group in config.config_groups.values()
            if any(matching.match_name(module, target) for target in group.targets)
        ]
        assert found == ([bits[name]] if name in bits else []), name


def test_layers_run_as_the_model_does_on_what_was_written(compressed):
    """Embedding, layers, last norm and MTP layers, each fed what the ones before give once they are rounded."""
    folder, streams = compressed
    model = twin(folder).model
    windows = streams["windows"]
    ids = windows[:, :-2]
    with torch.no_grad():
        inputs = model.begin(ids, use_cache=False)
        hidden = inputs.inputs_embeds
        expected = [hidden]
        for layer in model.layers:
            hidden = layer(hidden, **inputs.layer_inputs)
            expected.append(hidden)
        expected.append(model.norm(hidden))
        for depth, layer in enumerate(model.mtp_layers):
            ahead = model.embed_tokens(windows[:, depth + 1 : depth + 1 + ids.shape[1]])
            expected.append(layer(expected[-1], ahead, **inputs.layer_inputs))
    assert len(expected) == len(streams) - 1 == 6
    for number, hidden in enumerate(expected):
        torch.testing.assert_close(streams[number].view_as(hidden), hidden, atol=1e-4, rtol=1e-4)


def test_it_opens_packed_and_runs_as_what_the_files_stand_for(compressed, tmp_path, monkeypatch):
    folder, streams = compressed
    ids = streams["windows"][:2, :-2]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(folder)(ids).logits, atol=1e-4, rtol=1e-4)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | DeepseekV3Experts):
            assert name.endswith("kv_b_proj"), name
    steps, step = [], Program.run
    monkeypatch.setattr(Program, "run", lambda *given: steps.append(1) or step(*given))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert steps or library.unavailable
    model.save_pretrained(tmp_path / "saved")
    check_saved_again(tmp_path / "saved")


@pytest.mark.parametrize(
    "settings",
    [
        {"experts_bits": 3},
        {"experts_bits": 2},
        {"experts_bits": 8, "head_bits": 4},
        {"bits": 16, "experts_bits": 4, "head_bits": 16},  # as Kimi K2 is released
        {"tie": True},
    ],
    ids=str,
)
def test_native_opens_it(settings, checkpoint, make_model, tmp_path, measured):
    pytest.importorskip("compressed_tensors")
    source = checkpoint
    settings = dict(settings)
    if settings.pop("tie", False):
        source = tmp_path / "tied"
        make_model(**{**WIDTHS, "tie_word_embeddings": True}).save_pretrained(source)
    compress(source, tmp_path / "out", CompressionSettings(**settings, method="nearest"))
    ids = torch.arange(24).reshape(2, 12)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    native, info = NativeModel.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    expected = twin(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)
        for name, module in expected.named_modules():
            if name.endswith(".experts"):
                module.to(torch.bfloat16).to(torch.float32)  # as native has them
        native(ids)  # which decompresses
        error = (nn.Module.float(native)(ids).logits - expected(ids).logits).abs().max().item()
    measured["compressed checkpoint in native Transformers, largest difference of a logit"] = error
    assert error < 1e-5
    ours.save_pretrained(tmp_path / "again")
    ours, again = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_it_becomes_a_gguf_file_that_computes_the_same(kind, make_model, bpe, tmp_path):
    ids = {"bos_token_id": bpe.bos_token_id, "eos_token_id": bpe.eos_token_id}
    fields = {**WIDTHS, "vocab_size": 320, "kv_lora_rank": 32, "num_nextn_predict_layers": 1}
    make_model(**fields, **ids).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    bpe.save_pretrained(tmp_path / "plain")
    bits = 8 if kind == "q8_0" else 4
    compress(tmp_path / "plain", tmp_path / "out", CompressionSettings(bits, method="nearest"))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    (tmp_path / "gguf").mkdir()
    file = export_gguf(tmp_path / "out", tmp_path / "gguf" / "model.gguf", kind, progress=False)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        ours, expected = (m(tokens).logits.float() for m in (model, packed))
    states = packed.state_dict()
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(ours, expected)


def test_predicts_more_like_the_model_than_rounding_to_nearest(checkpoint, compressed, text, tmp_path, measured):
    folder, streams = compressed
    compress(checkpoint, tmp_path / "nearest", replace(SETTINGS, method="nearest"))
    ids = streams["windows"][:, :-2]
    with torch.no_grad():
        original = DeepseekV3ForCausalLM.from_pretrained(checkpoint).eval()(ids).logits.log_softmax(-1)
        divergence = [
            torch.nn.functional.kl_div(
                twin(path)(ids).logits.log_softmax(-1), original, log_target=True, reduction="sum"
            ).item()
            for path in (folder, tmp_path / "nearest")
        ]
    measured["compress: KL divergence from the model, GPTQ over nearest"] = divergence[0] / divergence[1]
    assert divergence[0] < 0.8 * divergence[1]


def test_the_record_says_what_was_done(checkpoint, compressed):
    folder, streams = compressed
    record = read_compression_record(folder / "compression_record.json")
    before, after = (sum(path.stat().st_size for path in p.glob("*.safetensors")) for p in (checkpoint, folder))
    assert (record.bytes_before, record.bytes_after) == (before, after) and record.ratio == before / after
    assert record.weights == sum(tensor.numel() for tensor in stored(checkpoint).values())
    assert record.source == "model" and record.text.windows == 40 and record.text.tokens == 40 * 66
    assert record.settings == {**record.settings, "bits": 4, "experts_bits": 3, "window": 64, "min_tokens": 300}
    # Counted by the model itself, which sees the tokens of the main layers
    counts = twin(folder)(streams["windows"][:, :-2], output_router_logits=True).router_logits
    assert [layer.layer for layer in record.layers] == [0, 1, 2, 3]
    assert record.layers[0].tokens_per_expert == [] and len(counts) == 1
    for layer in record.layers[1:]:
        assert sum(layer.tokens_per_expert) == 3 * 40 * 64
        few = [expert for expert, tokens in enumerate(layer.tokens_per_expert) if tokens < 300]
        assert layer.uncalibrated == few
    assert any(layer.uncalibrated for layer in record.layers)


def assert_same_files(folder, other):
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    for path in folder.iterdir():
        if path.name != "compression_record.json":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    records = [read_compression_record(path / "compression_record.json") for path in (folder, other)]
    assert replace(records[0], seconds=0.0) == replace(records[1], seconds=0.0)


OPTIONS = ["--experts-bits", "3", "--tokens", "2560", "--window", "64", "--min-tokens", "300"]


@pytest.mark.parametrize(
    "seen",
    [
        ".out.compressing/run.json",
        ".out.compressing/checkpoint/model-00003-of-00006.safetensors.partial",
        ".out.compressing/step-00003.json",
        ".out.compressing/checkpoint/compression_record.json",
    ],
)
def test_killed_at_any_moment_the_same_command_completes_it(seen, checkpoint, compressed, text, tmp_path):
    arguments = ["-m", "transformers_dsv3.cli", "compress", checkpoint, "--output", tmp_path / "out", "--text", text]
    killed = programs.run([*arguments, *OPTIONS], signal_when=(tmp_path / seen, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    compress(checkpoint, tmp_path / "out", SETTINGS, text=[text])
    assert_same_files(tmp_path / "out", compressed[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


PRUNED = replace(SETTINGS, prune=0.25, heal=2)


@pytest.fixture(scope="module")
def pruned(checkpoint, text, tmp_path_factory):
    """Pruned, healed and compressed by the functions one after another."""
    folder = tmp_path_factory.mktemp("pruned")
    windows = calibration_text(checkpoint, [text], PRUNED, 2, 258).windows
    kept = prune_and_heal(checkpoint, folder / "pruned", 0.25, windows, heal_steps=2)
    compress(folder / "pruned", folder / "out", SETTINGS, text=[text])
    return folder / "out", kept


def test_experts_are_removed_and_healed_before(checkpoint, pruned, text, tmp_path):
    folder, kept = pruned
    record = compress(checkpoint, tmp_path / "out", PRUNED, text=[text])
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "out" / "notes.txt").exists() and not (tmp_path / "out" / "pruning_record.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    written = read_compression_record(tmp_path / "out" / "compression_record.json")
    assert written == replace(record, text=replace(record.text, source=text.name))
    assert {layer.layer: tuple(layer.kept) for layer in record.layers if layer.kept} == kept
    before = sum(tensor.numel() for tensor in stored(checkpoint).values())
    assert record.weights < record.weights_before == before and record.settings["prune"] == 0.25
    assert record.source == "model" and record.ratio_from_bf16 == 2 * before / record.bytes_after
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        model.config.n_routed_experts == 6 and model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape[1] == 5
    )


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(".out.compressing/.pruned.pruning/run.json", marks=pytest.mark.slow),
        ".out.compressing/.pruned.pruning/kept.json",
        pytest.param(".out.compressing/.pruned.pruning/healed/config.json", marks=pytest.mark.slow),
        pytest.param(".out.compressing/pruned/config.json", marks=pytest.mark.slow),
        ".out.compressing/step-00001.json",
    ],
)
def test_killed_while_experts_are_removed_the_same_command_completes_it(seen, checkpoint, pruned, text, tmp_path):
    arguments = ["-m", "transformers_dsv3.cli", "compress", checkpoint, "--output", tmp_path / "out", "--text", text]
    options = [*OPTIONS, "--prune", 0.25, "--heal", 2]
    killed = programs.run([*arguments, *options], signal_when=(tmp_path / seen, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="prune was 0.25"):
        compress(checkpoint, tmp_path / "out", SETTINGS, text=[text])
    compress(checkpoint, tmp_path / "out", PRUNED, text=[text])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in pruned[0].glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_finished_layers_are_not_made_again(checkpoint, compressed, text, tmp_path, monkeypatch):
    original = compress_module._Steps.run

    def run(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(compress_module._Steps, "run", run)
    with pytest.raises(KeyboardInterrupt):
        compress(checkpoint, tmp_path / "out", SETTINGS, text=[text])
    steps = []
    monkeypatch.setattr(compress_module._Steps, "run", lambda self, n: steps.append(n) or original(self, n))
    for changed, named in (({"bits": 8}, "bits was 4"), ({"seed": 1}, "seed was 0.*another text")):
        with pytest.raises(OptionError, match=named):
            compress(checkpoint, tmp_path / "out", replace(SETTINGS, **changed), text=[text])
    compress(checkpoint, tmp_path / "out", SETTINGS, text=[text])
    assert steps == [3, 4, 5]
    assert_same_files(tmp_path / "out", compressed[0])


def test_what_another_command_left_behind_its_end_is_no_beginning(checkpoint, compressed, text, tmp_path):
    work = tmp_path / ".out.compressing"
    work.mkdir()
    (work / "run.json").write_text("{}")
    (work / "step-00000.json").write_text('{"layer": null, "seconds": 0.0}')
    compress(checkpoint, tmp_path / "out", SETTINGS, text=[text])
    assert_same_files(tmp_path / "out", compressed[0])


def test_two_commands_do_not_make_one_output(checkpoint, text, tmp_path, monkeypatch):
    def while_running(*arguments):
        with pytest.raises(OptionError, match="another command is making"):
            compress(checkpoint, tmp_path / "out", SETTINGS, text=[text])
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_module, "_run", while_running)
    with pytest.raises(KeyboardInterrupt):
        compress(checkpoint, tmp_path / "out", SETTINGS, text=[text])


def test_fp8_checkpoints_are_read_as_what_they_stand_for(tiny_config, tmp_path):
    fp8, plain = tmp_path / "fp8", tmp_path / "plain"
    write_fp8_checkpoint(fp8, tiny_config(**WIDTHS), block_size=(32, 32))
    DeepseekV3ForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16).save_pretrained(plain)
    settings = replace(SETTINGS, method="nearest")
    for folder in (fp8, plain):
        compress(folder, tmp_path / f"{folder.name}_out", settings)
    ours, expected = (stored(tmp_path / f"{name}_out") for name in ("fp8", "plain"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def with_config(checkpoint, folder, **fields):
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def without_tensor(checkpoint, folder, name):
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_cannot_be_done_is_refused_before_any_work(checkpoint, compressed, make_model, text, tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\0\xff")
    quantised = with_config(checkpoint, tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    other = with_config(checkpoint, tmp_path / "other", model_type="llama")
    half = without_tensor(checkpoint, tmp_path / "half", "model.layers.1.mlp.experts.3.up_proj.weight")
    no_norm = without_tensor(checkpoint, tmp_path / "norm", "model.norm.weight")
    odd, bare = tmp_path / "odd", tmp_path / "bare"
    make_model().save_pretrained(odd)
    make_model(**WIDTHS).save_pretrained(bare)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    cases = [
        ({"checkpoint": compressed[0]}, "CHECKPOINT", "quantised already, by compressed-tensors"),
        ({"checkpoint": quantised}, "CHECKPOINT", "config.json: the checkpoint is quantised already, by gptq"),
        ({"checkpoint": other}, "CHECKPOINT", "type 'llama'"),
        ({"checkpoint": half}, "CHECKPOINT", "missing tensors 'model.layers.1.mlp.experts.3.up_proj.weight'"),
        ({"checkpoint": no_norm}, "CHECKPOINT", "lacks tensors of an official checkpoint: model.norm.weight"),
        ({"checkpoint": tmp_path / "none"}, "CHECKPOINT", "no such folder"),
        ({"checkpoint": odd}, "CHECKPOINT", "multiples of 32 wide; .* has an input of"),
        ({"checkpoint": bare}, "CHECKPOINT", "no tokenizer"),
        ({"text": [short]}, "--text", "too few to calibrate on: 2,048 are the least"),
        ({"text": [binary]}, "--text", "is not text"),
        ({"text": [tmp_path / "none"]}, "--text", "does not exist"),
        ({"memory": 100 << 20}, "--memory", "0.1 GiB are too few: .* take"),
        ({"settings": replace(SETTINGS, window=4096, tokens=4096)}, "--window", "2048 tokens of the model"),
        ({"settings": replace(SETTINGS, prune=0.3)}, "--prune", "0.25 is the nearest share"),
        ({"settings": replace(SETTINGS, prune=0.75)}, "--prune", "leaves 2 of 8 experts"),
        ({"settings": replace(SETTINGS, heal=10)}, "--heal", "give that too"),
        ({"settings": CompressionSettings(16, head_bits=16)}, "--bits", "all of them"),
        ({"settings": CompressionSettings(8, experts_bits=16)}, "--experts-bits", "opens no such"),
        ({"output": tmp_path / "taken"}, "--output", "is there already"),
        ({"output": tmp_path / "none" / "out"}, "--output", "there is no folder"),
        ({"output": text}, "--output", "is there already"),
    ]
    for changed, option, message in cases:
        arguments = {"checkpoint": checkpoint, "output": tmp_path / "out", "settings": SETTINGS, "text": [text]}
        with pytest.raises(OptionError, match=message) as error:
            compress(**{**arguments, **changed})
        assert error.value.option == option
        assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists(), message


def test_removing_experts_says_what_memory_it_takes(checkpoint, text, tmp_path, monkeypatch):
    """Less at random, which reads shard by shard; most where what is left is trained."""
    needs, original = [], compression_job.pruning_memory
    monkeypatch.setattr(compression_job, "pruning_memory", lambda *given: needs.append(original(*given)) or 1 << 60)
    for fields in ({"prune_by": "random"}, {}, {"heal": 1}):
        with pytest.raises(OptionError, match="removing experts, which has the model in memory, takes") as error:
            compress(checkpoint, tmp_path / "out", replace(SETTINGS, prune=0.25, **fields), text=[text])
        assert error.value.option == "--memory"
    sizes = {name: tensor.nbytes for name, tensor in stored(checkpoint).items()}
    whole, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    assert needs[0] == pytest.approx(needs[1], abs=1 << 22)  # of one shard
    assert needs[2] - needs[1] > 4 * (whole - experts / 4)


@pytest.mark.parametrize(
    "fields, option",
    [
        ({"bits": 3}, "--bits"),
        ({"experts_bits": 5}, "--experts-bits"),
        ({"head_bits": 3}, "--head-bits"),
        ({"method": "awq"}, "--method"),
        ({"window": 1}, "--window"),
        ({"tokens": 255}, "--tokens"),
        ({"min_tokens": 0}, "--min-tokens"),
        ({"seed": -1}, "--seed"),
        ({"prune": 1.0}, "--prune"),
        ({"prune_by": "size"}, "--prune-by"),
        ({"heal": -1}, "--heal"),
    ],
)
def test_settings_name_the_option_that_cannot_be(fields, option):
    with pytest.raises(OptionError) as error:
        CompressionSettings(**fields)
    assert error.value.option == option


def test_sizes_of_memory():
    assert [parse_memory(text) for text in ("8GiB", "500 MB", "1.5kib", "77")] == [8 << 30, 500_000_000, 1536, 77]
    for text in ("much", "8 GiBs", "-1GB", ""):
        with pytest.raises(OptionError, match="is no size"):
            parse_memory(text)


def test_without_text_files_are_taken_that_quickstart_does_not_hold_out(checkpoint, byte_tokenizer):
    taken = calibration_text(checkpoint, None, SETTINGS, 2, 258)
    corpus = build_corpus(standard_library(), "", max_bytes=32_000_000)
    train = "".join(document.text for document in corpus.train)
    assert {document.text for document in corpus.held_out} == set(read_texts(None)[1])
    pieces = [byte_tokenizer.decode(window) for window in taken.windows]
    # A window may reach over the end of a file
    assert statistics.mean(piece in train for piece in pieces) > 0.8
    assert torch.equal(taken.windows, calibration_text(checkpoint, None, SETTINGS, 2, 258).windows)
    assert taken.sha256 != calibration_text(checkpoint, None, replace(SETTINGS, seed=1), 2, 258).sha256


def test_the_python_of_the_page(checkpoint, text, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "examples" / "compress.md").read_text(encoding="utf-8")
    steps, whole = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    shutil.copytree(checkpoint, tmp_path / "dsv3-quickstart")
    shutil.copyfile(text, tmp_path / "notes")
    monkeypatch.chdir(tmp_path)
    for given, small in (("tokens=65_536", "tokens=2048"), ("heal=200", "heal=1")):
        assert given in whole
        whole = whole.replace(given, small)
    exec(compile(whole, "<page>", "exec"), {})
    ratio, layers = capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)
    assert float(ratio) > 2 and ast.literal_eval(layers).keys() == {0, 1, 2, 3}

    model = AutoModelForCausalLM.from_pretrained("dsv3-quickstart")
    data = TokenBlocks(torch.arange(256), 16)
    args = TrainingArguments("run", max_steps=2, use_cpu=True, report_to="none", per_device_train_batch_size=2)
    inputs = {"input_ids": torch.arange(512)[None] % 256}
    names = {"folder": "dsv3-quickstart", "model": model, "data": data, "args": args, "inputs": inputs}
    exec(compile(steps, "<page>", "exec"), names)
    assert names["trainer"].state.global_step == 2 and model.config.n_routed_experts == 6


def test_the_command(checkpoint, compressed, text, tmp_path):
    runner = CliRunner()
    arguments = ["compress", str(checkpoint), "--output", str(tmp_path / "out"), "--text", str(text), *OPTIONS]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert_same_files(tmp_path / "out", compressed[0])
    assert "times less than bf16" in result.output and "experts not calibrated" in result.output
    refused = runner.invoke(app, arguments)
    assert refused.exit_code == 2 and "--output" in refused.output
