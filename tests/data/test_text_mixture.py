"""Mixture files, what is held out of their domains, and pre-training on them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import programs, small_model
from transformers_dsv3.data.byte_bpe import train_byte_bpe
from transformers_dsv3.data.mixture_order import MixtureError
from transformers_dsv3.data.text_files import TextError
from transformers_dsv3.data.text_mixture import HeldOutMixture, read_mixture
from transformers_dsv3.evaluation.training_record import read_training_record
from transformers_dsv3.training.held_out_metrics import BitsPerByteMetric


pytest.importorskip("datasets")

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = {"code": 0.35, "maths": 0.18, "prose": 0.47}
CONFIG = {**small_model.FIELDS, "vocab_size": 300, "num_nextn_predict_layers": 0, "model_type": "deepseek_v3"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """`datasets` counts on the Hub which of its builders are used, where it can."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "src").mkdir()
    for i in range(30):
        (folder / "src" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 9)
    with open(folder / "maths.jsonl", "w") as file:
        for i in range(60):
            file.write(json.dumps({"content": f"theorem {i}: let n be {i}. " * 9}) + "\n")
    for part in (0, 1):
        with open(folder / f"prose-{part}.jsonl", "w") as file:
            for i in range(40):
                language, text = ("de", "und es war ein Mal. ") if i % 2 else ("en", "and so it was once. ")
                file.write(json.dumps({"text": f"{part} {i} " + text * 9, "language": language}) + "\n")
    domains = {
        "code": {"text": "src"},
        "maths": {"dataset": "./maths.jsonl", "text_column": "content", "eval_documents": 9, "tokens": 4000},
        "prose": {"dataset": "./prose-*.jsonl", "eval_documents": 12},
    }
    (folder / "mixture.json").write_text(json.dumps({"weights": WEIGHTS, "domains": domains}))
    return folder


def test_domains_are_opened_and_held_out_by_language(folder):
    mixture = read_mixture(folder)
    assert list(mixture.streams) == list(WEIGHTS) and mixture.tokens == {"maths": 4000}
    assert set(mixture.streams["prose"].held_out_languages) == {"de", "en"}
    tokenizer = train_byte_bpe(mixture.head(10_000), 300, 256)
    held_out = HeldOutMixture(mixture, tokenizer, 16, False)
    assert [group[0] for group in held_out.groups] == ["code", "maths", "prose", "prose_de", "prose_en"]
    # Two groups of rows that a model knows and does not know
    nats = torch.zeros(len(held_out))
    for name, first, end, _ in held_out.groups:
        nats[first:end] = 30.0 if name == "prose_de" else 15.0

    class Prediction:
        predictions = nats.numpy()
        label_ids = torch.zeros(len(held_out), 16).numpy()

    metrics = BitsPerByteMetric(held_out.bytes_per_token, held_out.groups)(Prediction)
    assert metrics["prose_de_loss"] == 2 and metrics["prose_en_loss"] == metrics["code_loss"] == 1
    assert len([name for name in metrics if name.endswith("bits_per_byte")]) == 6
    told = mixture.to_dict()
    assert told["code"]["share of tokens"] == "0.35" and told["source"] == "a mixture of code, maths, prose"


def test_the_fingerprint_is_of_all_that_is_read(folder):
    other = read_mixture(folder, weights={"code": 0.36, "maths": 0.17, "prose": 0.47})
    assert read_mixture(folder).fingerprint == read_mixture(folder / "mixture.json").fingerprint != other.fingerprint
    assert read_mixture(folder, weights={"0": WEIGHTS, "9000": "article"}).weights == {0: WEIGHTS, 9000: "article"}


