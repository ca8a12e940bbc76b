"""Rounding without packing, beside quantised models."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3 import quantize
from transformers_dsv3.compression.plan import Settings
from transformers_dsv3.compression.quantized_weights import dequantize, quantize_groups
from transformers_dsv3.compression.rounding import nearest, round_weights


@settings(deadline=None, max_examples=40)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), groups=st.integers(1, 4), seed=st.integers(0, 999))
def test_rounded_weights_are_whole_numbers_of_a_scale(bits, rows, groups, seed):
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed))
    weight[0, :32] = 0
    rounded = nearest(weight, bits)
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    step = largest / 2 ** (bits - 1) * 1.005  # of which bf16 leaves the nearest
    # The positive end lacks one whole number
    assert ((weight - rounded).unflatten(-1, (-1, 32)).abs() <= step * 1.005).all()
    assert all(len(group.unique()) <= 2**bits for row in rounded for group in row.split(32))
    torch.testing.assert_close(nearest(rounded, bits), rounded, rtol=1e-2, atol=1e-6)


def test_four_bits_are_those_of_quantised_layers():
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    values, scale = quantize_groups(weight, 4)
    torch.testing.assert_close(nearest(weight, 4), dequantize(values, scale, torch.float32))


def test_models_are_rounded_as_they_are_quantised(make_model):
    wide = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "q_lora_rank": 32}
    model = make_model(**wide, v_head_dim=16)
    tokens = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    rounded = round_weights(copy.deepcopy(model), Settings(4, head_bits=4))
    quantised = quantize(copy.deepcopy(model), bits=4, head_bits=4, activations="16")
    with torch.no_grad():
        torch.testing.assert_close(rounded(tokens).logits, quantised(tokens).logits, rtol=1e-4, atol=1e-4)
    kept = [name for name, tensor in rounded.state_dict().items() if torch.equal(tensor, model.state_dict()[name])]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in kept} >= {"gate", "kv_b_proj", "norm"}
    fine = round_weights(copy.deepcopy(model), Settings(8, experts_bits=3))
    name = "model.layers.1.mlp.experts.down_proj"
    error = (fine.state_dict()[name] - model.state_dict()[name]).abs().max()
    assert error > 4 * (fine.lm_head.weight - model.lm_head.weight).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_stay(dtype):
    assert nearest(torch.ones(2, 32, dtype=dtype), 3).dtype == dtype
