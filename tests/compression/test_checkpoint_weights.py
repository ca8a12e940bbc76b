"""A checkpoint's weights read whole and by rows, whatever they are stored as."""

import pytest
import torch
from packed_files import WEIGHTS, compress, config_of
from safetensors.torch import save_file

from transformers_dsv3.compression import checkpoint_weights
from transformers_dsv3.compression.checkpoint_weights import CheckpointWeights
from transformers_dsv3.models.dsv3.checkpoint_files_dsv3 import CheckpointError, read_header


NAME, SHAPE = "layer.weight", (150, 96)
FP8 = {"quant_method": "fp8", "weight_block_size": [64, 32]}
KINDS = {
    "group": WEIGHTS,
    "wider": {**WEIGHTS, "group_size": 96},
    "channel": {**WEIGHTS, "num_bits": 8, "strategy": "channel", "group_size": None},
}


def stored(folder, kind):
    """A weight as one of several formats: what reads it, and what it stands for by the format's own library."""
    torch.manual_seed(0)
    weight, path = torch.randn(SHAPE), folder / "model.safetensors"
    if kind == "plain":
        tensors, exact, fields = {NAME: weight}, weight, None
    elif kind == "fp8":
        values, scale = weight.to(torch.float8_e4m3fn), torch.rand(3, 3) + 0.5
        tensors, fields = {NAME: values, f"{NAME}_scale_inv": scale}, FP8
        exact = values.float() * scale.repeat_interleave(64, 0)[:150].repeat_interleave(32, 1)
    else:
        state, exact = compress(weight, KINDS[kind])
        tensors, fields = {f"layer.{part}": tensor for part, tensor in state.items()}, config_of(KINDS[kind])
    save_file(tensors, path)
    return CheckpointWeights(read_header(str(path)), fields), exact


@pytest.mark.parametrize("kind", ["plain", "fp8", *KINDS])
def test_rows_are_those_of_the_whole(tmp_path, monkeypatch, kind):
    weights, exact = stored(tmp_path, kind)
    assert weights.problem(NAME, SHAPE) is None and weights.shape(NAME) == SHAPE
    whole = weights.read(NAME, dtype=torch.float32)
    assert torch.equal(whole, exact)
    assert weights.read(NAME).dtype == (torch.float32 if kind == "plain" else torch.bfloat16)
    monkeypatch.setattr(checkpoint_weights, "_CHUNK", 40 * SHAPE[1])
    chunks = list(weights.chunks(NAME))
    assert len(chunks) > 2
    assert torch.equal(torch.cat([weights.read(NAME, rows, torch.float32) for rows in chunks]), whole)
    if kind in KINDS:
        values, scale = weights.codes(NAME)
        assert scale.shape == (150, 3) and weights.bits(NAME) == KINDS[kind]["num_bits"]
        by_rows = [weights.codes(NAME, rows) for rows in chunks]
        assert torch.equal(torch.cat([part for part, _ in by_rows]), values)
        assert torch.equal(torch.cat([part for _, part in by_rows]), scale)


def test_problems(tmp_path):
    weights, _ = stored(tmp_path, "group")
    assert "which is no packing of (150, 64)" in weights.problem(NAME, (150, 64))
    assert "is missing" in weights.problem("other.weight", SHAPE)
    state, _ = compress(torch.randn(SHAPE), {**WEIGHTS, "symmetric": False})
    save_file({f"layer.{part}": tensor for part, tensor in state.items()}, tmp_path / "model.safetensors")
    tensors = read_header(str(tmp_path / "model.safetensors"))
    fields = config_of({**WEIGHTS, "symmetric": False})
    assert "asymmetric" in CheckpointWeights(tensors, fields).problem(NAME, SHAPE)
    del tensors["layer.weight_scale"]
    with pytest.raises(CheckpointError, match="is quantised and has no 'layer.weight_scale'"):
        CheckpointWeights(tensors, fields)
