"""Weights are read into their places by several threads."""

import contextlib
import os

import pytest
import torch

from transformers_dsv3.models.dsv3 import checkpoint_conversion_dsv3, checkpoint_files_dsv3
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError


@pytest.mark.parametrize("readers", [1, 5])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_read_by_any_number_of_threads(make_model, tmp_path, monkeypatch, readers, mode, dtype):
    model = make_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint_conversion_dsv3, "READERS", readers)
    with mode():
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_a_file_that_ends_while_experts_are_read_is_named(make_model, tmp_path, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path)
    read_into = checkpoint_files_dsv3.StoredTensor.read_into

    def shortened(stored, out):
        if "experts.1.up_proj" in stored.name:
            os.truncate(stored.path, stored.offset + stored.nbytes // 2)
        read_into(stored, out)

    monkeypatch.setattr(checkpoint_files_dsv3.StoredTensor, "read_into", shortened)
    with pytest.raises((CheckpointError, RuntimeError), match="ended while reading|conver"):
        type(model).from_pretrained(tmp_path)
