"""GGUF files that `export_gguf` writes, as llama.cpp's own package reads them."""

import json
import os
import shutil
import signal
import sys
import types

import gguf
import pytest
import torch
from fp8_files import tiny_config, write_fp8_checkpoint
from gguf_checkpoints import field, tensors_of, values_of
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests import programs
from transformers_dsv3.compression.gguf.export import export_gguf
from transformers_dsv3.compression.gguf.format import Q4_0, Q8_0, pack_blocks, split_kv_b, unpack_blocks
from transformers_dsv3.compression.packed.format import packed_config, packed_tensors
from transformers_dsv3.compression.quantized_weights import quantize_groups
from transformers_dsv3.kernels.quantized_groups import whole_numbers
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError
from transformers_dsv3.option_error import OptionError


def test_structure(gguf_files, bpe):
    file = gguf_files("f32")
    types = {name: kind for name, (kind, _) in tensors_of(file).items()}
    assert set(types.values()) == {"F32"}
    # Two layers, one dense, and the MTP layer behind them
    mtp = {name.removeprefix("blk.2.") for name in types if name.startswith("blk.2.")}
    assert {"nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight", "nextn.shared_head_norm.weight"} <= mtp
    assert "ffn_gate_exps.weight" in mtp and "blk.0.ffn_gate.weight" in types and "output.weight" in types
    for key, value in {
        "block_count": 3,
        "nextn_predict_layers": 1,
        "leading_dense_block_count": 1,
        "attention.head_count_kv": 1,
        "attention.key_length": 40,
        "attention.key_length_mla": 24,
        "attention.value_length": 32,
        "attention.value_length_mla": 16,
        "rope.dimension_count": 8,
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_group_count": 2,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
    }.items():
        assert field(file, f"deepseek2.{key}") == value, key
    assert field(file, "tokenizer.ggml.pre") == "gpt-2" and field(file, "tokenizer.ggml.add_bos_token") is True
    assert field(file, "tokenizer.chat_template") == bpe.chat_template
    tokens = field(file, "tokenizer.ggml.tokens")
    assert len(tokens) == 320 and tokens[: len(bpe)] == bpe.convert_ids_to_tokens(range(len(bpe)))
    assert field(file, "tokenizer.ggml.token_type")[bpe.eos_token_id] == gguf.TokenType.CONTROL


