"""The example of DPO as users run it, killed in the middle included."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from transformers_dsv3.evaluation.training_record import read_training_record


EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path]), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model_folder(make_model, byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "model"
    ends = {"eos_token_id": byte_tokenizer.eos_token_id, "pad_token_id": byte_tokenizer.pad_token_id}
    make_model(vocab_size=len(byte_tokenizer), initializer_range=0.05, bos_token_id=None, **ends).save_pretrained(
        folder
    )
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    def write(name="pairs.jsonl", **changes):
        rows = [{"prompt": f"def f{n}():\n", "chosen": f" return {n}", "rejected": " pass"} for n in range(40)]
        rows[30] |= changes
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    return write


def command(model, output, *options):
    small = "--max_steps 6 --save_steps 2 --per_device_train_batch_size 2 --eval_pairs 8 --disable_tqdm true".split()
    script = [sys.executable, str(EXAMPLES / "dpo.py"), "--model", str(model), "--output_dir", str(output)]
    return [*script, *small, *map(str, options)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240, env=ENVIRONMENT)


@pytest.mark.slow
def test_killed_and_repeated(model_folder, pairs, tmp_path):
    """The same command goes on, to the weights of a run that was not killed, in a checkpoint that `pipeline` opens."""
    whole = run(model_folder, tmp_path / "whole", "--dataset", pairs())
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "32 pairs, none longer than 256 tokens" in whole.stdout
    with (tmp_path / "log").open("w") as log:
        killed = subprocess.Popen(
            command(model_folder, tmp_path / "parts", "--dataset", pairs()), stdout=log, stderr=log, env=ENVIRONMENT
        )
        deadline = time.monotonic() + 200
        while not (tmp_path / "parts" / "checkpoint-2" / "trainer_state.json").exists():
            assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        killed.kill()
        killed.wait()
    assert not (tmp_path / "parts" / "config.json").exists()
    again = run(model_folder, tmp_path / "parts", "--dataset", pairs())
    assert again.returncode == 0, again.stderr[-3000:]
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "parts" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    results = json.loads((tmp_path / "parts" / "dpo_results.json").read_text())
    assert results["before"].keys() == results["after"].keys() >= {"loss", "all"}
    records = [read_training_record(tmp_path / run / "training_record.json") for run in ("whole", "parts")]
    assert records[0]["data"] == records[1]["data"] and records[0]["tokens"] == records[1]["tokens"] > 0
    assert records[1]["results"][0]["after"] == results["after"]["all"]
    assert not (tmp_path / "parts" / "README.md").exists()  # TRL's template
    pipeline("text-generation", model=str(tmp_path / "parts"))("def f(", max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rejected": " return 30"}, "pair 23: 'chosen' and 'rejected' are equal"),
        ({"chosen": ""}, "pair 23: 'chosen' is empty"),
    ],
)
def test_bad_pairs_are_refused_before_training(model_folder, pairs, tmp_path, changes, message):
    refused = run(model_folder, tmp_path / "run", "--dataset", pairs(**changes))
    assert refused.returncode == 1 and f"dpo.py: {message}" in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_functions_of_the_library(model_folder, tmp_path):
    done = run(
        model_folder, tmp_path / "run", "--kinds", "repeated_line", "wrong_name", "other_body", "--max_length", 700
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "dpo_results.json").read_text())
    assert {"repeated_line", "wrong_name", "other_body", "shorter_is_chosen"} <= results["after"].keys()
    refused = run(model_folder, tmp_path / "run", "--seed", 1)
    assert refused.returncode == 1 and "was started with other settings" in refused.stderr
