"""GGUF files through `from_pretrained(..., gguf_file=…)`: those of `export_gguf`, and llama.cpp's own shapes."""

import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf_checkpoints import values_of
from packed_files import check_saved_again
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
)

import transformers_dsv3
from transformers_dsv3.compression.gguf.export import export_gguf
from transformers_dsv3.compression.gguf.file import read_gguf
from transformers_dsv3.compression.gguf.tokenizer import SPLITS, metadata_of_tokenizer, tokenizer_of
from transformers_dsv3.compression.quantized_weights import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
)
from transformers_dsv3.kernels.quantized_groups import dequantize
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError


TOKENS = torch.arange(40)[None] % 300


def load(file, cls=AutoModelForCausalLM, **options):
    return cls.from_pretrained(file.parent, gguf_file=file.name, **options)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("type", ["f32", "bf16"])
def test_float_files_are_the_checkpoint(checkpoint, gguf_files, type):
    ours, dtype = load(gguf_files(type)), torch.float32 if type == "f32" else torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert ours.dtype == dtype and same_weights(ours, expected)
    left_out = {"_name_or_path", "dtype", "transformers_version", "pad_token_id", "initializer_range"}
    fields, found = expected.config.to_dict(), ours.config.to_dict()
    assert {k: v for k, v in fields.items() if found[k] != v and k not in left_out} == {}
    assert (
        ours.name_or_path == str(gguf_files(type).parent)
        and ours.generation_config.eos_token_id == fields["eos_token_id"]
    )


@pytest.mark.parametrize(("type", "bits"), [("q8_0", 8), ("q4_0", 4)])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["auto", "fp32"])
def test_blocks_are_computed_with(checkpoint, gguf_files, type, bits, dtype):
    model = load(gguf_files(type), dtype=dtype)
    assert model.dtype == (dtype or torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=model.dtype)
    transformers_dsv3.quantize(expected, bits)
    assert same_weights(model, expected)
    assert torch.equal(logits(model), logits(expected))
    head, experts = model.lm_head, model.model.mtp[0].mlp.experts
    assert isinstance(head, QuantizedLinear) and isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(experts, QuantizedExperts) and (head.bits, experts.bits) == (8, bits)
    held = sum(t.nbytes for t in model.state_dict().values())
    assert held == pytest.approx(gguf_files(type).stat().st_size, rel=0.1)
    drafted = model.generate(TOKENS[:, :8], max_new_tokens=6, do_sample=False, use_mtp=True)
    assert torch.equal(drafted, model.generate(TOKENS[:, :8], max_new_tokens=6, do_sample=False))


def test_all_dequantised(gguf_files, resave, tmp_path):
    file = gguf_files("q4_0")
    plain = load(file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    assert type(plain.lm_head) is torch.nn.Linear
    values = values_of(file)
    assert torch.equal(plain.model.mtp[0].eh_proj.weight, values["blk.2.nextn.eh_proj.weight"])
    gate_up = torch.cat([values["blk.1.ffn_gate_exps.weight"], values["blk.1.ffn_up_exps.weight"]], dim=1)
    assert torch.equal(plain.model.layers[1].mlp.experts.gate_up_proj, gate_up)
    assert torch.allclose(logits(plain), logits(load(file, dtype=torch.float32)), atol=1e-5)
    # It is a plain model, which saves
    again = AutoModelForCausalLM.from_pretrained(resave(plain, file, tmp_path / "saved"))
    assert same_weights(again, plain)


@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0", "q4_0"])
def test_written_again_byte_by_byte(gguf_files, resave, tmp_path, type):
    file = gguf_files(type)
    dtype = torch.bfloat16 if type == "bf16" else torch.float32
    model = load(file, quantization_config=GgufConfig(dequantize=True), dtype=dtype)
    again = export_gguf(resave(model, file, tmp_path / "saved"), tmp_path / "again.gguf", type, progress=False)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_written_again_from_what_was_kept(gguf_files, resave, tmp_path, type):
    """Blocks that were computed with are saved as compressed-tensors, and are blocks again."""
    file = gguf_files(type)
    model = load(file, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    check_saved_again(tmp_path / "model")
    folder = resave(model, file, tmp_path / "saved")
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder), load(file, dtype=torch.float32))
    assert export_gguf(folder, tmp_path / "again.gguf", type, progress=False).read_bytes() == file.read_bytes()


