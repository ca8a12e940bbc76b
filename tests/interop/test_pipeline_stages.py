"""`distributed_config={"pp_size": 2}`: two gloo processes give native's logits and tokens, drafts are refused.

Transformers' pipeline parallelism is for inference: with labels it returns no loss, native's as ours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("pipelined_steps.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(checkpoint, folder, *options, stages=True):
    folder.mkdir()
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(TORCHRUN if stages else []), str(SCRIPT), str(checkpoint), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


def test_two_stages_answer_as_natives_and_as_one_process(make_model, tmp_path):
    make_model(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    native = run(tmp_path / "model", tmp_path / "native")
    ours = run(tmp_path / "model", tmp_path / "ours", "--plugin", "--mtp")
    alone = run(tmp_path / "model", tmp_path / "alone", "--plugin", "--mtp", stages=False)["alone"]
    assert native["0"]["module"] == "transformers" and ours["0"]["module"] == "transformers_dsv3"
    for rank in ("0", "1"):
        without_mtp = [name for name in ours[rank]["names"] if ".mtp." not in name]
        assert without_mtp == native[rank]["names"]  # the same layers on each stage
        for report in (native[rank], ours[rank]):
            assert report["tokens"] == alone["tokens"]
            torch.testing.assert_close(torch.tensor(report["logits"]), torch.tensor(alone["logits"]))
        assert "pp_size" in ours[rank]["refusal"]
    assert alone["drafted"] == alone["tokens"][:1]
