"""Quantised checkpoints that stay packed, and ours: values beside the formats' own library, native opening ours."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from packed_files import (
    KIMI_IGNORES,
    WEIGHTS,
    awq,
    check_saved_again,
    compress,
    config_of,
    gptq,
    memory_of,
    plain_twin,
    rewrite,
    values_of,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DeepseekV3ForCausalLM

import transformers_dsv3
from transformers_dsv3 import PackedWeightsConfig, quantize
from transformers_dsv3.compression.quantized_weights import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
)
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.kernels.cpu.step import Program
from transformers_dsv3.kernels.quantized_groups import dequantize
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError, StoredTensor


QUANTIZED = (QuantizedLinear, QuantizedEmbedding, QuantizedExperts)
IDS = torch.arange(2, 40)[None]
FP32 = {"dtype": torch.float32}


@pytest.fixture
def saved(make_wide, tmp_path):
    """Function from changed fields to the folder of such a model in bf16."""

    def save(**fields):
        make_wide(**fields).to(torch.bfloat16).save_pretrained(tmp_path)
        return tmp_path

    return save


def check_values(model, expected):
    for name, value in values_of(model).items():
        assert torch.equal(value, expected[name]), name


def packed(model):
    """Last names of the modules that are packed, and the bits that they hold."""
    return {name.rpartition(".")[2]: m.bits for name, m in model.named_modules() if isinstance(m, QUANTIZED)}


class TestOurs:
    """What `save_pretrained` writes of quantised models."""

    @pytest.mark.parametrize(
        "bits, head_bits, fields",
        [(4, 8, {}), (8, 4, {"num_nextn_predict_layers": 2}), (4, None, {"attention_bias": True}),
         (8, 8, {"tie_word_embeddings": True, "num_nextn_predict_layers": 0})],
    )  # fmt: skip
    def test_saved_and_loaded_is_the_same(self, saved, tmp_path, bits, head_bits, fields):
        model = quantize(AutoModelForCausalLM.from_pretrained(saved(**fields)), bits, head_bits)
        model.save_pretrained(tmp_path / "a")
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not any(info.values())
        if not fields.get("tie_word_embeddings"):  # else the embedding is not quantised
            assert packed(loaded) == packed(model)
            values = values_of(loaded)
            assert all(torch.equal(values[name], value) for name, value in values_of(model).items())
            with torch.no_grad():
                assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        check_saved_again(tmp_path / "a", loaded)

    def test_shards(self, make_wide, tmp_path):
        model = quantize(make_wide(), 4)
        for name in "ab":
            model.save_pretrained(tmp_path / name, max_shard_size="50KB")
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        files = sorted(file.name for file in (tmp_path / "a").iterdir())
        assert len(files) > 4 and "model.safetensors.index.json" in files
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file

    @pytest.mark.parametrize("bits, head_bits", [(4, 8), (8, 4), (4, None)])
    def test_native_opens_it(self, make_wide, tmp_path, measured, bits, head_bits):
        pytest.importorskip("compressed_tensors")
        model = make_wide()
        quantized = quantize(copy.deepcopy(model), bits, head_bits)
        quantized.save_pretrained(tmp_path)
        twin = plain_twin(model, quantized)
        for name, module in twin.named_modules():
            if name.endswith(".experts"):  # as native has them, whatever the dtype
                module.to(torch.bfloat16).to(torch.float32)
        native, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **FP32)
        assert not info["missing_keys"]
        assert all(name.startswith("model.layers.2.") for name in info["unexpected_keys"])
        with torch.no_grad():
            native(IDS)  # which decompresses
            logits = nn.Module.float(native)(IDS).logits
            error = (logits - twin(IDS).logits).abs().max().item()
        measured["packed checkpoint in native Transformers, largest difference of a logit"] = error
        assert error < 1e-5

    def test_decodes_by_the_program(self, make_wide, tmp_path, monkeypatch):
        quantize(make_wide().to(torch.bfloat16), 4).save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        steps = []
        run = Program.run
        monkeypatch.setattr(Program, "run", lambda *arguments: steps.append(1) or run(*arguments))
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert steps or library.unavailable
        assert "4 bits in" in transformers_dsv3.explain(model)

    def test_the_decoder_alone(self, make_wide, tmp_path):
        model = quantize(make_wide(), 4)
        model.save_pretrained(tmp_path / "whole")
        decoder = AutoModel.from_pretrained(tmp_path / "whole")
        decoder.save_pretrained(tmp_path / "decoder")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
        assert type(again.lm_head) is nn.Linear  # made anew
        check_values(again.model, {n.removeprefix("model."): v for n, v in values_of(model).items()})

    @pytest.mark.parametrize("native_config", [False, True])
    def test_dequantised_on_request(self, make_wide, tmp_path, native_config):
        model = quantize(make_wide(), 4)
        model.save_pretrained(tmp_path / "a")
        if native_config:
            pytest.importorskip("compressed_tensors")
            from transformers import CompressedTensorsConfig as Config
        else:
            Config = PackedWeightsConfig
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=Config(dequantize=True))
        assert not packed(plain) and plain.dtype == torch.float32
        check_values(plain, values_of(model))
        plain.save_pretrained(tmp_path / "b")
        assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
        assert plain.train()(IDS, labels=IDS).loss.requires_grad

    def test_activations_are_chosen(self, make_wide, tmp_path):
        quantize(make_wide(), 4).save_pretrained(tmp_path)
        config = PackedWeightsConfig(activations="8")
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        assert torch.float32 in model.lm_head.rounded_dtypes
        with pytest.raises(ValueError, match="activations is '8', '16' or None, not 8"):
            PackedWeightsConfig(activations=8)


CHANNEL = {"strategy": "channel", "group_size": None}
LINEAR_NAMES = re.compile(r"_proj|kv_a_proj_with_mqa")


class TestOthers:
    """Files of other programs' layout: values are those of compressed-tensors' own decompression."""

    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("compressed_tensors")

    def test_kimi_k2(self, saved, measured):
        folder = saved(moe_intermediate_size=256, intermediate_size=64)
        config = config_of(ignore=KIMI_IGNORES)
        expected = rewrite(folder, config, compress, lambda name: ".experts." in name)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert packed(model) == {"experts": 4} and model.dtype == torch.bfloat16
        check_values(model, expected)
        size = (folder / "model.safetensors").stat().st_size
        copies = sum(t.nbytes for n, t in load_file(folder / "model.safetensors").items() if "layers.2." in n and (
            "embed_tokens" in n or "shared_head.head" in n))  # fmt: skip
        measured["memory of a Kimi-K2-like file after loading, of its bytes without copies"] = memory_of(model) / (
            size - copies
        )
        assert memory_of(model) < size - copies

    @pytest.mark.parametrize(
        "weights, form, held",
        [
            ({"num_bits": 3}, "pack-quantized", 4),
            ({"num_bits": 5}, "pack-quantized", 8),
            ({"num_bits": 8}, "pack-quantized", 8),
            ({"group_size": 64}, "pack-quantized", 4),
            (CHANNEL, "pack-quantized", 4),
            ({"num_bits": 8, **CHANNEL}, "int-quantized", 8),
            ({"num_bits": 8}, "int-quantized", 8),
            ({"symmetric": False}, "pack-quantized", 8),
            ({"num_bits": 3, "symmetric": False, **CHANNEL}, "pack-quantized", 4),
            ({"num_bits": 4, "symmetric": False}, "int-quantized", 8),
        ],
    )
    def test_values_are_those_of_the_library(self, saved, tmp_path, weights, form, held):
        weights = {**WEIGHTS, **weights}
        inputs = None
        if form == "int-quantized":
            inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        # All widths are multiples of 64
        folder = saved(moe_intermediate_size=64, intermediate_size=128, q_lora_rank=64, v_head_dim=16)
        config = config_of(weights, form=form, inputs=inputs)
        expected = rewrite(
            folder, config, partial(compress, weights=weights, form=form),
            lambda name: LINEAR_NAMES.search(name) and "kv_b_proj" not in name or "kv_b_proj" in name and
            weights["group_size"] == 32,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, **FP32)
        check_values(model, expected)
        found = packed(model)
        assert set(found.values()) == {held} and {"experts", "o_proj", "eh_proj"} <= found.keys()
        assert type(model.model.layers[0].self_attn.kv_b_proj) is nn.Linear and type(model.lm_head) is nn.Linear
        assert (torch.float32 in model.model.layers[0].self_attn.o_proj.rounded_dtypes) == (inputs is not None)
        with torch.no_grad():
            assert torch.isfinite(model(IDS).logits).all()
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        check_values(again, expected)
        check_saved_again(tmp_path / "again", again)

    @pytest.mark.parametrize(
        "what, reason",
        [
            ("order", "columns in another order"),
            ("fp32 scales", "scales that fp16 does not hold"),
            ("8-bit zero points", "zero points of 8 bits"),
            ("groups of 16", "groups of 16"),
            ("width", "inputs that are no multiple of 32"),
        ],
    )
    def test_what_layers_do_not_hold_is_dequantised(self, saved, caplog, what, reason):
        weights = dict(WEIGHTS)
        if what == "groups of 16":
            weights["group_size"] = 16
        elif what == "8-bit zero points":
            weights |= {"symmetric": False, "num_bits": 8}
        elif what == "width":
            weights |= CHANNEL
        folder = saved(**({"q_lora_rank": 24 if what == "width" else 64}))
        dtype = torch.float32 if what == "fp32 scales" else torch.bfloat16

        def change(weight):
            state, value = compress(weight, weights, scale_dtype=dtype)
            if what == "order":
                order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0)) // 32
                from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

                whole = unpack_from_int32(state["weight_packed"], 4, weight.shape)
                state["weight_g_idx"] = order.int()
                value = whole.float() * state["weight_scale"].float()[:, order]
            return state, value

        expected = rewrite(folder, config_of(weights), change, lambda name: "q_b_proj" in name or ".experts." in name)
        model = AutoModelForCausalLM.from_pretrained(folder, **FP32)
        check_values(model, expected)
        assert packed(model) == ({"experts": 4} if what == "width" else {})
        owner = "model.layers.0.self_attn.q_b_proj"
        assert re.search(rf"Dequantised, since they have {reason}.*: .*{re.escape(owner)}", caplog.text)

    def test_experts_of_different_bits_are_one_stack(self, saved):
        folder = saved()
        config = config_of(targets=["re:.*down_proj"])
        eight = {**WEIGHTS, "num_bits": 8}
        config["config_groups"]["group_1"] = {"targets": ["Linear"], "weights": eight, "input_activations": None}
        rewrite(folder, config, compress, lambda name: ".experts." in name and "down_proj" in name)
        # Those that are quantised already are no weights any more
        expected = rewrite(folder, config, partial(compress, weights=eight), lambda name: ".experts." in name)
        model = AutoModelForCausalLM.from_pretrained(folder, **FP32)
        assert packed(model) == {"experts": 8}
        values = values_of(model)
        assert all(torch.equal(values[name], value) for name, value in expected.items() if name in values)

    def test_experts_quantised_in_part_are_dequantised(self, saved, caplog):
        folder = saved()
        expected = rewrite(folder, config_of(), compress, lambda name: ".experts.1." in name)
        model = AutoModelForCausalLM.from_pretrained(folder, **FP32)
        check_values(model, expected)
        assert not packed(model) and "experts that are quantised in part: model.layers.1.mlp.experts" in caplog.text

    @pytest.mark.parametrize("layers", [1, 2])
    def test_layers_that_are_left_out(self, saved, layers):
        folder = saved()
        expected = rewrite(folder, config_of(), compress, lambda name: "o_proj" in name or ".experts." in name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, num_hidden_layers=layers, num_nextn_predict_layers=0, first_k_dense_replace=1
        )
        check_values(model, expected)
        assert packed(model).keys() == ({"o_proj"} if layers == 1 else {"o_proj", "experts"})


class TestGptqAndAwq:
    """Written by the formats' definition."""

    @pytest.mark.parametrize(
        "arguments, held",
        [({}, 4), ({"bits": 8}, 8), ({"bits": 3}, 4), ({"symmetric": False}, 8), ({"second": True}, 4),
         ({"group": 64}, 4), ({"order": True}, None)],
    )  # fmt: skip
    def test_gptq(self, saved, arguments, held):
        folder = saved(moe_intermediate_size=64)
        config = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        }
        config |= {"bits": arguments.get("bits", 4), "group_size": arguments.get("group", 32)}
        if arguments.get("second"):
            config["checkpoint_format"] = "gptq_v2"

        def change(weight):
            order = None
            if "order" in arguments:
                order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0)) // 32
            return gptq(weight, **{**arguments, "order": order})

        expected = rewrite(folder, config, change, lambda name: ".experts." in name)
        model = AutoModelForCausalLM.from_pretrained(folder, **FP32)
        check_values(model, expected)
        assert packed(model) == ({} if held is None else {"experts": held})
        model.save_pretrained(folder / "again")
        check_saved_again(folder / "again")

    def test_awq(self, saved):
        folder = saved()
        config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
        expected = rewrite(folder, config, awq, lambda name: "q_b_proj" in name or ".experts." in name)
        model = AutoModelForCausalLM.from_pretrained(folder, **FP32)
        check_values(model, expected)
        assert packed(model) == {"q_b_proj": 8, "experts": 8}
        model.save_pretrained(folder / "again")
        check_saved_again(folder / "again")


