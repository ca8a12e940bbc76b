"""DeepSeek's FP8 format: block dequantisation against a plain loop, and whole checkpoints in the official layout."""

import json
import subprocess
import sys

import pytest
import torch
from fp8_files import (
    FP8,
    NOT_QUANTIZED,
    per_expert,
    read_all,
    reference_dequantize,
    rewrite,
    tiny_config,
    write_fp8_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import check_saved_again
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FineGrainedFP8Config,
)

import transformers_dsv3
from transformers_dsv3.compression.quantizer_fp8 import dequantize_blocks
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 40),
    block_size=st.tuples(st.integers(1, 140), st.integers(1, 50)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_blocks_match_the_definition(rows, columns, block_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(FP8)
    scale = torch.rand(-(-rows // block_size[0]), -(-columns // block_size[1]), generator=generator) + 1e-3
    out = torch.full((rows, columns), float("nan"), dtype=dtype)
    dequantize_blocks(weight, scale, block_size, out)
    # an FP8 value times a float32 is exact in float64; one rounding to float32, one to the dtype
    assert torch.equal(out, reference_dequantize(weight, scale, block_size).float().to(dtype))


@pytest.mark.parametrize("shape", [(576, 7), (1, 1), (129, 130), (128, 128), (127, 257), (1100, 3)])
def test_published_block_size_with_partial_blocks(shape):
    weight = torch.randn(shape).to(FP8)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    out = dequantize_blocks(weight, scale, (128, 128), torch.full(shape, float("nan")))
    assert torch.equal(out, reference_dequantize(weight, scale, (128, 128)).float())


def test_wrong_scale_grid_is_refused():
    with pytest.raises(ValueError, match=r"\(576, 128\).*needs scales \(5, 1\), got \(4, 1\)"):
        dequantize_blocks(torch.zeros(576, 128), torch.ones(4, 1), (128, 128), torch.empty(576, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block_size", "keep", "mtp"),
    [((128, 128), (), 1), ((16, 16), (), 2), ((16, 32), ("layers.0.", "experts.1.", "o_proj"), 0)],
    ids=["one block", "partial blocks", "mixed with bf16"],
)
def test_whole_checkpoint(tmp_path, dtype, block_size, keep, mtp):
    expected = write_fp8_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=mtp), block_size, keep)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(model, transformers_dsv3.Dsv3ForCausalLM)
    assert getattr(model.config, "quantization_config", None) is None
    assert not getattr(model, "is_quantized", False)
    tensors = per_expert(model)
    assert len(model.model.layers) == 2 and len(model.model.mtp_layers) == mtp
    for name, tensor in tensors.items():
        wanted = torch.float32 if "e_score" in name else dtype
        assert tensor.dtype == wanted, name
        assert torch.equal(tensor, expected[name].float().to(wanted)), name
    assert set(expected) - set(tensors) == {
        f"model.layers.{2 + k}.{copy}.weight" for k in range(mtp) for copy in ("embed_tokens", "shared_head.head")
    }


def test_dtype_comes_from_the_config(tmp_path):
    write_fp8_checkpoint(tmp_path, tiny_config())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_model_saves_as_a_plain_checkpoint(tmp_path, dtype):
    expected = write_fp8_checkpoint(tmp_path / "fp8", tiny_config(), (16, 16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=dtype)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    saved = read_all(tmp_path / "plain")
    assert set(saved) == set(expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    check_saved_again(tmp_path / "plain", again)
    native = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "plain", config=DeepseekV3Config.from_pretrained(tmp_path / "plain")
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for name, tensor in native.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, native(ids).logits, rtol=2e-2, atol=2e-2)


def test_a_given_config_is_not_changed(tmp_path):
    write_fp8_checkpoint(tmp_path, tiny_config())
    config = AutoConfig.from_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, config=config).dtype == torch.bfloat16
    assert config.quantization_config["quant_method"] == "fp8"


def test_trains_after_loading(tmp_path):
    write_fp8_checkpoint(tmp_path, tiny_config())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    ids = torch.arange(12)[None]
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None


def test_offloaded_to_disk(tmp_path):
    expected = write_fp8_checkpoint(tmp_path / "fp8", tiny_config(num_nextn_predict_layers=0), (16, 16))
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8",
        dtype=torch.float32,
        device_map={**device_map, "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    assert torch.equal(
        plain.model.layers[1].mlp.experts.down_proj[3],
        expected["model.layers.1.mlp.experts.3.down_proj.weight"].float(),
    )
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_native_path_on_request(tmp_path, monkeypatch):
    """An explicit `quantization_config` of native's class goes to native's reader, not to ours."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    write_fp8_checkpoint(tmp_path, tiny_config(), (128, 128))

    class Reached(Exception):
        pass

    def reached(self, *args, **kwargs):
        raise Reached

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", reached)
    with pytest.raises(Reached):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=False))
    AutoModelForCausalLM.from_pretrained(tmp_path)


SCALE = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop(SCALE),
            r"model-0000\d-of-00003.safetensors: FP8 tensor '\S+experts.2.up_proj.weight' has no scale",
        ),
        (
            lambda t: t.update({SCALE: torch.ones(2, 5)}),
            r"safetensors: scale '\S+2.up_proj.weight_scale_inv' has shape \(2, 5\);.*\(40, 72\).*needs \(3, 5\)",
        ),
        (
            lambda t: t.update({SCALE.removesuffix("_scale_inv"): torch.zeros(40, 72)}),
            r"safetensors: '\S+weight_scale_inv' scales a tensor that is F32, not F8_E4M3",
        ),
        (
            lambda t: t.update({SCALE.removesuffix("_scale_inv"): torch.zeros(48, 72, dtype=FP8)}),
            r"'model.layers.1.mlp.experts.2.up_proj.weight' has shape \(48, 72\), the config asks for \(40, 72\)",
        ),
        (
            lambda t: t.pop("model.layers.2.self_attn.kv_b_proj.weight"),
            r"missing tensors 'model.layers.2.self_attn.kv_b_proj.weight'",
        ),
    ],
    ids=["no scale", "scale grid", "scale of a plain tensor", "weight shape", "missing MTP tensor"],
)
def test_errors_name_file_and_tensor(tmp_path, damage, message):
    write_fp8_checkpoint(tmp_path, tiny_config(), (16, 16))
    tensors = read_all(tmp_path)
    damage(tensors)
    rewrite(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_fp8_without_a_quantization_config_is_refused(tmp_path):
    write_fp8_checkpoint(tmp_path, tiny_config())
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_a_proj.weight' is F8_E4M3, but"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


MEASURE = """
import sys, threading, time
import torch, transformers_dsv3
from transformers import AutoModelForCausalLM

def mib(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field + ":"))

transformers_dsv3.Dsv3ForCausalLM, torch.randn(64, 64) @ torch.randn(64, 64)
before, anonymous, done = mib("VmRSS"), [mib("RssAnon")], threading.Event()
base = anonymous[0]
def watch():
    while not done.wait(0.002):
        anonymous.append(mib("RssAnon"))
thread = threading.Thread(target=watch); thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
done.set(); thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(size, (max(anonymous) - base) / size, (mib("VmHWM") - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("is_fp8", [False, True], ids=["bf16", "fp8"])
def test_peak_memory_of_loading(tmp_path, is_fp8, measured):
    """At most 1.2 times the model, by anonymous memory and by the kernel's own peak (which counts mapped files)."""
    config = tiny_config(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        moe_intermediate_size=512,
        num_hidden_layers=5,
        n_routed_experts=32,
        kv_lora_rank=512,
        q_lora_rank=768,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers_dsv3.Dsv3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    del model
    if is_fp8:
        for path in sorted(tmp_path.glob("*.safetensors")):
            tensors = load_file(path)
            for name in [n for n, t in tensors.items() if t.ndim == 2 and not any(p in n for p in NOT_QUANTIZED)]:
                rows, columns = tensors[name].shape
                tensors[name] = tensors[name].to(FP8)
                tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 128), -(-columns // 128))
            save_file(tensors, path, metadata={"format": "pt"})
        weight_map = {name: p.name for p in tmp_path.glob("*.safetensors") for name in load_file(p)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        fields = json.loads((tmp_path / "config.json").read_text())
        fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (tmp_path / "config.json").write_text(json.dumps(fields))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    size, anonymous, resident = map(float, result.stdout.split()[-3:])
    files = "FP8" if is_fp8 else "bf16"
    measured[f"peak memory of loading {files} files, over the model's size, anonymous"] = anonymous
    measured[f"peak memory of loading {files} files, over the model's size, resident"] = resident
    assert size > 300
    assert anonymous <= 1.2 and resident <= 1.2
