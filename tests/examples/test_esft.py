"""`examples/esft.py` as users run it: from a checkpoint, killed and resumed, and refused."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

import transformers_dsv3
from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3.data.python_reference import python_reference


pytest.importorskip("datasets")

SCRIPT = Path(__file__).parents[2] / "examples" / "esft.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), *sys.path]), "HF_HUB_OFFLINE": "1"}
SMALL = (
    "--max_steps 12 --save_steps 4 --block_size 32 --shuffle_window 16 --logging_steps 4 --disable_tqdm true".split()
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_model):
    """A small checkpoint with a tokenizer, and general text."""
    folder = tmp_path_factory.mktemp("base")
    words, rng = ["bar", "king", "lix", "moon", "nur"], random.Random(0)
    text = "\n".join(" ".join(rng.choice(words) for _ in range(20)) for _ in range(400))
    (folder / "general.txt").write_text(text)
    tokenizer = train_byte_bpe([text, SCRIPT.read_text()], 320, 256)
    tokenizer.save_pretrained(folder / "model")
    model = make_model(vocab_size=len(tokenizer), num_hidden_layers=3, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder / "model")
    return folder


def command(base, output, *options):
    given = ["--model", base / "model", "--general", base / "general.txt", "--output_dir", output, *options]
    return [sys.executable, str(SCRIPT), *SMALL, *map(str, given)]


def run(base, output, *options):
    result = subprocess.run(
        command(base, output, *options), capture_output=True, text=True, timeout=240, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run(base, output)


def test_specialises_on_the_reference_documentation(base, whole):
    output, printed = whole
    assert "topics held out" in printed and "Saved in" in printed
    assert "Trained by token with p = 0.2" in printed and "in all:" in printed
    before, after = (json.loads((output / f"{name}_results.json").read_text()) for name in ("before", "eval"))
    assert after["eval_domain_loss"] < before["eval_domain_loss"]
    assert f"held-out loss {before['eval_domain_loss']:.3f} before, {after['eval_domain_loss']:.3f} after" in printed
    selection = transformers_dsv3.ExpertSelection.load(output)
    assert selection == transformers_dsv3.ExpertSelection.load(output / "checkpoint-12")
    old, new = (load_file(folder / "model.safetensors") for folder in (base / "model", output))
    assert {name.split(".mlp.experts.")[0] for name in new if not torch.equal(new[name], old[name])} == {
        "model.layers.1",
        "model.layers.2",
    }
    assert sum(not torch.equal(new[name], old[name]) for name in new) == 3 * sum(map(len, selection.experts.values()))
    assert pipeline("text-generation", model=str(output))("bar", max_new_tokens=4)[0]["generated_text"]


def test_killed_and_resumed_it_ends_at_the_same_weights(base, whole, tmp_path):
    output = tmp_path / "out"
    for place in ("checkpoint-4", "saving.partial"):
        process = subprocess.Popen(
            command(base, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        while process.poll() is None and not (output / place).exists():
            time.sleep(0.001)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    printed = run(base, output)
    assert printed.splitlines()[-3:-1] == whole[1].splitlines()[-3:-1]
    for name, tensor in load_file(whole[0] / "model.safetensors").items():
        assert torch.equal(tensor, load_file(output / "model.safetensors")[name]), name


def test_wrong_input_is_refused_before_anything_is_written(base, whole, tmp_path):
    fresh = tmp_path / "new"
    for output, options, message in (
        (fresh, ["--p", "1.5"], "must lie in (0, 1]"),
        (fresh, ["--text", base / "nowhere"], "nowhere does not exist"),
        (fresh, ["--text", base / "general.txt"], "at least 100,000 are needed"),
        (fresh, ["--general", base / "nowhere"], "nowhere does not exist"),
        (fresh, ["--model", base / "nowhere"], "nowhere"),
        (whole[0], ["--p", "0.3"], "p was None and is 0.3 now"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(sys, "argv", command(base, output, *options)[1:])
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert message in str(caught.value.code)
        assert not fresh.exists()


def test_held_out_topics_are_not_trained_on():
    corpus = python_reference()
    train = {" ".join(part.split()) for document in corpus.train for part in document.text.split("\n\n")}
    held_out = {" ".join(part.split()) for document in corpus.held_out for part in document.text.split("\n\n")}
    assert not train & held_out
    assert corpus.train_bytes > 200_000 and corpus.held_out_bytes > 40_000
