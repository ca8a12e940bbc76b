"""Muon with QK-clip on two processes: the losses, logits and weights of one, however the model is shared."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests import programs
from tests.training.muon_steps import WAYS, run


SCRIPT = Path(__file__).with_name("muon_steps.py")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"),
    reason="this version's Trainer wraps models that FSDP2 sharded when they were loaded",
)
def test_two_processes_train_as_one(make_model, tmp_path, measured):
    make_model(num_hidden_layers=4, mtp_loss_weight=0.3, initializer_range=0.3).save_pretrained(tmp_path / "model")
    expected = run(tmp_path, tmp_path / "alone", "alone")
    weights, start = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "model"))
    assert max((weights[name] - tensor).abs().max() for name, tensor in start.items()) > 0.02
    assert sum(expected["attention/clipped_heads"]) > 0
    done = programs.run_ranks(2, [SCRIPT, tmp_path, *WAYS])
    assert done.returncode == 0, done.stderr[-6000:]
    for way in WAYS:
        report = json.loads((tmp_path / way / "report.json").read_text())
        for name, values in expected.items():
            assert report[name] == pytest.approx(values, rel=1e-4), (way, name)
        saved = load_file(tmp_path / way / "model.safetensors")
        assert saved.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(
                saved[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=f"{way}, {name}": f"{n}: {m}"
            )
        largest = max((saved[name] - tensor).abs().max().item() for name, tensor in weights.items())
        measured[f"Muon, {way} on two processes beside one, largest difference of a weight after 4 steps"] = largest
