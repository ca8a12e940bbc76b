"""The routing command on tiny checkpoints: what it prints and writes, and what it refuses before loading a model."""

import builtins
import json
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_dsv3.data.text_files import build_corpus, standard_library
from transformers_dsv3.evaluation.held_out_text import read_texts
from transformers_dsv3.evaluation.routing import RoutingReport, routing_report, text_stream
from transformers_dsv3_cli.main import app


@pytest.fixture(scope="module")
def save(make_model, byte_tokenizer, tmp_path_factory):
    """Function from changed fields to the folder of a checkpoint with a tokenizer of bytes."""

    def save(tokenizer=byte_tokenizer, **fields):
        folder = tmp_path_factory.mktemp("routing") / "model"
        make_model(**{"vocab_size": 258, "max_position_embeddings": 512, **fields}).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def checkpoint(save):
    return save()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text("".join(f"{name}, line {n}: {n * n}\n" for n in range(30)))
    return folder


@pytest.fixture
def no_loading(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


def routing(*arguments):
    return CliRunner().invoke(app, ["routing", *map(str, arguments)])


def refused(*arguments):
    result = routing(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_report_table_json_and_picture(checkpoint, text, byte_tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    json_path, png = tmp_path / "report.json", tmp_path / "loads.png"
    result = routing(checkpoint, "--text", text, "--window", 64, "--json", json_path, "--plot", png)
    assert result.exit_code == 0, result.output
    for words in ("utilisation", "MaxVio", "entropy", "dead", "above half fair", "8 experts, 3 a token"):
        assert words in result.output

    record = json.loads(json_path.read_text())
    (entry,) = record["checkpoints"]
    stream = text_stream(byte_tokenizer, [(text / name).read_text() for name in ("one.txt", "two.txt")])
    expected = routing_report(AutoModelForCausalLM.from_pretrained(checkpoint), stream, window=64)
    assert RoutingReport.from_dict(entry) == expected
    assert entry["checkpoint"] == str(checkpoint) and record["text"] == str(text)
    assert entry["tokens"] == stream.numel() == sum(entry["layers"][0]["tokens_per_expert"]) / 3
    flat = " ".join(result.output.split())
    assert f"{stream.numel():,} tokens of {text}, in windows of 64" in flat
    assert f"second-token acceptance {expected.mtp.second_token_acceptance:.1%}; loss" in flat
    assert f"{expected.layers[0].utilisation:.3f}" in flat and f"Loss {expected.loss:.3f}" in flat
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loads.png", "report.json"]


def test_two_checkpoints_on_several_texts(checkpoint, save, text, tmp_path):
    pytest.importorskip("matplotlib")
    other = save(seed=1, n_routed_experts=4, n_group=1, num_nextn_predict_layers=0)
    paths = ("--json", tmp_path / "both.json", "--plot", tmp_path / "both.png")
    texts = ("--text", text / "two.txt", "--text", text / "one.txt")
    result = routing(checkpoint, "--beside", other, *texts, "--window", 64, "--max-tokens", 640, *paths)
    assert result.exit_code == 0, result.output
    assert "8 experts" in result.output and "4 experts" in result.output
    assert result.output.count("MTP: ") == 1
    record = json.loads((tmp_path / "both.json").read_text())
    assert [entry["checkpoint"] for entry in record["checkpoints"]] == [str(checkpoint), str(other)]
    assert [entry["n_experts"] for entry in record["checkpoints"]] == [8, 4]
    assert [entry["tokens"] for entry in record["checkpoints"]] == [640, 640]
    assert record["text"] == f"{text / 'two.txt'}, {text / 'one.txt'}"


def test_the_default_text_is_what_quickstart_holds_out():
    corpus = build_corpus(standard_library(), "the Python standard library", max_bytes=32_000_000)
    source, texts = read_texts(None)
    assert texts == [document.text for document in corpus.held_out]
    assert corpus.split in source


def test_dtype(checkpoint, text, tmp_path):
    path = tmp_path / "report.json"
    result = routing(
        checkpoint, "--text", text, "--window", 64, "--dtype", "bfloat16", "--device", "cpu", "--json", path
    )
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "option", "says"),
    [
        (["--dtype", "int8"], "--dtype", "'int8' is none of auto, float32"),
        (["--device", "toaster"], "--device", "'toaster' is no device of this machine"),
        (["--window", "1"], "--window", "1 is not at least 2"),
        (["--window", "513"], "--window", "513 is more than the 512 positions of"),
        (["--max-tokens", "255"], "--max-tokens", "255 is less than one window of 256"),
        (["--plot", "loads.pdf"], "--plot", "loads.pdf does not end in .png"),
        (["--plot", "/no/such/folder/x.png"], "--plot", "there is no folder /no/such/folder"),
        (["--json", "/no/such/folder/x.json"], "--json", "there is no folder /no/such/folder"),
        (["--json", "/"], "--json", "/ is a folder, not a file"),
        (["--text", "/no/such/text"], "--text", "/no/such/text does not exist"),
        (["--beside", "./no-such-checkpoint"], "--beside", "./no-such-checkpoint: no such folder"),
    ],
)
def test_bad_input_is_refused_by_name(checkpoint, text, no_loading, arguments, option, says):
    output = refused(checkpoint, "--text", text, *arguments)
    assert option in output and says in output


def test_what_is_no_checkpoint_of_experts_is_refused(save, text, tmp_path, no_loading):
    assert "no such folder" in refused("./no-such-checkpoint", "--text", text)
    assert "config.json" in refused(tmp_path, "--text", text)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is a 'llama' checkpoint, not 'deepseek_v3'" in refused(tmp_path, "--text", text)
    dense = refused(save(first_k_dense_replace=2), "--text", text)
    assert "no mixture-of-experts layer: first_k_dense_replace=2 of 2 layers are dense" in dense


def test_tokenizers_that_do_not_fit_are_refused(save, text, no_loading):
    missing = refused(save(tokenizer=None), "--text", text)
    assert "has no tokenizer that can be loaded" in missing and "save_pretrained" in missing
    assert "outside the model's vocabulary of 40" in refused(save(vocab_size=40), "--text", text)


def test_text_that_cannot_be_used_is_refused(checkpoint, tmp_path, no_loading):
    short, binary, folder = tmp_path / "short.txt", tmp_path / "binary.bin", tmp_path / "folder"
    short.write_text("too little")
    binary.write_bytes(b"\0\1")
    folder.mkdir()
    said = refused(checkpoint, "--text", short)
    assert "the text makes only 11 tokens, fewer than one window of 256" in said and "--text" in said
    assert "has NUL bytes" in refused(checkpoint, "--text", binary)
    assert "no UTF-8 text file in it" in refused(checkpoint, "--text", folder)


@pytest.mark.parametrize(("option", "name"), [("--plot", "x.png"), ("--json", "x.json")])
def test_a_folder_that_cannot_be_written_is_refused(checkpoint, text, tmp_path, monkeypatch, no_loading, option, name):
    def denied(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    output = refused(checkpoint, "--text", text, option, tmp_path / name)
    assert option in output and "nothing can be written in" in output and "Permission denied" in output


def test_plot_without_matplotlib_is_refused(checkpoint, text, tmp_path, monkeypatch, no_loading):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    output = refused(checkpoint, "--text", text, "--plot", tmp_path / "x.png")
    assert "--plot" in output and "pip install 'transformers-dsv3[plot]'" in output


def test_a_checkpoint_whose_weights_are_damaged(save, text, tmp_path):
    folder = save()
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    output = refused(folder, "--text", text, "--json", tmp_path / "x.json")
    assert "model.safetensors" in output and "CHECKPOINT" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_a_file_is_written_whole_or_not_at_all(checkpoint, text, tmp_path, monkeypatch, option):
    path = tmp_path / "old.png"
    path.write_text("old")

    def disk_full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    assert routing(checkpoint, "--text", text, option, path).exit_code != 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_help_teaches():
    output = " ".join(routing("--help").output.split())
    for words in ("utilisation", "MaxVio", "Examples", "--beside", "second-token acceptance"):
        assert words in output


def test_the_same_text_gives_the_same_figures(checkpoint, text, tmp_path):
    figures = []
    for name in ("a.json", "b.json"):
        assert routing(checkpoint, "--text", text, "--json", tmp_path / name).exit_code == 0
        figures.append((tmp_path / name).read_text())
    assert figures[0] == figures[1]
    layer = json.loads(figures[0])["checkpoints"][0]["layers"][0]
    assert torch.tensor(layer["tokens_per_expert"]).sum() == 3 * json.loads(figures[0])["checkpoints"][0]["tokens"]
