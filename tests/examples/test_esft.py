"""`examples/esft.py` as users run it: from a checkpoint, killed and resumed, and refused."""

import json
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

import transformers_dsv3
from transformers_dsv3.data.python_reference import python_reference
from transformers_dsv3.evaluation.training_record import read_training_record


pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def example(make_example):
    return make_example(
        "esft.py",
        "--max_steps 12 --save_steps 4 --block_size 32 --shuffle_window 16 --logging_steps 4 --disable_tqdm true",
    )


@pytest.fixture(scope="module")
def whole(example, base, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return output, example.run(base, output)


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
    assert pipeline("text-generation", model=str(output))("ash", max_new_tokens=4)[0]["generated_text"]
    record = read_training_record(output / "training_record.json")
    assert [(r["before"], r["after"]) for r in record["results"]] == [
        (before[f"eval_{name}_loss"], after[f"eval_{name}_loss"]) for name in ("domain", "general")
    ]
    assert record["base"]["name"] == "model" and "general.txt" == record["data"]["general_text"]["source"]
    assert 0 < record["parameters"]["trained"] < record["parameters"]["total"]


def test_killed_and_resumed_it_ends_at_the_same_weights(example, base, whole, tmp_path):
    output = tmp_path / "out"
    for place in ("checkpoint-4", "saving.partial"):
        example.kill_at(base, output, place)
    printed = example.run(base, output)
    assert printed.splitlines()[-3:-1] == whole[1].splitlines()[-3:-1]
    for name, tensor in load_file(whole[0] / "model.safetensors").items():
        assert torch.equal(tensor, load_file(output / "model.safetensors")[name]), name
    records = [read_training_record(folder / "training_record.json") for folder in (whole[0], output)]
    for field in ("history", "results", "tokens", "settings", "data"):
        assert records[0][field] == records[1][field], field


def test_wrong_input_is_refused_before_anything_is_written(example, base, whole, tmp_path):
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
            patch.setattr(sys, "argv", example.command(base, output, *options)[1:])
            runpy.run_path(str(example.script), run_name="__main__")
        assert message in str(caught.value.code)
        assert not fresh.exists()


def test_held_out_topics_are_not_trained_on():
    corpus = python_reference()
    train = {" ".join(part.split()) for document in corpus.train for part in document.text.split("\n\n")}
    held_out = {" ".join(part.split()) for document in corpus.held_out for part in document.text.split("\n\n")}
    assert not train & held_out
    assert corpus.train_bytes > 200_000 and corpus.held_out_bytes > 40_000
