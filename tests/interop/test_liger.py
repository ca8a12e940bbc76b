"""`use_liger_kernel=True`: Liger-Kernel patches the modules that it patches in native, each with the same forward.

Its kernels need a GPU. On a CPU one step of training is tried all the same: it has to fail inside Liger's kernel, as
native's does, not somewhere in the plugin, and never to pass the patches by.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).with_name("liger_patches.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("liger_kernel") is None, reason="no liger_kernel: pip install liger-kernel"
    ),
]


@pytest.fixture(scope="module")
def reports(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("liger")
    make_model(num_hidden_layers=3, num_nextn_predict_layers=0).save_pretrained(folder / "model")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    found = []
    for name, options in (("native", []), ("plugin", ["--plugin"])):
        command = [sys.executable, SCRIPT, folder / "model", folder / name, *options]
        (folder / name).mkdir()
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr[-6000:]
        found.append(json.loads((folder / name / "report.json").read_text()))
    return found


def test_same_patches(reports):
    native, ours = reports
    assert (native["module"], ours["module"]) == ("transformers", "transformers_dsv3")
    assert ours["patched"] == native["patched"]
    patched = ours["patched"]
    assert patched["model.layers.0.mlp"] == "LigerQwen3MoeSwiGLUMLP.forward"
    assert patched["model.layers.1.mlp.experts"] == "LigerExperts.forward"
    assert patched["model.layers.1.self_attn.kv_a_layernorm"] == "LigerRMSNorm.forward"
    assert "model.layers.1.mlp" not in patched  # the mixture keeps its own


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run here")
def test_patches_are_called(reports):
    native, ours = reports
    assert ours["error"] == native["error"] is not None
