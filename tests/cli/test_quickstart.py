"""The whole quickstart at a size that trains in seconds."""

import functools
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import transformers_dsv3
from tests import programs, small_model
from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3.data.text_files import TextError
from transformers_dsv3.evaluation import quickstart_report
from transformers_dsv3.evaluation.checkpoint_identity import checkpoint_digest
from transformers_dsv3.evaluation.quickstart import names_of, run_quickstart
from transformers_dsv3.evaluation.training_record import read_training_record
from transformers_dsv3.option_error import OptionError
from transformers_dsv3.training.quickstart_run import QuickstartSettings
from transformers_dsv3_cli.main import app
from transformers_dsv3_cli.quickstart import show


TINY = QuickstartSettings(
    vocab_size=320,
    block_length=32,
    batch_size=2,
    steps=6,
    warmup_steps=1,
    save_every=2,
    min_text_bytes=5_000,
    model=dict(small_model.FIELDS),
)


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    """Decoding is measured on 8 tokens a passage instead of 64: with training it is what a run's time goes to."""
    with pytest.MonkeyPatch.context() as patch:
        shorter = functools.partial(quickstart_report.measure_checkpoint, new_tokens=8)
        patch.setattr(quickstart_report, "measure_checkpoint", shorter)
        yield


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    for i in range(20):
        lines = [f"note {i}, line {n}: the {n * n % 17}th thing follows the {n % 13}th\n" for n in range(12)]
        (folder / f"note_{i:02}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def start(output, notes, *, steps=None, seed=None, settings=TINY):
    return run_quickstart(output, text=notes, steps=steps, seed=seed, settings=settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, notes):
    output = tmp_path_factory.mktemp("quickstart") / "out"
    return output, start(output, notes)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def test_the_folder_is_an_official_checkpoint_of_the_plugin(finished):
    output, _ = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training"}
    assert not [name for name in names if "partial" in name]
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["use_cache"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model) is transformers_dsv3.Dsv3ForCausalLM
    assert model.generation_config.max_new_tokens == 64
    assert len(AutoTokenizer.from_pretrained(output)) == config["vocab_size"]


def test_results_are_on_disk_and_plausible(finished):
    output, results = finished
    assert json.loads((output / "quickstart_results.json").read_text()) == json.loads(json.dumps(results))
    assert results["steps"] == results["training"]["steps"] == 6
    assert results["training"]["tokens"] == 6 * 2 * 32
    assert 0 < results["held_out"]["bits_per_byte"] < 10
    assert 0 < results["held_out"]["zlib_bits_per_byte"] < 8
    for key in ("mtp_acceptance_rate", "mtp_acceptance_rate_sampled"):
        assert 0 <= results["decode"][key] <= 1
    # Two layers, 16 latent and 8 rotary values, four bytes each.
    assert results["cache_bytes_per_token"]["plugin"] == 2 * (16 + 8) * 4
    assert len(results["completions"]) == 3
    assert results["parameters"]["active"] < results["parameters"]["total"]


def test_the_run_is_recorded(finished):
    output, results = finished
    record = read_training_record(output / "training_record.json")
    assert record["checkpoint"]["sha256"] == checkpoint_digest(output)
    assert (record["steps"], record["tokens"]) == (6, results["training"]["tokens"])
    assert record["data"]["fingerprint"] == results["text"]["fingerprint"]
    (measured,) = record["results"]
    assert measured["after"] == results["held_out"]["bits_per_byte"]
    assert record["routing"] == json.loads(json.dumps(results["routing"]))
    assert record["history"]["loss"]["steps"] == [5]


def test_the_table_prints_every_figure(finished, capsys):
    output, results = finished
    show(results, output)
    printed = capsys.readouterr().out
    for words in ("held-out bits per byte", "zlib", "MTP drafts accepted", "cache bytes a token", "completion"):
        assert words in printed


def test_plain_transformers_opens_the_folder(finished):
    output, _ = finished
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert type(model).__module__.startswith('transformers.'), type(model)\n"
        "torch.save(model(**tokenizer('note 3', return_tensors='pt')).logits, sys.argv[2])\n"
    )
    logits = output.parent / "logits.pt"
    done = programs.run(["-c", code, output, logits], cwd=output)
    assert done.returncode == 0, done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    with torch.inference_mode():
        ours = model(**tokenizer("note 3", return_tensors="pt")).logits
    torch.testing.assert_close(ours, torch.load(logits, weights_only=True), rtol=1e-4, atol=1e-5)