def test_variants(save_for_gguf, resave, tmp_path):
    """No query LoRA, tied head, no MTP layer, YaRN, one group: its files say so, quantised ones too."""
    rope = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 0.7}
    fields = {"q_lora_rank": None, "tie_word_embeddings": True, "num_nextn_predict_layers": 0, "n_group": 1}
    folder = save_for_gguf(tmp_path / "model", rope_parameters=rope, first_k_dense_replace=0, **fields)
    for type, dtype in (("bf16", None), ("q8_0", torch.float32)):
        file = export_gguf(folder, tmp_path / f"{type}.gguf", type, progress=False)
        model = load(file, dtype=dtype)
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        assert model.config.rope_parameters == expected.config.rope_parameters
        assert model.config.q_lora_rank is None and model.config.tie_word_embeddings
        if type == "q8_0":
            transformers_dsv3.quantize(expected, 8)
        assert torch.equal(logits(model), logits(expected))
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_other_classes(gguf_files):
    base = load(gguf_files("q8_0"), AutoModel, dtype=torch.float32)
    with torch.no_grad():
        expected = load(gguf_files("q8_0"), dtype=torch.float32).model(TOKENS).last_hidden_state
        assert torch.equal(base(TOKENS).last_hidden_state, expected)
    folder = gguf_files("f32").parent
    config = AutoConfig.from_pretrained(folder, gguf_file="f32.gguf")
    assert isinstance(config, transformers_dsv3.DeepseekV3Config)
    own, loading = transformers_dsv3.DeepseekV3ForCausalLM.from_pretrained(
        folder, gguf_file="f32.gguf", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(logits(own), logits(load(gguf_files("f32"))))


def test_tokenizer(gguf_files, bpe):
    ours = AutoTokenizer.from_pretrained(gguf_files("f32").parent, gguf_file="f32.gguf")
    for text in ("the theatre there", "don't  2024\n\n<|end_of_text|> é中 <|endoftext|>"):
        ids = bpe(text)["input_ids"]
        assert ours(text)["input_ids"] == ids and ids[0] == bpe.bos_token_id
        assert ours.decode(ids, skip_special_tokens=True) == bpe.decode(ids, skip_special_tokens=True)
    assert ours.chat_template == bpe.chat_template
    assert (ours.bos_token, ours.eos_token) == (bpe.bos_token, bpe.eos_token)


def test_tokenizer_of_deepseek(bpe, tiny_config):
    """Its three expressions are written by name and built from it; tokens in brackets of its own stay whole."""
    config = tiny_config(vocab_size=320)
    fields = metadata_of_tokenizer(bpe, config)
    tokens = list(fields["tokenizer.ggml.tokens"])
    tokens[310:312] = ["<｜begin▁of▁sentence｜>", "<｜User｜>"]
    types = list(fields["tokenizer.ggml.token_type"])
    types[310:312] = [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    built = tokenizer_of(
        {
            "tokens": tokens,
            "token_type": types,
            "merges": fields["tokenizer.ggml.merges"],
            "pre_tokenizer_type": "deepseek-v3",
        }
    )
    assert built.encode("<｜begin▁of▁sentence｜><｜User｜>the").ids[:2] == [310, 311]
    pieces = [built.decode([i]) for i in built.encode("20245 a中").ids]
    assert "".join(pieces[:5]) == "20245" and "[PAD319]" not in built.get_vocab()
    words = [word for word, _ in built.pre_tokenizer.pre_tokenize_str("20245 a中")]
    assert words[:2] == ["202", "45"] and len(words) == 4
    again = metadata_of_tokenizer(PreTrainedTokenizerFast(tokenizer_object=built), config)
    assert again["tokenizer.ggml.pre"] == "deepseek-v3" and again["tokenizer.ggml.tokens"] == tokens
    assert set(SPLITS) == {"gpt-2", "deepseek-v3"}


def rewritten(file, path, tensors=lambda name, kind, data: [(name, kind, data)], fields=None, split=None):
    """A GGUF file again by llama.cpp's package, some tensors and values in another form."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(path, "deepseek2")
    changed = fields or {}
    for key, value in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        content = changed.get(key, value.contents())
        if content is not None:
            kind = value.types[0]
            writer.add_key_value(key, content, kind, value.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(*reversed([int(n) for n in tensor.shape]))
        for name, kind, data in tensors(tensor.name, tensor.tensor_type, values):
            raw = gguf.quantize(np.ascontiguousarray(data), kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_of_other_writers_are_dequantised(gguf_files, tmp_path):
    """Q5_0, Q4_1 and F16 by llama.cpp's package; experts of Q4_0 and Q8_0 in one layer meet in 8 bits."""
    kinds = gguf.GGMLQuantizationType
    wanted = {
        "blk.0.ffn_down.weight": kinds.Q5_0,
        "blk.1.attn_output.weight": kinds.Q4_1,
        "output.weight": kinds.F16,
        "blk.1.ffn_gate_exps.weight": kinds.Q4_0,
        "blk.1.ffn_up_exps.weight": kinds.Q4_0,
        "blk.1.ffn_down_exps.weight": kinds.Q8_0,
        "blk.2.ffn_gate_exps.weight": kinds.Q4_0,
        "blk.2.ffn_up_exps.weight": kinds.Q8_0,
        "blk.2.ffn_down_exps.weight": kinds.Q5_1,
    }
    file = rewritten(
        gguf_files("f32"), tmp_path / "m.gguf", lambda name, kind, data: [(name, wanted.get(name, kind), data)]
    )
    model, values = load(file, dtype=torch.float32), values_of(file)
    assert model.dtype == torch.float32 and load(file).dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, values["blk.0.ffn_down.weight"])
    assert torch.equal(model.model.layers[1].self_attn.o_proj.weight, values["blk.1.attn_output.weight"])
    assert torch.equal(model.lm_head.weight, values["output.weight"])
    mixed, plain = model.model.layers[1].mlp.experts, model.model.mtp[0].mlp.experts
    assert isinstance(mixed, QuantizedExperts) and mixed.bits == 8
    gate_up = torch.cat([values["blk.1.ffn_gate_exps.weight"], values["blk.1.ffn_up_exps.weight"]], dim=1)
    assert torch.equal(dequantize(mixed.gate_up_proj, mixed.gate_up_proj_scale, torch.float32), gate_up)
    assert torch.equal(
        dequantize(mixed.down_proj, mixed.down_proj_scale, torch.float32), values["blk.1.ffn_down_exps.weight"]
    )
    assert torch.equal(plain.down_proj, values["blk.2.ffn_down_exps.weight"])


def test_joined_tensors_and_older_keys(gguf_files, tmp_path):
    """`kv_b` whole, gate and up in one, widths of heads where newer files have those of latents."""
    held = {}

    def joined(name, kind, data):
        block, _, rest = name.partition(".attn_")
        if rest in ("k_b.weight", "v_b.weight"):
            held[name] = data
            if rest == "k_b.weight":
                return []
            keys = held[f"{block}.attn_k_b.weight"].transpose(0, 2, 1)
            return [(f"{block}.attn_kv_b.weight", kind, np.concatenate([keys, data], 1).reshape(-1, data.shape[-1]))]
        if name.endswith("ffn_gate_exps.weight"):
            held[name] = data
            return []
        if name.endswith("ffn_up_exps.weight"):
            both = np.concatenate([held[name.replace("up_exps", "gate_exps")], data], 1)
            return [(name.replace("up_exps", "gate_up_exps"), kind, both)]
        return [(name, kind, data)]

    older = {"deepseek2.attention.key_length_mla": None, "deepseek2.attention.value_length_mla": None}
    older |= {"deepseek2.attention.key_length": 24, "deepseek2.attention.value_length": 16}
    file = rewritten(gguf_files("f32"), tmp_path / "m.gguf", joined, older)
    assert same_weights(load(file), load(gguf_files("f32")))


def test_mtp_layers_that_a_converter_left_out(gguf_files, tmp_path):
    """llama.cpp's converter counts no MTP layer; other tools keep the count and drop the tensors."""

    def trunk(name, kind, data):
        return [] if name.startswith("blk.2.") else [(name, kind, data)]

    none = {"deepseek2.block_count": 2, "deepseek2.nextn_predict_layers": None}
    full = load(gguf_files("f32"))
    for fields in (none, {}):
        model = load(rewritten(gguf_files("f32"), tmp_path / "m.gguf", trunk, fields))
        assert model.config.num_hidden_layers == 2 and model.config.num_nextn_predict_layers == 0
        assert torch.equal(logits(model), logits(full))


def test_split_files(gguf_files, tmp_path):
    """As `gguf-split` writes them: metadata in the first, tensors in all."""
    names = list(read_gguf(str(gguf_files("q8_0"))).tensors)
    parts = [tmp_path / f"m-{i + 1:05}-of-00002.gguf" for i in range(2)]
    plain = rewritten(gguf_files("f32"), tmp_path / "plain.gguf")
    for i, path in enumerate(parts):
        mine = set(names[i::2])
        rewritten(plain, path, lambda name, kind, data, mine=mine: [(name, kind, data)] if name in mine else [])
        add_split(path, i)
    assert same_weights(load(parts[0]), load(gguf_files("f32")))
    with pytest.raises(CheckpointError, match="one of 2 files; give the first"):
        transformers_dsv3.DeepseekV3ForCausalLM.from_pretrained(tmp_path, gguf_file=parts[1].name)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="m-00002-of-00002.gguf is not there"):
        read_gguf(str(parts[0]))


