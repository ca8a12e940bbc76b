"""Codes and scales that no reader takes for such: refused before a weight is read, with their names, or read right.

The checkpoints are written here tensor by tensor, so that nothing of the package has a part in them.
"""

import json
import re

import pytest
import torch
from fp8_files import FP8, per_expert, quantize, read_all, rewrite, tiny_config, write_fp8_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import transformers_dsv3
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError, StoredTensor


NOT_QUANTISED = ("embed_tokens", "head", "norm", "mlp.gate.", "eh_proj")
O_PROJ = "model.layers.0.self_attn.o_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    transformers_dsv3.Dsv3ForCausalLM(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change, **config):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **config}))


@pytest.fixture
def refused(monkeypatch):
    """Loads, expecting an error with all of `parts`, before anything was read but headers."""

    def check(folder, *parts, cls=AutoModelForCausalLM, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(StoredTensor, "read_into", lambda self, out: pytest.fail(f"{self.name} was read"))
            with pytest.raises(CheckpointError, match="nothing was loaded") as caught:
                cls.from_pretrained(folder, **kwargs)
        for part in parts:
            assert re.search(part, str(caught.value)), f"{part} is not in {caught.value}"

    return check


def to_int8(scale_name, per_channel, only=""):
    def change(tensors):
        for name in [name for name in tensors if only in name and not any(part in name for part in NOT_QUANTISED)]:
            weight = tensors[name]
            peak = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().max().view(1, 1)
            tensors[name] = (weight / (peak / 127)).round().to(torch.int8)
            tensors[name.removesuffix("weight") + scale_name] = peak / 127

    return change


BLOCKS = {"quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8_BLOCKS = {**BLOCKS, "quant_method": "fp8"}


@pytest.mark.parametrize("quantization", [None, BLOCKS, {"quant_method": "w8a8_int8"}, FP8_BLOCKS])
@pytest.mark.parametrize(("scale_name", "per_channel"), [("weight_scale_inv", False), ("weight_scale", True)])
@pytest.mark.parametrize("only", ["", ".experts.", "o_proj"])
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
def test_int8_repacks(plain, refused, quantization, scale_name, per_channel, only, cls):
    edit(plain, to_int8(scale_name, per_channel, only), quantization_config=quantization)
    where = O_PROJ if only == "o_proj" else r"model\.layers\.1\.mlp\.experts\.0\.\w+_proj"
    refused(plain, r"model\.safetensors: I8 codes where", rf"'{where}\.weight'" if only else "'model", cls=cls)
    if scale_name == "weight_scale" or quantization is not FP8_BLOCKS:
        refused(
            plain, rf"which nothing here reads: '{where}\.{scale_name}'" if only else "nothing here reads", cls=cls
        )


def test_integers_without_any_scale(plain, refused):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(72, dtype=torch.int32)

    edit(plain, change)
    refused(plain, r"model.safetensors: I32 codes .*: 'model.norm.weight'")


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"{O_PROJ}.{rest}"
            for rest in ("weight_scale", "weight_scale_inv", "input_scale", "scale", "weight_scale_2")
        ),
        *(
            f"{O_PROJ}.{rest}"
            for rest in ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_zero_point")
        ),
        *(f"{O_PROJ}.{rest}" for rest in ("SCB", "weight.absmax", "weight.quant_state.bitsandbytes__nf4")),
        f"{O_PROJ}.weight:scale",
        f"{O_PROJ}_scale",
        f"{EXPERT}.weight_scale",
        f"{EXPERT}.input_scale",
        "model.layers.1.mlp.experts.gate_up_proj_scale",
        "model.layers.1.mlp.experts.w13_weight_scale",
        "model.embed_tokens.weight_scale",
        "lm_head.weight_scale_inv",
        "model.layers.2.eh_proj.weight_scale_inv",
    ],
)
def test_scales_that_nothing_reads(plain, refused, name):
    edit(plain, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    refused(plain, rf"model\.safetensors: scales of quantised weights, .* reads: '{re.escape(name)}'")


@pytest.mark.parametrize(
    "name",
    [
        f"{O_PROJ}.k_scale",  # of a cache
        "model.layers.0.self_attn.v_scale",
        "model.layers.0.self_attn.kv_b_proj.bias",
        "model.layers.7.self_attn.o_proj.weight_scale_inv",  # of a layer that the config leaves out
        "visual.blocks.0.attn.proj.weight_scale",  # of another model
    ],
)
def test_other_tensors_are_listed_as_ever(plain, name):
    edit(plain, lambda tensors: tensors.update({name: torch.ones(2)}))
    _, info = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {name}


@pytest.mark.parametrize("renamed", ["weight_scale", "scales", "qscale_weight", "input_scale"])
@pytest.mark.parametrize("owner", [O_PROJ, EXPERT])
def test_renamed_scales_of_fp8(tmp_path, refused, renamed, owner):
    write_fp8_checkpoint(tmp_path, tiny_config(), (16, 16))
    tensors = read_all(tmp_path)
    scale = tensors.pop(f"{owner}.weight_scale_inv")
    tensors[f"{owner}.{renamed}"] = scale
    rewrite(tmp_path, tensors)
    refused(tmp_path, rf"FP8 tensor '{owner}.weight' has no scale", rf"reads: '{owner}.{renamed}'")


def test_renamed_scales_are_read_where_the_user_names_them(tmp_path):
    expected = write_fp8_checkpoint(tmp_path, tiny_config(), (16, 16))
    rewrite(tmp_path, {name.replace("weight_scale_inv", "w_scale"): t for name, t in read_all(tmp_path).items()})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, key_mapping={r"\.w_scale$": ".weight_scale_inv"}
    )
    for name, tensor in per_expert(model).items():
        assert torch.equal(tensor, expected[name].float()), name