def test_values_of_float_files(checkpoint, gguf_files):
    stored, config = load_file(checkpoint / "model.safetensors"), json.loads((checkpoint / "config.json").read_text())
    for type in ("f32", "bf16"):
        values = values_of(gguf_files(type))
        assert torch.equal(values["token_embd.weight"], stored["model.embed_tokens.weight"].float())
        assert torch.equal(values["blk.2.nextn.eh_proj.weight"], stored["model.layers.2.eh_proj.weight"].float())
        up = torch.stack([stored[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(8)])
        assert torch.equal(values["blk.1.ffn_up_exps.weight"], up.float())
        assert torch.equal(
            values["blk.1.exp_probs_b.bias"], stored["model.layers.1.mlp.gate.e_score_correction_bias"].float()
        )
        whole = stored["model.layers.1.self_attn.kv_b_proj.weight"].float()
        keys, parts = split_kv_b(whole, types.SimpleNamespace(**config))
        assert torch.equal(values["blk.1.attn_k_b.weight"], keys) and torch.equal(
            values["blk.1.attn_v_b.weight"], parts
        )


@pytest.mark.parametrize(("type", "bits"), [("q8_0", 8), ("q4_0", 4)])
def test_blocks_are_those_of_quantize_groups(checkpoint, gguf_files, type, bits):
    stored, found = load_file(checkpoint / "model.safetensors"), tensors_of(gguf_files(type))
    kind = type.upper()
    for name, source, wanted in [
        ("blk.1.attn_output.weight", "model.layers.1.self_attn.o_proj.weight", bits),
        ("blk.2.nextn.eh_proj.weight", "model.layers.2.eh_proj.weight", bits),
        ("token_embd.weight", "model.embed_tokens.weight", 8),
        ("output.weight", "lm_head.weight", 8),
    ]:
        blocks = pack_blocks(*quantize_groups(stored[source], wanted))
        assert found[name] == ("Q8_0" if wanted == 8 else kind, blocks.numpy().tobytes()), name
    experts = [stored[f"model.layers.2.mlp.experts.{e}.down_proj.weight"] for e in range(8)]
    blocks = b"".join(pack_blocks(*quantize_groups(weight, bits)).numpy().tobytes() for weight in experts)
    assert found["blk.2.ffn_down_exps.weight"] == (kind, blocks)
    # llama.cpp's package makes of blocks what they stand for
    values = values_of(gguf_files(type))
    assert torch.allclose(values["blk.2.ffn_down_exps.weight"], torch.stack(experts).float(), atol=0.2)
    assert {kind for name, (kind, _) in found.items() if "norm" in name or "gate_inp" in name} == {"F32"}
    assert {kind for name, (kind, _) in found.items() if "attn_k_b" in name or "attn_v_b" in name} == {"BF16"}


@pytest.mark.parametrize(("bits", "kind"), [(8, Q8_0), (4, Q4_0)])
def test_blocks_there_and_back(bits, kind):
    values, scale = quantize_groups(torch.randn(3, 64), bits)
    again = unpack_blocks(pack_blocks(values, scale), kind)
    assert torch.equal(again[0], values) and torch.equal(again[1], scale)


def packed_copy(checkpoint, folder, bits):
    """The checkpoint as compressed-tensors writes it: matrices in `bits`, embedding and head in 8."""
    shutil.copytree(checkpoint, folder)
    stored, written = load_file(folder / "model.safetensors"), {}
    for name, weight in stored.items():
        if weight.dim() == 1 or "norm" in name or "kv_b_proj" in name or name.endswith("mlp.gate.weight"):
            written[name] = weight
            continue
        own = 8 if "embed_tokens" in name or "head" in name else bits
        values, scale = quantize_groups(weight, 8 if own == 8 else 4)
        whole = whole_numbers(values)
        if own == 3:
            whole = whole.clamp(-4, 3)
        written |= packed_tensors(name, whole, scale, own)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    targets = {8: ["re:.*(embed_tokens|head)$"]}
    targets[bits] = [*targets.get(bits, []), "Linear"]
    config["quantization_config"] = packed_config(targets, ["re:.*kv_b_proj"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("type", "bits"), [("q8_0", 8), ("q4_0", 4)])
def test_packed_checkpoints_keep_their_numbers(checkpoint, gguf_files, tmp_path, type, bits):
    folder = packed_copy(checkpoint, tmp_path / "packed", bits)
    other = "q4_0" if type == "q8_0" else "q8_0"
    # In whichever type of file they are asked for
    for asked in (type, other):
        written = tensors_of(export_gguf(folder, tmp_path / "packed.gguf", asked, progress=False))
        assert written == tensors_of(gguf_files(type))


def test_3_bits_and_floats_of_packed_checkpoints(checkpoint, gguf_files, tmp_path):
    folder = packed_copy(checkpoint, tmp_path / "packed", 3)
    values = values_of(export_gguf(folder, tmp_path / "q.gguf", "q4_0", progress=False))
    floats = values_of(export_gguf(folder, tmp_path / "f.gguf", "f32", progress=False))
    assert tensors_of(tmp_path / "q.gguf")["blk.1.attn_output.weight"][0] == "Q4_0"
    for name, value in floats.items():
        if "attn_k_b" not in name and "attn_v_b" not in name:
            assert torch.equal(value, values[name]), name


def test_fp8_checkpoint(bpe, tmp_path):
    """Three shards, blocks of 32 with partial ones at the ends; embedding, head and norms are bf16."""
    exact = write_fp8_checkpoint(tmp_path, tiny_config(vocab_size=320), block_size=(32, 32))
    bpe.save_pretrained(tmp_path)
    values = values_of(export_gguf(tmp_path, tmp_path / "f.gguf", "f32", progress=False))
    for name, source in {
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "output.weight": "lm_head.weight",
    }.items():
        assert torch.equal(values[name], exact[source].float()), name
    experts = [exact[f"model.layers.2.mlp.experts.{e}.down_proj.weight"] for e in range(4)]
    assert torch.equal(values["blk.2.ffn_down_exps.weight"], torch.stack(experts).float())


def test_variants(save_for_gguf, tmp_path):
    """Shards, no query LoRA, a tied head, no MTP layer, YaRN."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    folder = save_for_gguf(
        tmp_path / "model",
        q_lora_rank=None,
        tie_word_embeddings=True,
        num_nextn_predict_layers=0,
        n_group=1,
        n_shared_experts=2,
        rope_parameters={**rope, "mscale": 0.7, "mscale_all_dim": 0.7},
    )
    file = export_gguf(folder, tmp_path / "model.gguf", "bf16", progress=False)
    names = tensors_of(file)
    assert "output.weight" not in names and "blk.0.attn_q.weight" in names and "blk.2.attn_norm.weight" not in names
    assert field(file, "deepseek2.nextn_predict_layers") is None
    assert field(file, "deepseek2.expert_group_count") is None
    assert field(file, "deepseek2.rope.scaling.yarn_log_multiplier") == pytest.approx(0.07)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = export_gguf(folder, tmp_path / "sharded.gguf", "bf16", progress=False)
    assert again.read_bytes() == file.read_bytes()


def test_killed(checkpoint, gguf_files, tmp_path):
    """What a killed process leaves is not taken for a file, and the same command completes."""
    output = tmp_path / "model.gguf"
    arguments = ["-m", "transformers_dsv3.cli", "export-gguf", checkpoint, "--output", output, "--type", "q4_0"]
    killed = programs.run(arguments, signal_when=(tmp_path / "model.gguf.partial", signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf.partial"]
    export_gguf(checkpoint, output, "q4_0", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert output.read_bytes() == gguf_files("q4_0").read_bytes()


def test_types_of_llama_cpp_are_made_by_its_tool(checkpoint, gguf_files, tmp_path, monkeypatch):
    output = tmp_path / "model.gguf"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OptionError, match="q4_k_m is made by llama.cpp's llama-quantize, which is not on the PATH: "):
        export_gguf(checkpoint, output, "q4_k_m")
    tool = tmp_path / "llama-quantize"
    tool.write_text(
        f"#!{sys.executable}\nimport shutil, sys\nassert sys.argv[3] == 'Q4_K_M'\nshutil.copy(*sys.argv[1:3])\n"
    )
    tool.chmod(0o755)
    export_gguf(checkpoint, output, "q4_k_m", progress=False)
    assert output.read_bytes() == gguf_files("bf16").read_bytes()
    tool.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[2], 'w').write('half')\nsys.exit('no memory')\n")
    with pytest.raises(RuntimeError, match="no memory"):
        export_gguf(checkpoint, output, "q4_k_m", progress=False)
    assert output.read_bytes() == gguf_files("bf16").read_bytes()
    tool.write_text("no program")
    with pytest.raises(OSError, match="llama-quantize"):
        export_gguf(checkpoint, output, "q4_k_m", progress=False)
    assert output.read_bytes() == gguf_files("bf16").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "llama-quantize"}


def test_a_tool_that_outlived_its_command_does_not_write_into_the_next_file(
    checkpoint, gguf_files, tmp_path, monkeypatch
):
    """What a killed command left open is no file that another one makes."""
    output = tmp_path / "model.gguf"
    tool = tmp_path / "llama-quantize"
    tool.write_text(f"#!{sys.executable}\nimport shutil, sys\nshutil.copy(*sys.argv[1:3])\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    whole, partial = (output.with_name(f"model.gguf.{name}") for name in ("bf16.partial", "partial"))
    with open(whole, "wb") as read, open(partial, "wb") as written:
        read.write(b"begun")
        read.flush()
        export_gguf(checkpoint, output, "q4_k_m", progress=False)
        written.write(b"more")
        assert os.fstat(read.fileno()).st_size == 5
    assert output.read_bytes() == gguf_files("bf16").read_bytes()


def refused(pattern, *arguments, error=OptionError, option=None):
    with pytest.raises(error, match=pattern) as raised:
        export_gguf(*arguments, progress=False)
    assert option is None or raised.value.option == option


def test_refusals_of_options(checkpoint, tmp_path):
    refused("'q3' is none of f32, bf16", checkpoint, tmp_path / "a.gguf", "q3", option="--type")
    refused("there is no folder", checkpoint, tmp_path / "no" / "a.gguf", option="--output")
    refused("is a folder", checkpoint, tmp_path, option="--output")
    assert not list(tmp_path.iterdir())


def test_refusals_of_checkpoints(checkpoint, save_for_gguf, tmp_path):
    output = tmp_path / "a.gguf"

    def changed(name, **fields):
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    bare = changed("bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    refused("has no tokenizer that can be read", bare, output, option="CHECKPOINT")
    refused("'llama' model, not DeepSeek-V3", changed("llama", model_type="llama"), output, option="CHECKPOINT")
    refused("rope_interleave=False", changed("rope", rope_interleave=False), output, option="CHECKPOINT")
    other = changed("gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    refused("quantization_config is gptq", other, output, option="CHECKPOINT")
    refused(
        "experts.8.gate_proj.weight' is missing",
        changed("experts", n_routed_experts=10),
        output,
        error=CheckpointError,
    )
    refused(
        "has shape .* the config asks for", changed("wide", moe_intermediate_size=64), output, error=CheckpointError
    )
    odd = save_for_gguf(tmp_path / "odd", intermediate_size=48, moe_intermediate_size=24)
    refused(r"do not divide .*mlp.down_proj.weight \(48\)", odd, output, "q4_0", option="--type")
    export_gguf(odd, output, "bf16", progress=False)
    output.unlink()
    assert not output.exists() and not (tmp_path / "a.gguf.partial").exists()


def test_refusals_of_tokenizers(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*"))

    def save(pre_tokenizer, vocabulary=10, model=models.BPE):
        vocab = {f"a{i}": i for i in range(vocabulary)}
        tokenizer = Tokenizer(model(vocab, []) if model is models.BPE else model(vocab, unk_token="a0"))
        tokenizer.pre_tokenizer = pre_tokenizer
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a1").save_pretrained(folder)

    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    save(pre_tokenizers.Sequence([digits, byte_level]))
    refused(r"no name of llama.cpp's is known for its pre-tokenizer .*Split", folder, tmp_path / "a.gguf")
    save(pre_tokenizers.ByteLevel(add_prefix_space=False), vocabulary=400)
    refused("a token 399, and the model a vocabulary of 320", folder, tmp_path / "a.gguf")
    save(pre_tokenizers.Whitespace(), model=models.WordLevel)
    refused("its model is WordLevel", folder, tmp_path / "a.gguf")
    save(pre_tokenizers.ByteLevel(add_prefix_space=False))
    refused("it has no merges", folder, tmp_path / "a.gguf", option="CHECKPOINT")


def test_weights_that_no_block_holds(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = torch.nan
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        "'model.layers.1.mlp.experts.3.up_proj.weight' cannot be written",
        folder,
        tmp_path / "a.gguf",
        error=CheckpointError,
    )
    assert not list(tmp_path.glob("a.gguf*"))


def test_what_is_no_gguf_file_stays(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    weights, before = folder / "model.safetensors", (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(OptionError, match=r"safetensors is there and is no GGUF file, so it is not replaced"):
        export_gguf(folder, weights, progress=False)
    assert weights.read_bytes() == before
    for old in (b"", b"GGUF of before"):
        output = tmp_path / "model.gguf"
        output.write_bytes(old)
        export_gguf(folder, output, progress=False)
        assert output.stat().st_size > 1000