def add_split(path, number):
    whole = path.with_suffix(".whole")
    path.rename(whole)
    reader, writer = gguf.GGUFReader(whole), gguf.GGUFWriter(path, "deepseek2")
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = value.types[0]
            last = value.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value.contents(), kind, last)
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole.unlink()


def test_bad_files(gguf_files, tmp_path):
    """Each is refused before a model is made, with the file's name."""
    whole = gguf_files("q8_0").read_bytes()
    path, own = tmp_path / "m.gguf", transformers_dsv3.DeepseekV3ForCausalLM

    def refused(pattern, data=None, error=CheckpointError, **options):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(error, match=pattern):
            own.from_pretrained(tmp_path, gguf_file=path.name, **options)

    refused(r"m.gguf: truncated, the file of \d+ bytes ends before tensors .*'output.weight'", whole[:-40])
    for length in (8, 30, 700, 3000):
        refused("m.gguf: truncated, the file of", whole[:length])
    refused("not a GGUF file", b"PK" + whole)
    refused("version 1 of GGUF", b"GGUF\x01" + whole[5:])
    at = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    refused(
        "tensor 'output_norm.weight' is of type 200, which is unknown", whole[:at] + bytes([200]) + whole[at + 1 :]
    )
    shutil.copy(gguf_files("q8_0"), path)
    refused("is transformers.GgufConfig", error=ValueError, quantization_config={"quant_method": "fp8"})

    def without(name, kind, data):
        return [] if name == "blk.1.ffn_up_exps.weight" else [(name, kind, data)]

    rewritten(gguf_files("f32"), path, without)
    refused("missing tensors 'blk.1.ffn_up_exps.weight'; nothing was loaded")
    rewritten(gguf_files("f32"), path, fields={"deepseek2.expert_feed_forward_length": 64})
    refused("shapes that its metadata do not ask for")
    rewritten(gguf_files("f32"), path, fields={"deepseek2.expert_gating_func": 1})
    refused("expert_gating_func is 1; DeepSeek-V3's router is 2")
    rewritten(gguf_files("f32"), path, fields={"deepseek2.embedding_length": None})
    refused("lacks deepseek2.embedding_length")
    data = gguf_files("q8_0").read_bytes()
    at = data.index(b"deepseek2", data.index(b"general.architecture"))
    refused("of architecture 'deepseek7'", data[:at] + b"deepseek7" + data[at + 9 :])
