"""Weights of 8 and 4 bits: their values beside GGUF's, their layers and models beside the plain ones of the same
values.
"""

import copy
import gc
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import transformers_dsv3
from transformers_dsv3 import quantize, quantize_int8
from transformers_dsv3.compression.quantized_weights import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    quantize_groups,
)
from transformers_dsv3.kernels import selection
from transformers_dsv3.kernels.cpu import library
from transformers_dsv3.kernels.cpu.step import Program
from transformers_dsv3.kernels.quantized_groups import dequantize


QUANTIZED = (QuantizedLinear, QuantizedEmbedding, QuantizedExperts)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32}
WIDE |= {"num_attention_heads": 4, "v_head_dim": 8, "vocab_size": 150}


@pytest.fixture
def make_wide(make_model):
    """Function from changed fields to a small model all of whose widths are multiples of 32."""
    return lambda **fields: make_model(**{**WIDE, **fields})


def in_gguf(values, scale):
    """The bytes of GGUF's blocks: a scale in fp16, then a group."""
    size = 32 if values.dtype == torch.int8 else 16
    groups = values.unflatten(-1, (-1, size)).contiguous().view(torch.uint8)
    return torch.cat([scale[..., None].view(torch.uint8), groups], -1).flatten(-2).numpy()


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([8, 4]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    exponent=st.integers(-20, 12),
    seed=st.integers(0, 999),
)
def test_values_are_those_of_gguf(bits, shape, exponent, seed):
    gguf = pytest.importorskip("gguf")
    kind = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}[bits]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape[0], 32 * shape[1], generator=generator) * 2.0**exponent
    values, scale = quantize_groups(weight, bits)
    ours = dequantize(values, scale, torch.float32)
    assert np.array_equal(gguf.dequantize(in_gguf(values, scale), kind), ours.numpy())
    # Where their scale is ours, so is all else; the largest of each group makes the scale
    largest = -8 if bits == 4 else 127
    exact = ours.unflatten(-1, (-1, 32)).clone()
    exact[..., 5] = largest * scale.float()
    exact = exact.flatten(-2)
    assert np.array_equal(gguf.quantize(exact.numpy(), kind), in_gguf(*quantize_groups(exact, bits)))


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([8, 4]),
    columns=st.integers(1, 5),
    exponent=st.integers(-30, 16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 999),
)
@example(bits=8, columns=1, exponent=-19, dtype=torch.float32, seed=1)
def test_weights_are_rounded_to_the_nearest_of_their_scale(bits, columns, exponent, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(3, 32 * columns, generator=generator) * 2.0**exponent).to(dtype)
    weight[1, :32] = 0
    values, scale = quantize_groups(weight, bits)
    assert values.shape == (3, 32 * columns * bits // 8) and scale.shape == (3, columns)
    assert scale.dtype == torch.float16 and torch.equal(scale.bfloat16().half(), scale)
    error = (dequantize(values, scale, torch.float64) - weight.double()).abs().unflatten(-1, (-1, 32))
    # Half a step, but at the end of the range: there the scale was rounded, or the sign has one value less
    step = scale.double().abs()[..., None]
    # To bf16 by a share of the exact one, and below fp16's normal numbers by half of the smallest, even to 0
    largest = {8: 127, 4: 8}[bits]
    exact_scale = weight.double().abs().unflatten(-1, (-1, 32)).amax(dim=-1, keepdim=True) / largest
    rounded_scale = largest * (2.0**-8 * exact_scale + 2.0**-25)
    inside = weight.double().abs().unflatten(-1, (-1, 32)) <= {8: 127, 4: 7}[bits] * step
    assert bool((error <= torch.where(inside, 0.5001 * step, step + rounded_scale)).all())
    assert not dequantize(values, scale, torch.float32)[1, :32].any()


def test_weights_that_no_scale_holds():
    for bad in (float("nan"), float("inf"), 1e9):
        weight = torch.ones(2, 64)
        weight[1, 40] = bad
        for bits in (8, 4):
            with pytest.raises(ValueError, match=re.escape(f"the largest weight is {bad:g}")):
                quantize_groups(weight, bits)


def plain_twin(exact, quantized):
    """`exact` with the values that a quantised model's weights stand for."""
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, QUANTIZED):
                for weight in ("weight", "gate_up_proj", "down_proj"):
                    if hasattr(module, weight):
                        values, scale = getattr(module, weight), getattr(module, f"{weight}_scale")
                        getattr(exact.get_submodule(name), weight).copy_(dequantize(values, scale, torch.float32))
    return exact


@pytest.mark.parametrize("bits, head_bits", [(8, 8), (4, 8), (4, 4), (4, None)])
@pytest.mark.parametrize("tied", [False, True])
def test_model_is_that_of_the_rounded_weights(make_wide, bits, head_bits, tied):
    """In fp32: what is left is the rounding of activations."""
    model = make_wide(num_nextn_predict_layers=1, tie_word_embeddings=tied)
    exact = copy.deepcopy(model)
    assert quantize(model, bits, head_bits) is model
    changed = {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}
    plain = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    assert {name.rpartition(".")[2] for name in plain} == {"kv_b_proj"} | (
        {"embed_tokens", "lm_head"} if head_bits is None else set()
    )
    assert any(name.startswith("model.mtp") for name in changed)
    for name, module in changed.items():
        assert module.bits == (head_bits if name in ("lm_head", "model.embed_tokens") else bits)
        assert not any(p.requires_grad for p in module.parameters())
    assert model.dtype == torch.float32
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    plain_twin(exact, model)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        native = exact(ids).logits
        for backend, tolerance in (("torch", 1e-5), ("auto", 1e-5)):
            with selection.use(linear=backend, attention=backend):
                model.set_experts_implementation("eager" if backend == "torch" else "auto")
                cache = model(ids, use_cache=True).past_key_values
                assert torch.isfinite(model(ids[:, :1], past_key_values=cache).logits).all()
                error = (model(ids).logits - native).norm() / native.norm()
                assert error <= tolerance


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_activations(make_wide, bits):
    model = make_wide()
    exact = copy.deepcopy(model)
    quantize(model, bits, activations="8")
    plain_twin(exact, model)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        native = exact(ids).logits
        error = (model(ids).logits - native).norm() / native.norm()
    # Steps of 1 / 127 of a group's largest, 0.3 % of a typical one each time
    assert error < 3e-2 and (error > 1e-4 or library.unavailable)


