"""`examples/lora_sft.py` as users run it: from a checkpoint, killed and resumed, on their own data, and refused."""

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
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, pipeline

from transformers_dsv3.data.byte_bpe import train_byte_bpe


pytest.importorskip("datasets")

SCRIPT = Path(__file__).parents[2] / "examples" / "lora_sft.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), *sys.path]), "HF_HUB_OFFLINE": "1"}
SMALL = "--max_steps 12 --save_steps 4 --max_length 32 --logging_steps 4 --disable_tqdm true --budget 0.1".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_model):
    """A small checkpoint with a tokenizer, general text, and a dataset of prompts and completions."""
    folder = tmp_path_factory.mktemp("base")
    words, rng = ["ash", "birch", "cedar", "elm", "fir"], random.Random(0)
    lines = [" ".join(rng.choice(words) for _ in range(20)) for _ in range(400)]
    (folder / "general.txt").write_text("\n".join(lines))
    rows = [json.dumps({"prompt": line[:20], "completion": line[20:]}) for line in lines[:60]]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    (folder / "broken.jsonl").write_text('{"text": \n')
    (folder / "columns.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    tokenizer = train_byte_bpe(["\n".join(lines), SCRIPT.read_text()], 320, 256)
    tokenizer.save_pretrained(folder / "model")
    make_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(
        folder / "model"
    )
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


def test_adapts_to_the_reference_documentation(base, whole):
    output, printed = whole
    assert "topics held out" in printed and "LoRA of rank" in printed
    before, after = (json.loads((output / f"{name}_results.json").read_text()) for name in ("before", "eval"))
    assert after["eval_domain_loss"] < before["eval_domain_loss"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "model"), output).eval()
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        expected = adapted(tokens).logits
        for cls in (AutoModelForCausalLM, DeepseekV3ForCausalLM):  # the latter is Transformers' own
            torch.testing.assert_close(
                cls.from_pretrained(output / "merged").eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4
            )
    for folder in (output, output / "merged"):
        assert pipeline("text-generation", model=str(folder))("ash", max_new_tokens=4)[0]["generated_text"]


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
    run(base, output)
    expected = load_file(whole[0] / "adapter_model.safetensors")
    seen = load_file(output / "adapter_model.safetensors")
    assert expected.keys() == seen.keys() and all(torch.equal(seen[name], expected[name]) for name in seen)


@pytest.mark.slow
def test_prompts_and_completions(base, tmp_path):
    printed = run(base, tmp_path / "out", "--dataset", base / "pairs.jsonl", "--packing", "false", "--where", "linear")
    assert "on attention, dense, shared experts" in printed and "held-out loss" in printed


def test_wrong_input_is_refused_before_anything_is_written(base, whole, tmp_path):
    fresh = tmp_path / "new"
    for output, options, message in (
        (fresh, ["--budget", "1e-6"], "too small for rank 1"),
        (fresh, ["--where", "everywhere"], "none of auto"),
        (fresh, ["--where", "head"], "use Trainer for it"),
        (fresh, ["--rank", "2"], "one of budget"),
        (fresh, ["--max_steps", "-1"], "give the length of the run"),
        (fresh, ["--dataset", base / "broken.jsonl"], "cannot be read"),
        (fresh, ["--dataset", base / "columns.jsonl"], "no column text, prompt or messages"),
        (fresh, ["--text", base / "nowhere"], "nowhere does not exist"),
        (fresh, ["--dataset", base / "nowhere.jsonl"], "no such file"),
        (fresh, ["--text", base, "--dataset", base / "pairs.jsonl"], "one of them"),
        (fresh, ["--model", base / "nowhere"], "nowhere"),
        (whole[0], ["--where", "attention"], "where was 'auto' and is 'attention' now"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(sys, "argv", command(base, output, *options)[1:])
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert message in str(caught.value.code)
        assert not fresh.exists()