O_PROJ = "model.layers.0.self_attn.o_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


class TestBadFiles:
    @pytest.fixture
    def folder(self, make_wide, tmp_path):
        quantize(make_wide(), 4).save_pretrained(tmp_path)
        return tmp_path

    @pytest.fixture
    def refused(self, monkeypatch):
        """Loads, expecting an error with all of `parts`, before anything was read but scales."""

        def check(folder, *parts):
            read = StoredTensor.read_into
            with monkeypatch.context() as patch:
                patch.setattr(
                    StoredTensor,
                    "read_into",
                    lambda self, out: read(self, out) if "scale" in self.name else pytest.fail(self.name),
                )
                with pytest.raises(CheckpointError) as caught:
                    AutoModelForCausalLM.from_pretrained(folder)
            for part in parts:
                assert part in str(caught.value)

        return check

    @staticmethod
    def edit(folder, change):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    @pytest.mark.parametrize("owner", [O_PROJ, EXPERT])
    def test_missing_scale(self, folder, refused, owner):
        self.edit(folder, lambda tensors: tensors.pop(f"{owner}.weight_scale"))
        refused(folder, f"model.safetensors: '{owner}.weight_packed' is quantised and has no '{owner}.weight_scale'")

    def test_missing_expert(self, folder, refused):
        def change(tensors):
            for name in [name for name in tensors if name.startswith(EXPERT)]:
                del tensors[name]

        self.edit(folder, change)
        refused(folder, "model.safetensors: missing tensors", f"'{EXPERT}.weight")

    def test_scales_alone(self, folder, refused):
        self.edit(folder, lambda tensors: tensors.pop(f"{O_PROJ}.weight_packed"))
        refused(folder, "scales of quantised weights, which nothing here reads", f"'{O_PROJ}.weight_scale'")

    @pytest.mark.parametrize("owner", [O_PROJ, EXPERT])
    def test_wrong_shapes(self, folder, refused, owner):
        name = f"{owner}.weight_scale"
        self.edit(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
        refused(folder, f"model.safetensors: '{name}' has shape", f"'{owner}.weight_packed'", "in groups of 32")
        self.edit(folder, lambda tensors: tensors.update({
            f"{owner}.{part}": tensors[f"{owner}.{part}"][:16].contiguous() for part in ("weight_packed",)
        } | {name: torch.ones(16, 1 if owner == O_PROJ else 2, dtype=torch.bfloat16)}))  # fmt: skip
        refused(folder, f"tensor '{owner}.weight_packed' has shape (16, ", "the config asks for (")

    def test_more_experts_than_the_config_has(self, folder, refused):
        def change(tensors):
            for name in [name for name in tensors if ".experts.7." in name]:
                tensors[name.replace(".7.", ".8.")] = tensors[name].clone()

        self.edit(folder, change)
        refused(folder, "more experts than the config's 8", "experts.8.gate_proj.weight_packed'")

    def test_bits_that_the_config_does_not_say(self, folder, refused):
        fields = json.loads((folder / "config.json").read_text())
        fields["quantization_config"]["ignore"].append("re:.*o_proj")
        (folder / "config.json").write_text(json.dumps(fields))
        refused(folder, f"'{O_PROJ}.weight_packed' is quantised, and no group of the config is for it")

    def test_a_truncated_file(self, folder, refused):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        refused(folder, "model.safetensors: truncated")

    def test_quantising_what_is_quantised(self, folder):
        with pytest.raises(ValueError, match="quantised already"):
            quantize(AutoModelForCausalLM.from_pretrained(folder))


def test_the_smallest_whole_number_is_no_other(make_wide):
    """-128, which files of other programs have and `quantize` does not give."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, (48, 96), generator=generator).to(torch.int8)
    values[:, ::3] = -128
    scale = torch.rand(48, 3, generator=generator).bfloat16().half()
    x = torch.randint(-127, 128, (5, 96), generator=generator).float()
    x[:, ::32] = 127  # so that rounding to 8 bits changes nothing
    exact = x.double() @ dequantize(values, scale, torch.float64).T
    for activations in ("8", "16"):
        layer = QuantizedLinear(values, scale, None, activations).eval()
        with torch.no_grad():
            for rows in (1, 5):
                torch.testing.assert_close(layer(x[:rows]).double(), exact[:rows], rtol=1e-5, atol=1e-2)