@pytest.mark.parametrize("activations, dtype, rounds", [
    (None, torch.float32, False), (None, torch.bfloat16, True), ("8", torch.float32, True), ("16", torch.bfloat16,
    False),
])  # fmt: skip
def test_which_activations_are_rounded(make_wide, activations, dtype, rounds):
    model = quantize(make_wide().to(dtype), 4, activations=activations)
    line = transformers_dsv3.explain(model).splitlines()[1]
    assert "4 bits in" in line and "8 bits in 1 QuantizedEmbedding, 1 QuantizedLinear" in line
    assert ("rounded to 8 bits" if rounds else "are whole") in line
    for module in model.modules():
        if isinstance(module, (QuantizedLinear, QuantizedExperts)):
            assert (dtype in module.rounded_dtypes) == rounds


@pytest.mark.parametrize("bits", [8, 4])
def test_bf16_models_stay_close(make_wide, bits):
    model = make_wide(num_nextn_predict_layers=1)
    exact = copy.deepcopy(model)
    quantize(model.to(torch.bfloat16), bits)
    plain_twin(exact, model)
    assert model.dtype == torch.bfloat16
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.dtype == torch.bfloat16
        native = exact(ids).logits
    # Of most tokens: some choose other experts
    assert ((logits - native).norm(dim=-1) / native.norm(dim=-1)).median() < 5e-2


def test_scales_stay_exact_through_dtype_changes(make_wide):
    model = quantize(make_wide(), 4)
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("_scale")}
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.dtype == dtype
        assert model.get_input_embeddings()(torch.tensor([1])).dtype == dtype
        after = dict(model.named_buffers())
        assert before and all(torch.equal(after[name], scale) for name, scale in before.items())
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(2, 9)[None]).logits).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generates(make_wide, bits, dtype):
    model = quantize(make_wide(num_nextn_predict_layers=1).to(dtype), bits)
    ids = torch.arange(2, 9)[None]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    drafted = model.generate(ids, max_new_tokens=8, do_sample=False, use_mtp=True)
    assert plain.shape == drafted.shape == (1, 15)
    if dtype == torch.float32:
        assert torch.equal(plain, drafted)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activations", ["8", "16"])
def test_steps_by_the_program_are_those_of_the_layers(make_wide, monkeypatch, bits, activations):
    model = quantize(make_wide().to(torch.bfloat16), bits, activations=activations)
    ids = torch.arange(2, 40)[None]
    steps = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda *arguments: steps.append(1) or run(*arguments))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        by_program = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        assert steps or library.unavailable
        del steps[:]
        model.model.layers[0].register_forward_hook(lambda *arguments: None)
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, by_program) and not steps


def test_no_weight_is_held_twice(make_wide):
    model = make_wide(num_nextn_predict_layers=1)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    quantize(model, 4)
    gc.collect()
    left = [t for t in gc.get_objects() if type(t) is nn.Parameter and t.untyped_storage().data_ptr() in held]
    wanted = {id(p) for p in model.parameters()}
    assert not [t.shape for t in left if t.is_floating_point() and t.numel() >= 64 and id(t) not in wanted]


def test_widths_that_are_no_multiple_of_32(make_wide, make_model):
    model = make_wide(moe_intermediate_size=40)
    with pytest.warns(UserWarning, match=r"stay as they are: .*model\.layers\.1\.mlp\.experts \(40\)"):
        quantize(model, 8)
    assert not any(isinstance(module, QuantizedExperts) for module in model.modules())
    assert isinstance(model.lm_head, QuantizedLinear)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(2, 9)[None]).logits).all()
    layer = nn.Module()
    layer.proj = nn.Linear(40, 3)
    with pytest.raises(ValueError, match="multiples of 32 wide, proj has an input of 40"):
        quantize(layer)


def test_is_refused_where_it_cannot_work(make_wide):
    model = make_wide()
    for wrong, message in (
        ({"bits": 3}, "bits is 4 or 8, not 3"),
        ({"head_bits": 16}, "head_bits is 4, 8 or None, not 16"),
        ({"activations": "bf16"}, "activations is '8', '16' or None, not 'bf16'"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model, **wrong)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="lm_head cannot be quantised: the largest weight is nan"):
        quantize(model)
    model = quantize(make_wide())
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model)


def test_the_name_before(make_wide):
    with pytest.warns(FutureWarning, match=r"quantize\(model, bits=8\)"):
        model = quantize_int8(make_wide())
    assert model.lm_head.bits == 8 and model.lm_head.rounded_dtypes == ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.float32 in quantize_int8(make_wide(), "int8").lm_head.rounded_dtypes
        with pytest.raises(ValueError, match="activations is 'bf16' or 'int8', not '8'"):
            quantize_int8(make_wide(), "8")
