"""The pre-training examples as users run them, killed at any moment included."""

import importlib.util
import json
import random
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, LlamaConfig, pipeline

from tests import programs, small_model
from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3.evaluation.training_record import read_training_record


pytest.importorskip("datasets")

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {**small_model.FIELDS, "vocab_size": 320, "initializer_range": 0.05, "model_type": "deepseek_v3"}
# Windows of 16 blocks: a run reads several of them, and its text more than once
SMALL = "--block_size 32 --shuffle_window 16 --per_device_train_batch_size 4 --logging_steps 4 --save_steps 4".split()
SMALL += "--eval_strategy no --disable_tqdm true --warmup_steps 2".split()


def command(script, output, *options):
    return [sys.executable, str(EXAMPLES / script), "--output_dir", str(output), *SMALL, *map(str, options)]


def run(script, output, *options):
    result = programs.run(command(script, output, *options)[1:])
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu") for b in ("r", "st", "ng", "x")]
    return [" ".join(rng.choice(words) for _ in range(rng.randint(300, 1200))) + "\n" for _ in range(60)]


@pytest.fixture(scope="module")
def notes(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("notes")
    for i, text in enumerate(texts):
        (folder / f"note_{i:02}.txt").write_text(text, encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\xff" * 50)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, notes, tiny):
    """A run without interruption."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run("pretrain.py", output, "--config", tiny, "--text", notes, "--max_steps", 60)
    return output


def log_of(output, step):
    history = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    timed = ("tokens_per_second", "mfu", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{key: value for key, value in entry.items() if key not in timed} for entry in history]


def assert_same_run(one, other, step):
    weights, others = (load_file(output / "model.safetensors") for output in (one, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=0, msg=name)
    assert log_of(one, step) == log_of(other, step)
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in other.iterdir()} == names
    assert not [name for name in names if "partial" in name]


def test_finished_it_says_so_and_does_nothing(whole, notes, tiny):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    printed = run("pretrain.py", whole, "--config", tiny, "--text", notes, "--max_steps", 60)
    assert f"{whole} is finished, at step 60: more --max_steps train it on" in printed
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_trains_and_saves_an_official_checkpoint(whole):
    losses = [entry["loss"] for entry in log_of(whole, 60) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert {path.name for path in whole.glob("checkpoint-*")} == {"checkpoint-56", "checkpoint-60"}
    config = json.loads((whole / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["use_cache"]
    evaluation = json.loads((whole / "eval_results.json").read_text())
    assert 0 < evaluation["eval_bits_per_byte"] < 6
    record = read_training_record(whole / "training_record.json")
    assert record["results"][0]["after"] == evaluation["eval_bits_per_byte"]
    assert record["history"]["loss"]["steps"][-1] == 60 and record["method"] == "pre-training"

    tokenizer = AutoTokenizer.from_pretrained(whole)
    model = AutoModelForCausalLM.from_pretrained(whole).eval()
    native = DeepseekV3ForCausalLM.from_pretrained(whole).eval()
    inputs = tokenizer("bar king lix", return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(native(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    text = pipeline("text-generation", model=str(whole))("bar", max_new_tokens=4, do_sample=False)
    assert len(text[0]["generated_text"]) > 3


def kill_when(process, moment, deadline=600):
    """Kills the process at the first instant at which `moment()` holds; whether it still ran then."""
    end = time.monotonic() + deadline
    while process.poll() is None and not moment():
        assert time.monotonic() < end
        time.sleep(0.001)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def killed_at(path, output, *options):
    """The program is killed by itself, so that it is nowhere else however busy the machine is."""
    result = programs.run(command("pretrain.py", output, *options)[1:], signal_when=(path, signal.SIGKILL))
    return result.returncode == -signal.SIGKILL


def killed(output, moment, *options, script="pretrain.py"):
    process = programs.Program(command(script, output, *options)[1:])
    return kill_when(process, moment)


def test_killed_in_several_places_it_ends_at_the_same_weights(tmp_path, whole, notes, tiny):
    output = tmp_path / "out"
    options = ["--config", tiny, "--text", notes, "--max_steps", 60]
    # Within the writing of a checkpoint: its folder is there, its last file is not
    assert killed_at(output / "checkpoint-8", output, *options)
    assert not (output / "config.json").exists()  # nothing loads a folder whose training has not ended
    # Behind a checkpoint, in the middle of a window of the stream
    assert killed_at(output / "checkpoint-44" / "trainer_state.json", output, *options)
    # A checkpoint as a kill leaves it at its worst, nothing lacking but the end of the last file
    latest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.copytree(latest, output / "checkpoint-52")
    (output / "checkpoint-52" / "trainer_state.json").write_text((latest / "trainer_state.json").read_text()[:-20])
    # And one that was being removed, the last file still there
    shutil.rmtree(output / "checkpoint-4", ignore_errors=True)
    (output / "checkpoint-4").mkdir()
    (output / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    # After the last step, while the official checkpoint is put together
    assert killed_at(output / "saving.partial", output, *options)
    assert not (output / "config.json").exists()
    printed = run("pretrain.py", output, *options)
    assert f"From {output / 'checkpoint-60'}" in printed
    assert f"Saved in {output}, an official checkpoint" in printed
    assert_same_run(whole, output, 60)


def test_interrupted_it_says_how_to_go_on(tmp_path, notes, tiny):
    output = tmp_path / "out"
    options = ["--config", tiny, "--text", notes, "--max_steps", 60, "--save_steps", 2]
    stopped = programs.run(
        command("pretrain.py", output, *options)[1:], signal_when=(output / "checkpoint-4", signal.SIGINT)
    )
    said = stopped.stderr
    assert stopped.returncode == 130, said
    assert "Traceback" not in said
    assert re.search(rf"Stopped. The same command goes on from the last checkpoint, {output}/checkpoint-\d+\.$", said)


@pytest.mark.slow
def test_killed_before_training(tmp_path, whole, notes, tiny):
    output = tmp_path / "out"
    options = ["--config", tiny, "--text", notes, "--max_steps", 60]
    for entry in ("", "run.json", "tokenizer"):
        assert killed(output, lambda path=output / entry: path.exists(), *options)
    run("pretrain.py", output, *options)
    run("pretrain.py", output, *options)  # a finished run stays as it is
    assert_same_run(whole, output, 60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_until_it_ends(tmp_path, whole, notes, tiny, seed):
    output, rng = tmp_path / "out", random.Random(seed)
    options = ["--config", tiny, "--text", notes, "--max_steps", 60]
    kills = 0
    for _ in range(6):
        newest = max((int(path.name[11:]) for path in output.glob("checkpoint-*")), default=0)
        # Writing a checkpoint takes some tens of milliseconds
        target, delay = output / f"checkpoint-{newest + 4 * rng.randint(1, 3)}", 0.05 * rng.random()
        kills += killed(output, lambda path=target, s=delay: path.exists() and not time.sleep(s), *options)
    assert kills
    run("pretrain.py", output, *options)
    assert_same_run(whole, output, 60)


@pytest.mark.slow
def test_gradient_accumulation_workers_and_evaluation_resume(tmp_path, notes, tiny):
    options = ["--config", tiny, "--text", notes, "--max_steps", 24, "--reset_positions"]
    options += ["--gradient_accumulation_steps", 2, "--dataloader_num_workers", 1]
    options += ["--eval_strategy", "steps", "--eval_steps", 8]
    run("pretrain.py", tmp_path / "whole", *options)
    output = tmp_path / "out"
    assert killed(output, lambda: (output / "checkpoint-12").exists(), *options)
    run("pretrain.py", output, *options)
    assert_same_run(tmp_path / "whole", output, 24)


@pytest.fixture(scope="module")
def continuation(tmp_path_factory, whole, texts):
    """Options and folder of a run that goes on from the first one's checkpoint, on a dataset."""
    folder = tmp_path_factory.mktemp("continued")
    jsonl = folder / "notes.jsonl"
    jsonl.write_text("".join(json.dumps({"content": text.title()}) + "\n" for text in texts))
    options = ["--model", whole, "--dataset", jsonl, "--text_column", "content", "--eval_documents", 5]
    options += ["--max_steps", 16, "--learning_rate", 3e-3]
    run("continue_pretraining.py", folder / "out", *options)
    return options, folder / "out"


def test_continues_a_checkpoint_on_a_dataset(whole, continuation):
    _, output = continuation
    losses = [entry["loss"] for entry in log_of(output, 16) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    before, after = load_file(whole / "model.safetensors"), load_file(output / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(before)
    assert DeepseekV3ForCausalLM.from_pretrained(output).config.vocab_size == TINY["vocab_size"]


@pytest.mark.slow
def test_continuing_resumes(tmp_path, continuation):
    options, whole = continuation
    output = tmp_path / "out"
    assert killed(output, lambda: (output / "checkpoint-8").exists(), *options, script="continue_pretraining.py")
    run("continue_pretraining.py", output, *options)
    assert_same_run(whole, output, 16)


def refusal(script, output, *options):
    """What the script says when it stops without a traceback. In this process: nothing is computed by then."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", command(script, output, *options)[1:])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return str(caught.value.code)


def test_wrong_input_is_refused_before_anything_is_written(tmp_path, whole, notes, tiny):
    (tmp_path / "short.txt").write_text("too little")
    (tmp_path / "picture.png").write_bytes(b"\0\xff" * 100_000)
    (tmp_path / "rows.jsonl").write_text('{"body": "a", "n": 1}\n' * 500)
    (tmp_path / "llama").mkdir()
    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    train_byte_bpe([Path(__file__).read_text()], 600, 256).save_pretrained(tmp_path / "large")
    fresh = tmp_path / "new"
    base = ["--max_steps", 4, "--config", tiny]
    cases = [
        ("pretrain.py", fresh, [*base, "--text", tmp_path / "nowhere"], "nowhere does not exist"),
        ("pretrain.py", fresh, [*base, "--text", tmp_path / "short.txt"], "at least 100,000 are needed to learn from"),
        ("pretrain.py", fresh, [*base, "--text", tmp_path / "picture.png"], "0 bytes of text"),
        ("pretrain.py", fresh, [*base, "--text", notes, "--dataset", "x"], "--text and --dataset: give one of them"),
        ("pretrain.py", fresh, [*base, "--dataset", tmp_path / "rows.jsonl"], "no column 'text'; it has 'body', 'n'"),
        ("pretrain.py", fresh, [*base, "--text", notes, "--block_size", 512], "max_position_embeddings=256"),
        (
            "pretrain.py",
            fresh,
            [*base, "--text", notes, "--tokenizer", tmp_path / "large"],
            "has 600 tokens, more",
        ),
        ("pretrain.py", fresh, [*base, "--text", notes, "--config_overrides", "n_group=3"], "divisible by n_group"),
        ("pretrain.py", fresh, [*base, "--config", tmp_path / "llama"], "of model type 'llama', not deepseek_v3"),
        ("pretrain.py", fresh, [*base, "--text", notes, "--save_only_model"], "--save_only_model"),
        ("pretrain.py", fresh, ["--text", notes, "--max_steps", 0], "--max_steps must be given"),
        ("pretrain.py", tmp_path / "other", [*base, "--text", notes], "holds something else (thesis.tex)"),
        ("pretrain.py", whole, [*base, "--text", notes, "--seed", 7], "seed was 42 and is 7 now"),
        ("pretrain.py", whole, [*base, "--text", notes], "is trained up to step 60, past --max_steps 4"),
        ("continue_pretraining.py", fresh, ["--model", tmp_path / "llama", "--text", notes], "not deepseek_v3"),
        ("continue_pretraining.py", fresh, ["--model", "./nowhere"], "./nowhere: no such file or folder"),
        ("continue_pretraining.py", fresh, ["--model", tmp_path / "other"], f"no config.json in {tmp_path / 'other'}"),
        ("pretrain.py", fresh, ["--config", tmp_path / "other"], "no config.json in"),
        ("pretrain.py", fresh, [*base, "--tokenizer", tmp_path / "llama"], "no tokenizer* or vocab* or *.model in"),
        ("pretrain.py", fresh, ["--dataset", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        ("pretrain.py", fresh, ["--config_overrides", "hidden=8"], "a deepseek_v3 config has no field 'hidden'"),
        ("pretrain.py", fresh, ["--config_overrides", "update=8"], "a deepseek_v3 config has no field 'update'"),
        ("pretrain.py", fresh, ["--config_overrides", "hidden_size"], "'hidden_size' is not of the form NAME=VALUE"),
        ("pretrain.py", fresh, ["--config_overrides", "hidden_size=a"], "hidden_size: invalid literal for int"),
        ("pretrain.py", fresh, ["--config_overrides", "rope_parameters=3"], "rope_parameters: You can only update"),
        ("pretrain.py", fresh, ["--report_to", "abacus"], "--report_to abacus: abacus is not supported"),
    ]
    if importlib.util.find_spec("wandb") is None:
        cases.append(("pretrain.py", fresh, ["--report_to", "wandb"], "requires wandb to be installed"))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    for script, output, options, message in cases:
        assert message in refusal(script, output, *options)
        assert not fresh.exists()
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_wrong_flags_are_refused_in_a_few_lines(capsys):
    for options, message in (
        (["--batch_sise", 4], "pretrain.py: error: unrecognized arguments: --batch_sise 4"),
        (["--load_best_model_at_end", "true"], "pretrain.py: error: --load_best_model_at_end requires"),
    ):
        assert refusal("pretrain.py", "x", *options) == "2"
        printed = capsys.readouterr().err
        assert message in printed and len(printed.splitlines()) < 5


def test_help_teaches(capsys):
    for script in ("pretrain.py", "continue_pretraining.py"):
        assert refusal(script, "x", "--help") == "0"
        printed = capsys.readouterr().out
        assert "--reset_positions" in printed and "--gradient_checkpointing" in printed and "DeepSeek-V3" in printed
        assert printed.splitlines()[0] == f"usage: {script} [-h] [--FLAG VALUE ...]"
        warmup = " ".join(printed.split("--warmup_steps")[1].split("--optim")[0].split())
        assert "float in [0, 1) (ratio of total steps). (default: 0.1)" in warmup
