"""The commands of examples/parallel.md: one run of pretrain.py on two processes is the run of one process."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel


pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Evaluation batches of 1: see the page's limits
SMALL = "--block_size 32 --shuffle_window 16 --logging_steps 1 --eval_strategy no --warmup_steps 1 --max_steps 5 "
SMALL += "--per_device_eval_batch_size 1 --disable_tqdm true"
PROGRAMS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}


def documented_commands():
    page = (ROOT / "examples" / "parallel.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w ]+) \|.*\| `((?:python|torchrun|accelerate) .*)` \|$", page, flags=re.MULTILINE)
    return dict(rows)


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    model = make_model(vocab_size=320)
    (folder / "config.json").write_text(model.config.to_json_string())
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu") for b in ("r", "st", "ng", "x")]
    (folder / "notes").mkdir()
    for i in range(60):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(300, 1200)))
        (folder / "notes" / f"{i}.txt").write_text(text + "\n")

    def run_command(name, command):
        program, *arguments = shlex.split(command)
        if program == "torchrun":
            arguments = ["--standalone", *arguments]
        output = folder / name.replace(" ", "_")
        options = ["--config", folder / "config.json", "--text", folder / "notes", "--output_dir", output]
        result = subprocess.run(
            [sys.executable, *PROGRAMS[program], *arguments, *map(str, options), *SMALL.split()],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"},
        )
        assert result.returncode == 0, result.stderr[-3000:]
        losses = re.findall(r"'loss': '([\d.]+)'", result.stdout)
        evaluation = json.loads((output / "eval_results.json").read_text())["eval_loss"]
        return losses, evaluation, load_file(output / "model.safetensors")

    return run_command


def test_commands_of_the_page(run):
    commands = documented_commands()
    assert list(commands) == ["one process", "DDP", "FSDP2", "tensor parallel", "expert parallel"]
    losses, evaluation, weights = run("one process", commands.pop("one process"))
    assert len(losses) == 5
    for name, command in commands.items():
        if name != "DDP" and not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
            continue  # see the page's limits
        seen_losses, seen_evaluation, seen_weights = run(name, command)
        assert seen_losses == losses, name
        assert seen_evaluation == pytest.approx(evaluation, abs=1e-5), name
        assert seen_weights.keys() == weights.keys()
        for key, tensor in weights.items():
            if key.endswith("e_score_correction_bias"):
                assert torch.equal(seen_weights[key], tensor), (name, key)
            else:
                torch.testing.assert_close(seen_weights[key], tensor, rtol=1e-4, atol=1e-4, msg=f"{name}: {key}")
