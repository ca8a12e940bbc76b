"""The packed format beside compressed-tensors' own packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_dsv3.compression.packed.format import pack, packed_config, unpack


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), groups=st.integers(1, 5), seed=st.integers(0, 999))
def test_packing_is_that_of_compressed_tensors(bits, rows, groups, seed):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    whole = torch.randint(-half, half, (rows, 32 * groups), generator=generator).to(torch.int8)
    packed = pack(whole, bits)
    assert torch.equal(packed, helpers.pack_to_int32(whole, bits))
    assert torch.equal(unpack(packed, bits), whole)


def test_several_matrices_are_packed_as_each():
    whole = torch.randint(-4, 4, (2, 3, 5, 64)).to(torch.int8)
    packed = pack(whole, 3)
    assert packed.shape == (2, 3, 5, 6)
    assert torch.equal(packed[1, 2], pack(whole[1, 2], 3)) and torch.equal(unpack(packed, 3), whole)


def test_config_is_one_that_compressed_tensors_reads():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = packed_config({8: ["lm_head"], 4: [r"re:.*\.experts\..*"]}, ignore=["re:.*kv_b_proj"])
    read = quantization.QuantizationConfig.model_validate(config)
    assert [group.weights.num_bits for group in read.config_groups.values()] == [4, 8]
    assert all(group.weights.group_size == 32 and group.weights.symmetric for group in read.config_groups.values())
