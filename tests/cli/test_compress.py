"""`transformers-dsv3 compress`: plans, targets, refusals. What it writes: tests/compression/test_compress.py."""

import json

import pytest
from typer.testing import CliRunner

from tests.conftest import WIDTHS_OVER_BYTES
from transformers_dsv3.compression import plan as plans
from transformers_dsv3_cli.main import app


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(plans, "reading_bandwidth", lambda: 5e10)
    return lambda *words: CliRunner().invoke(app, ["compress", *map(str, words)])


@pytest.fixture
def folder(make_model, byte_tokenizer, tmp_path):
    make_model(**WIDTHS_OVER_BYTES).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["deepseek-v3", "moonlight-16b-a3b", "gigachat3-10b-a1.8b"])
def test_plans_of_published_models(run, name):
    done = run(name, "--plan", "--experts-bits", 3)
    assert done.exit_code == 0, done.output
    made = plans.plan(plans.model_config(name), plans.CompressionSettings(experts_bits=3))
    assert f"{name}: 4 bits, experts 3, embedding and head 8" in done.output
    assert f"{made.ratio():.2f} times smaller than in bf16, {made.ratio('fp32'):.2f} than in fp32" in done.output
    assert "50.0 GB/s" in done.output and f"{made.memory_bytes / 2**30:.2f} GiB" in done.output


def test_plans_for_a_target(run, folder):
    done = run("moonlight-16b-a3b", "--plan", "--target-ratio", 7.6)
    assert done.exit_code == 0 and "0.625 of the experts pruned" in done.output and "reach it" in done.output
    done = run("moonlight-16b-a3b", "--plan", "--target-ratio", 7.6, "--ratio-from", "fp32")
    assert done.exit_code == 0 and "pruned" not in done.output and "experts 3" in done.output
    done = run("moonlight-16b-a3b", "--plan", "--fit", "12GiB")
    assert done.exit_code == 0 and "4 bits, experts 4" in done.output
    # The folder needs no weights, nor anything but the configuration
    (folder / "model.safetensors").unlink()
    done = run(folder / "config.json", "--plan", "--target-ratio", 50)
    assert done.exit_code == 0 and "Out of reach" in done.output


def test_a_target_chooses_the_settings(run, folder, tmp_path):
    done = run(
        folder, "--output", tmp_path / "out", "--target-ratio", 2.5, "--ratio-from", "fp32", "--method", "nearest"
    )
    assert done.exit_code == 0, done.output
    assert "Chosen: 8 bits, experts 8" in done.output
    record = json.loads((tmp_path / "out" / "compression_record.json").read_text())
    assert record["settings"]["bits"] == 8 and record["ratio_from_fp32"] > 2.5


@pytest.mark.parametrize(
    ("words", "option", "said"),
    [
        ([], "--output", "or --plan"),
        (["--output", "out", "--target-ratio", 50], "--target-ratio", "nearest come 4 bits"),
        (["--output", "out", "--fit", "1kB"], "--fit", "nearest come 4 bits"),
        (["--plan", "--fit", "much"], "--fit", "is no size"),
        (["--plan", "--target-ratio", 4, "--bits", 8], "--target-ratio", "chooses --bits"),
        (["--plan", "--target-ratio", 0.5], "--target-ratio", "1 or more"),
        (["--plan", "--target-ratio", 4, "--ratio-from", "fp8"], "--ratio-from", "bf16, fp32"),
        (["--plan", "--fit", "1GB", "--ratio-from", "fp32"], "--ratio-from", "--target-ratio"),
        (["--output", "out", "--text", "model/config.json"], "--text", "too few to calibrate on"),
        (["--output", "out", "--text", "model", "--method", "nearest"], "--text", "by --prune"),
        (["--plan", "--bits", 5], "--bits", "4, 8 or 16"),
        (["--plan", "--prune", 0.3], "--prune", "nearest share"),
        (["--output", "out", "--prune", 0.25, "--prune-by", "size"], "--prune-by", "reap"),
        (["--output", "out", "--heal", 10], "--heal", "--prune"),
        (["--output", "out", "--prune", 0.25, "--heal", -1], "--heal", "less than"),
    ],
)
def test_what_is_refused(run, folder, tmp_path, monkeypatch, words, option, said):
    monkeypatch.chdir(tmp_path)
    refused = run("model", *words)
    assert refused.exit_code == 2, refused.output
    text = " ".join(refused.output.replace("│", " ").split())
    assert f"Invalid value for {option}:" in text and said in text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


QUANTISED = {"quantization_config": {"quant_method": "compressed-tensors"}}


@pytest.mark.parametrize(
    ("changed", "words", "said"),
    [
        (QUANTISED, ["--plan"], "quantised already, by compressed-tensors"),
        (QUANTISED, ["--output", "out"], "quantised already, by compressed-tensors"),
        (QUANTISED, ["--output", "out", "--target-ratio", 2], "quantised already, by compressed-tensors"),
        ({"moe_intermediate_size": 40}, ["--plan"], "`moe_intermediate_size=40`: inputs of weights have to be"),
    ],
)
def test_checkpoints_that_are_refused(run, folder, monkeypatch, changed, words, said):
    monkeypatch.chdir(folder.parent)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changed}))
    refused = run("model", *words)
    text = " ".join(refused.output.replace("│", " ").split())
    assert refused.exit_code == 2 and "Invalid value for CHECKPOINT:" in text and said in text, text
    assert "Chosen" not in text and [path.name for path in folder.parent.iterdir()] == ["model"]


def test_other_checkpoints_have_no_plan(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused = run(tmp_path, "--plan")
    assert refused.exit_code == 2 and "CHECKPOINT" in refused.output