def test_explain_names_what_serves_the_folder(finished):
    output, _ = finished
    result = CliRunner().invoke(app, ["explain", str(output)])
    assert result.exit_code == 0, result.output
    assert "attention" in result.output and "experts" in result.output


def test_training_learns(tmp_path, notes, finished):
    _, short = finished
    longer = start(tmp_path / "out", notes, steps=40)
    assert longer["held_out"]["bits_per_byte"] < short["held_out"]["bits_per_byte"] - 0.2


def test_two_runs_give_the_same_figures(tmp_path, notes, finished):
    output, results = finished
    again = start(tmp_path / "again", notes)
    assert again["held_out"] == results["held_out"]
    assert again["completions"] == results["completions"]
    assert_same_weights(tmp_path / "again", output)


def test_the_same_command_trains_on(tmp_path, notes):
    output = tmp_path / "out"
    first = start(output, notes, steps=4)
    second = start(output, notes, steps=3)
    assert (first["steps"], second["steps"], second["training"]["steps"]) == (4, 7, 3)
    record = read_training_record(output / "training_record.json")
    assert (record["steps"], record["tokens"], len(record["commands"])) == (7, 7 * 2 * 32, 2)
    state = json.loads((output / "training" / "checkpoint-7" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 7
    assert len(list((output / "training").glob("checkpoint-*"))) <= 2


KILLED = f"""
import sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_quickstart import TINY, run_quickstart
run_quickstart(Path(sys.argv[1]), text=Path(sys.argv[2]), steps=40, seed=None, settings=TINY)
"""


def test_killed_at_any_moment_it_ends_at_the_same_weights(tmp_path, notes):
    start(tmp_path / "whole", notes, steps=40)
    killed = tmp_path / "killed"
    # The second checkpoint is half-written at that moment; the first is whole.
    second = killed / "training" / "checkpoint-4"
    ended = programs.run(["-c", KILLED, killed, notes], signal_when=(second, signal.SIGKILL))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert {path.name for path in second.parent.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not (killed / "config.json").exists()  # nothing loads a folder whose training has not ended
    results = start(killed, notes)
    assert results["steps"] == 40
    assert 0 < results["training"]["steps"] < 40
    assert_same_weights(tmp_path / "whole", killed)


def test_other_text_seed_or_sizes_are_refused_before_anything_changes(finished, notes, tmp_path):
    output, _ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (tmp_path / "other.txt").write_text("other words, again and again\n" * 1000)
    with pytest.raises(OptionError, match="was trained on other text"):
        start(output, tmp_path / "other.txt")
    with pytest.raises(OptionError, match="was started with --seed 0"):
        start(output, notes, seed=3)
    with pytest.raises(OptionError, match="other sizes"):
        start(output, notes, settings=replace(TINY, block_length=16))
    with pytest.raises(TextError, match="at least 5,000 are needed"):
        (tmp_path / "short.txt").write_text("too little")
        start(tmp_path / "new", tmp_path / "short.txt")
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert not (tmp_path / "new").exists()


def test_text_of_too_few_tokens_is_refused_and_leaves_the_folder_usable(tmp_path, notes, finished):
    output = tmp_path / "out"
    (tmp_path / "letters.txt").write_text("a" * 10_000)
    with pytest.raises(TextError, match=r"letters.txt makes only \d+ tokens, fewer than one block of 32"):
        start(output, tmp_path / "letters.txt")
    assert not output.exists()
    start(output, notes)
    assert_same_weights(output, finished[0])
    assert (output / "tokenizer.json").read_text() == (finished[0] / "tokenizer.json").read_text()


def test_a_tokenizer_without_a_recorded_run_is_not_taken_over(tmp_path, notes, finished):
    output = tmp_path / "out"
    train_byte_bpe(["other words, again and again\n"], 300, 64).save_pretrained(output / "training" / "tokenizer")
    start(output, notes)
    assert (output / "tokenizer.json").read_text() == (finished[0] / "tokenizer.json").read_text()


def test_files_left_out_are_named():
    assert names_of(["a.png"]) == "1 file (a.png)"
    assert names_of(["a", "b", "c"]) == "3 files (a, b, c)"
    assert names_of(["a", "b", "c", "d"]) == "4 files (a, b, c, …)"