def test_an_activation_scale_beside_fp8_is_not_left_out(tmp_path, refused):
    write_fp8_checkpoint(tmp_path, tiny_config(), (16, 16))
    rewrite(tmp_path, read_all(tmp_path) | {f"{O_PROJ}.input_scale": torch.ones(1)})
    refused(tmp_path, rf"reads: '{O_PROJ}.input_scale'")


class TestNativeFp8:
    """`FineGrainedFP8Config()` over DeepSeek's files, whose config does not say which layers are not quantised."""

    @pytest.fixture
    def folder(self, tmp_path):
        # Of whole blocks: native knows no partial ones
        config = tiny_config(hidden_size=64, intermediate_size=128, moe_intermediate_size=32)
        self.expected = write_fp8_checkpoint(tmp_path, config, (8, 8))
        return tmp_path

    @pytest.fixture
    def on_gpu(self, monkeypatch):
        """As on a GPU, where native does not dequantise; nothing is run."""
        monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)

    def test_dequantised_where_there_is_no_gpu(self, folder):
        if torch.cuda.is_available():
            pytest.skip("native keeps FP8 here")
        # Asked for fp32, native leaves in bf16 what is not quantised
        arguments = {"dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(), **arguments)
        for name, tensor in per_expert(model).items():
            assert torch.equal(tensor, self.expected[name].float().to(tensor.dtype)), name
        ids = torch.arange(12)[None]
        plain = AutoModelForCausalLM.from_pretrained(folder, **arguments)
        assert torch.equal(model(ids).logits, plain(ids).logits)

    @pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
    def test_kept_with_the_scales_on_disk(self, folder, on_gpu, cls):
        model = cls.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config())
        stored, decoder = read_all(folder), model.base_model
        kinds = {}
        for name, module in decoder.named_modules():
            official = f"model.{name}".replace("mtp.0", "layers.2")
            if isinstance(module, FP8Experts):
                for part, names in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
                    for suffix in ("", "_scale_inv"):
                        want = [[stored[f"{official}.{e}.{leaf}.weight{suffix}"] for leaf in names] for e in range(4)]
                        want = torch.stack([torch.cat([one.float() for one in row]) for row in want])
                        assert torch.equal(getattr(module, part + suffix).float(), want), f"{name}.{part}{suffix}"
            elif isinstance(module, FP8Linear):
                assert module.weight.dtype == FP8
                for leaf in ("weight", "weight_scale_inv"):
                    assert torch.equal(getattr(module, leaf).float(), stored[f"{official}.{leaf}"].float()), name
            elif isinstance(module, torch.nn.Linear):
                assert torch.equal(module.weight, stored[f"{official}.weight"]), name
            else:
                continue
            kinds.setdefault(type(module).__name__, set()).add(name.rpartition(".")[2])
        assert kinds["Linear"] == {"eh_proj"} and kinds["FP8Experts"] == {"experts"}
        assert {"o_proj", "kv_b_proj", "q_a_proj", "gate_proj"} <= kinds["FP8Linear"]
        # Its weight cannot be folded into queries
        assert "FP8Linear" in decoder.layers[0].self_attn.absorbed_refusal()

    def test_layers_on_disk_that_are_not_quantised_stay_so(self, tmp_path, on_gpu):
        config = tiny_config(hidden_size=64, intermediate_size=128, moe_intermediate_size=32)
        write_fp8_checkpoint(tmp_path, config, (8, 8), keep=("layers.0.", "q_a_proj"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FineGrainedFP8Config())
        assert type(model.model.layers[0].mlp.up_proj) is type(model.model.layers[1].self_attn.q_a_proj)
        assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert type(model.model.layers[1].self_attn.o_proj) is FP8Linear

    @pytest.mark.parametrize("experts", [False, True])
    def test_a_missing_or_renamed_scale(self, folder, on_gpu, refused, experts):
        owner = EXPERT if experts else O_PROJ
        tensors = read_all(folder)
        scale = tensors.pop(f"{owner}.weight_scale_inv")
        rewrite(folder, tensors)
        refused(folder, rf"F8_E4M3 codes .*'{owner}.weight'", quantization_config=FineGrainedFP8Config())
        rewrite(folder, tensors | {f"{owner}.weight_scale": scale})
        refused(folder, rf"reads: '{owner}.weight_scale'", quantization_config=FineGrainedFP8Config())

    def test_exceptions_that_are_quantised_on_disk(self, folder, on_gpu, refused):
        config = FineGrainedFP8Config(modules_to_not_convert=["o_proj"])
        refused(
            folder, rf"F8_E4M3 codes .*'{O_PROJ}.weight'", rf"'{O_PROJ}.weight_scale_inv'", quantization_config=config
        )

    def test_static_scales_of_the_whole_tensor(self, folder, refused):
        """Native takes them for `weight_scale_inv`; vLLM's exports call them otherwise."""
        tensors = {name: t for name, t in read_all(folder).items() if not name.endswith("_scale_inv")}
        for name in [name for name, tensor in tensors.items() if tensor.dtype == FP8]:
            tensors[name.removesuffix("weight") + "weight_scale"] = torch.ones(())
        rewrite(folder, tensors)
        fields = json.loads((folder / "config.json").read_text())
        fields["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
        (folder / "config.json").write_text(json.dumps(fields))
        refused(folder, r"F8_E4M3 codes", r"'model.layers.0.mlp.down_proj.weight_scale'")


def test_quantising_what_is_quantised_already(plain, refused):
    pytest.importorskip("bitsandbytes")
    edit(plain, to_int8("weight_scale", True, "o_proj"))
    refused(
        plain, "I8 codes where", rf"'{O_PROJ}.weight_scale'", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )


def compressed_tensors_config(kind):
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*eh_proj"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


@pytest.mark.parametrize("is_experts_too", [False, True])
def test_compressed_tensors_fp8(plain, is_experts_too):
    """Read by the format's own library; a float64 product of what is on disk."""
    pytest.importorskip("compressed_tensors")
    expected = {}

    def change(tensors):
        expected.update({name: tensor.double() for name, tensor in tensors.items()})
        for name in [name for name in tensors if not any(part in name for part in NOT_QUANTISED)]:
            if is_experts_too or ".experts." not in name:
                scale = tensors[name].abs().amax(1, keepdim=True) / 448
                tensors[name], tensors[f"{name}_scale"] = (tensors[name] / scale).to(FP8), scale
                expected[name] = tensors[name].double() * scale.double()

    edit(plain, change, quantization_config=compressed_tensors_config("float"))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model(torch.arange(8)[None])  # which decompresses
    for name, tensor in per_expert(model).items():
        if "_scale" not in name:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_quantise_is_what_native_reads():
    """The writer of these tests against native's own dequantisation of one matrix."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(16, 24)
    codes, scale = quantize(weight, (8, 8))
    native = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)
    torch.testing.assert_close(native, weight, rtol=0.07, atol=1e-3)