def test_how_often_a_run_reads_a_domain_is_known_before(folder):
    mixture = read_mixture(folder)
    assert mixture.repetitions(200 * 16 * 100, 16)["maths"] == pytest.approx(0.18 * 320_000 / 4000)
    assert mixture.repetition_refusal(40_000, 16) is mixture.repetition_warning(40_000, 16) is None
    assert mixture.repetition_warning(160_000, 16).startswith("the run would read maths 7.2 times: past 4")
    assert "would read maths 18.0 times, more than 16" in mixture.repetition_refusal(400_000, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"code": 0.35, "maths": 0.18, "prose": 0.4}}, "the weights sum to 0.93, not to 1"),
        ({"weights": None}, 'needs "weights"'),
        ({"domains": {}}, 'needs "domains"'),
        ({"weigths": {}}, "'weigths' is none of weights, domains and filter"),
        (
            {"domains": {"code": {"text": "nowhere"}}, "weights": {"code": 1}},
            "domain 'code': .*nowhere does not",
        ),
        ({"domains": {"code": {"txt": "src"}}, "weights": {"code": 1}}, "domain 'code': it needs either"),
        ({"domains": {"code": {"text": "src", "column": "x"}}, "weights": {"code": 1}}, "'column' is none of text"),
        ({"domains": {"m": {"dataset": "./maths.jsonl"}}, "weights": {"m": 1}}, "domain 'm': .*no column 'text'"),
        ({"weights": {"0": WEIGHTS, "soon": WEIGHTS}}, "by numbers of tokens, not by"),
    ],
)
def test_wrong_files_are_refused_by_name(folder, change, message):
    told = json.loads((folder / "mixture.json").read_text()) | change
    (folder / "wrong.json").write_text(json.dumps(told))
    with pytest.raises((TextError, MixtureError), match=message):
        read_mixture(folder / "wrong.json")
    (folder / "wrong.json").write_text("{")
    with pytest.raises(TextError, match="wrong.json is no JSON"):
        read_mixture(folder / "wrong.json")
    with pytest.raises(TextError, match="nowhere.json cannot be read: No such file"):
        read_mixture(folder / "nowhere.json")


def pretrain(folder, output, *options):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    small = "--block_size 16 --shuffle_window 4 --per_device_train_batch_size 4 --logging_steps 4 --save_steps 4"
    small += " --eval_strategy no --disable_tqdm true --warmup_steps 2"
    words = ["--data", folder, "--config", folder / "config.json", "--output_dir", output, *small.split(), *options]
    return programs.run([str(EXAMPLES / "pretrain.py"), *map(str, words)])


def test_pretraining_reads_a_mixture_and_resumes_in_it(folder, tmp_path):
    ended = pretrain(folder, tmp_path / "whole", "--max_steps", 12)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (tmp_path / "parts").mkdir()
    for name in ("run.json", "tokenizer", "checkpoint-8"):  # all that a run which was killed after step 8 has left
        copy = shutil.copytree if (tmp_path / "whole" / name).is_dir() else shutil.copy
        copy(tmp_path / "whole" / name, tmp_path / "parts" / name)
    ended = pretrain(folder, tmp_path / "parts", "--max_steps", 12)
    assert ended.returncode == 0, ended.stderr[-3000:]
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=0, msg=name)
    record = read_training_record(tmp_path / "whole" / "training_record.json")
    assert record["data"]["maths"]["share of tokens"] == "0.18"
    named = {(entry["metric"], entry["data"]) for entry in record["results"]}
    assert ("loss", "held-out prose, de text") in named and ("bits_per_byte", "held-out text") in named
    state = json.loads((tmp_path / "whole" / "checkpoint-12" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry][-1]
    assert sum(logged[f"mixture/{name}_tokens"] for name in WEIGHTS) == 12 * 4 * 16
    assert abs(logged["mixture/code_tokens"] - 0.35 * 12 * 4 * 16) < 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "."], "--data and --text: give one of them"),
        (["--max_steps", "9000"], "the run would read maths 25.9 times, more than 16"),
        (["--weights", '{"code": 1'], "--weights is no JSON"),
        (["--weights", '{"code": 0.5}'], "the weights sum to 0.5, not to 1"),
    ],
)
def test_wrong_options_are_refused_before_training(folder, tmp_path, options, message):
    ended = pretrain(
        folder, tmp_path / "out", *(["--max_steps", "4"] if "--max_steps" not in options else []), *options
    )
    assert ended.returncode == 1 and message in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
