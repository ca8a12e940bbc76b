"""The evaluate command on tiny checkpoints: what it prints and writes, and what it refuses before loading a model."""

import json
import math
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_dsv3.evaluation import checkpoint_evaluation, evaluation_options, harness, sandbox
from transformers_dsv3.evaluation.checkpoint_identity import checkpoint_digest
from transformers_dsv3.evaluation.evaluation_record import read_record
from transformers_dsv3.evaluation.routing import RoutingReport, routing_report, text_stream
from transformers_dsv3_cli.main import app


pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_task_index")


@pytest.fixture(scope="module")
def checkpoint(make_model, byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    make_model(vocab_size=258, max_position_embeddings=512).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A LoRA adapter of the checkpoint, which it names by its path."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = LoraConfig(r=4, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("evaluate") / "adapter"
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private") / "notes"
    folder.mkdir()
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text("".join(f"{name}, line {n}: {n * n}\n" for n in range(20)))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_loading(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("a model was loaded, or its weights read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(checkpoint_evaluation.CheckpointSource, "identity", load)


def evaluate(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def done(*arguments):
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    result = evaluate(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def strings(value):
    if isinstance(value, dict):
        yield from (text for key, entry in value.items() for text in (key, *strings(entry)))
    elif isinstance(value, list):
        yield from (text for entry in value for text in strings(entry))
    elif isinstance(value, str):
        yield value


@pytest.fixture(scope="module")
def everything(checkpoint, text, harness_tasks, tmp_path_factory):
    """Arguments for all parts, and the record that they made."""
    path = tmp_path_factory.mktemp("evaluate") / "all.json"
    arguments = [checkpoint, "--text", text, "--window", 64, "--limit", 3]
    arguments += ["--tasks", "halves,halves_text", "--include-path", harness_tasks]
    if sandbox.sandbox_refusal() is None:
        arguments += ["--human-eval", "--execute-generated-code"]
    result = done(*arguments, "--json", path)
    return arguments, path, result


def test_the_record_has_every_part(everything, checkpoint, text, byte_tokenizer):
    arguments, path, result = everything
    record = read_record(path)
    assert record.complete and record.seed == 0
    assert (record.checkpoint.name, record.checkpoint.sha256) == ("model", checkpoint_digest(checkpoint))
    assert record.settings["window"] == 64 and record.settings["tasks"] == ["halves", "halves_text"]

    texts = [(text / name).read_text() for name in ("one.txt", "two.txt")]
    stream = text_stream(byte_tokenizer, texts)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    report = RoutingReport.from_dict(record.routing)
    assert report == routing_report(model, stream, window=64)
    assert record.text["source"] == record.routing["source"] == "notes"
    assert (record.text["documents"], record.text["bytes"]) == (2, sum(len(text.encode()) for text in texts))
    assert record.text["tokens"] == stream.numel() - 1
    assert record.text["perplexity"] == pytest.approx(math.exp(record.text["nats_per_token"]))
    assert record.text["byte_perplexity"] == pytest.approx(2 ** record.text["bits_per_byte"])
    total = record.text["nats_per_token"] * record.text["tokens"]
    assert record.text["bits_per_byte"] == pytest.approx(total / math.log(2) / record.text["bytes"])

    # Two layers of 16 latent and 8 rotary values, four bytes each
    assert record.speed["cache_bytes_per_token"] == 2 * (16 + 8) * 4
    for figure in ("prefill_tokens_per_second", "greedy_tokens_per_second", "greedy_mtp_tokens_per_second"):
        assert record.speed[figure] > 0
    assert set(record.tasks) == {"halves", "halves_choice", "halves_writing", "halves_text"}
    assert record.tasks["halves_choice"]["n"] == 3
    if record.human_eval is not None:
        assert record.human_eval["problems"] == 3 and record.human_eval["sandbox"] == "namespaces"
        assert record.human_eval["pass@k"]["1"]["value"] == 0.0


def test_it_tells_nothing_of_this_machines_folders(everything, checkpoint, text, harness_tasks):
    record = json.loads(everything[1].read_text())
    folders = [str(path.parent) for path in (checkpoint, text, harness_tasks, everything[1])]
    for value in strings(record):
        assert not any(folder in value for folder in folders) and not re.search(r"(^|[\s'\"])/\w", value), value
    assert record["command"].startswith("transformers-dsv3 evaluate model --text notes --tasks halves,halves_text ")
    assert "--json" not in record["command"]


def test_the_table_shows_the_figures(everything):
    _, path, result = everything
    printed, record = " ".join(result.output.split()), read_record(path)
    for figure in (
        f"{record.text['bits_per_byte']:.4f}",
        f"{record.routing['mean']['utilisation']:.1%}",
        "halves: acc",
        "halves_text: byte_perplexity",
        f"The record is in {path}.",
    ):
        assert figure in printed
    assert "halves_choice: acc" not in printed  # its group's figure is there


def test_the_same_command_gives_the_same_figures(everything, here):
    arguments, path, _ = everything
    done(*arguments, "--json", "again.json")
    first, again = (json.loads(file.read_text()) for file in (path, here / "again.json"))
    for part in ("checkpoint", "command", "settings", "seed", "text", "routing", "tasks", "human_eval"):
        assert first[part] == again[part], part


def test_an_interrupted_evaluation_goes_on(checkpoint, text, harness_tasks, here, monkeypatch):
    arguments = [checkpoint, "--text", text, "--tasks", "halves_choice,halves_text", "--include-path", harness_tasks]
    arguments += ["--what", "text,routing", "--limit", "3"]
    run = harness.TaskSuite.run

    def interrupt(self, name, *rest, **options):
        if name == "halves_text":
            raise KeyboardInterrupt
        return run(self, name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(harness.TaskSuite, "run", interrupt)
        result = evaluate(*arguments)
        assert result.exit_code == 130 and "The same command goes on from what is in evaluation.json" in result.output
    half = read_record(here / "evaluation.json")
    assert not half.complete and half.text and half.routing and set(half.tasks) == {"halves_choice"}

    measured = []
    with monkeypatch.context() as patch:
        for name in ("_measure_text", "_measure_routing", "_measure_task"):
            method = getattr(checkpoint_evaluation.CheckpointEvaluation, name)
            patch.setattr(
                checkpoint_evaluation.CheckpointEvaluation,
                name,
                lambda self, *given, method=method, **options: (
                    measured.append(options),
                    method(self, *given, **options),
                ),
            )
        result = done(*arguments)
    assert measured == [{"name": "halves_text"}]
    assert "Going on with evaluation.json, which has text, routing, tasks." in result.output
    whole = read_record(here / "evaluation.json")
    assert whole.complete and set(whole.tasks) == {"halves_choice", "halves_text"} and whole.text == half.text

    # Asked for once more, it is measured anew
    result = done(*arguments)
    assert "Going on" not in result.output and read_record(here / "evaluation.json").complete


def test_a_failing_part_leaves_the_others(checkpoint, text, here, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(checkpoint_evaluation.CheckpointEvaluation, "_measure_speed", fail)
    result = evaluate(checkpoint, "--text", text)
    assert isinstance(result.exception, RuntimeError)
    record = read_record(here / "evaluation.json")
    assert record.text and record.routing and record.speed is None and not record.complete
    assert [path.name for path in here.iterdir()] == ["evaluation.json"]


def test_a_task_that_does_not_fit_the_model(make_model, byte_tokenizer, harness_tasks, text, here):
    make_model(vocab_size=258, max_position_embeddings=16).save_pretrained(here / "short")
    byte_tokenizer.save_pretrained(here / "short")
    result = evaluate("short", "--text", text, "--tasks", "halves_text,halves_choice", "--include-path", harness_tasks)
    assert result.exit_code == 1 and "Error: halves_choice cannot be run on this model" in result.output
    record = read_record(here / "evaluation.json")
    assert not record.complete and record.speed and set(record.tasks) == {"halves_text"}


def test_records_of_other_evaluations_are_not_written_over(checkpoint, text, here):
    done(checkpoint, "--text", text, "--what", "text")
    before = (here / "evaluation.json").read_bytes()
    message = refused(checkpoint, "--text", text, "--what", "text", "--window", 32)
    assert "evaluation.json holds another evaluation, of model on" in message and "--overwrite" in message
    assert (here / "evaluation.json").read_bytes() == before
    done(checkpoint, "--text", text, "--what", "text", "--window", 32, "--overwrite")
    assert read_record(here / "evaluation.json").settings["window"] == 32
    (here / "notes.json").write_text('{"mine": true}')
    assert "is no record of `transformers-dsv3 evaluate`" in refused(
        checkpoint, "--text", text, "--json", "notes.json"
    )
    assert (here / "notes.json").read_text() == '{"mine": true}'


def test_records_of_other_weights_are_not_written_over(checkpoint, text, here, make_model, monkeypatch):
    shutil.copytree(checkpoint, here / "model")
    done("model", "--text", text, "--what", "text")
    before = (here / "evaluation.json").read_bytes()
    make_model(vocab_size=258, max_position_embeddings=512, seed=1).save_pretrained(here / "model")
    message = refused("model", "--text", text, "--what", "text")
    assert "evaluation.json holds another evaluation, of model on" in message
    assert (here / "evaluation.json").read_bytes() == before
    # Other settings show before the weights are read
    monkeypatch.setattr(checkpoint_evaluation.CheckpointSource, "identity", None)
    assert "holds another evaluation" in refused("model", "--text", text, "--what", "text", "--seed", 1)


def test_adapters(checkpoint, adapter, text, here):
    done(adapter, "--text", text, "--json", "adapter.json")
    record = read_record(here / "adapter.json")
    assert (record.checkpoint.name, record.checkpoint.base.name) == ("adapter", "model")
    assert record.checkpoint.sha256 == checkpoint_digest(adapter)
    assert record.checkpoint.base.sha256 == checkpoint_digest(checkpoint)
    assert record.routing and "mtp_acceptance_rate" in record.speed

    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
    merged.save_pretrained(here / "merged")
    for path in checkpoint.glob("tokenizer*"):
        shutil.copy(path, here / "merged")
    done("merged", "--text", text, "--what", "text", "--json", "merged.json")
    done(checkpoint, "--text", text, "--what", "text", "--json", "base.json")
    of_merged, of_base = (read_record(here / name).text["bits_per_byte"] for name in ("merged.json", "base.json"))
    assert record.text["bits_per_byte"] == pytest.approx(of_merged, rel=1e-5)
    assert abs(of_base - of_merged) > 0.01


def test_adapters_whose_base_has_moved(checkpoint, adapter, text, here, no_loading):
    shutil.copytree(adapter, here / "moved")
    path = here / "moved" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/nowhere/base"}))
    message = refused("moved", "--text", text)
    assert "base model of moved: /nowhere/base: no such file or folder; --base-model says where it is now" in message
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    assert "names no base model: give --base-model" in refused("moved", "--text", text)
    assert "is a whole checkpoint, not an adapter" in refused(checkpoint, "--base-model", checkpoint)
    with pytest.raises(AssertionError, match="weights read"):
        raise evaluate("moved", "--base-model", checkpoint, "--text", text).exception


def test_no_experts_no_routing(make_model, byte_tokenizer, text, here):
    make_model(vocab_size=258, first_k_dense_replace=2).save_pretrained(here / "dense")
    byte_tokenizer.save_pretrained(here / "dense")
    assert "has no mixture-of-experts layer" in refused("dense", "--what", "routing", "--text", text)
    done("dense", "--text", text, "--window", 32)
    record = read_record(here / "evaluation.json")
    assert record.routing is None and record.settings["what"] == ["text", "speed"] and record.text and record.speed


REFUSED = [
    (["--what", "text,sped"], "'sped' is none of text, routing, speed, none"),
    (["--what", "text,text"], "'text,text' names a part twice"),
    (["--what", "none"], "nothing to measure"),
    (["--what", "none", "--human-eval"], "does nothing without --what text, routing or speed"),
    (["--num-fewshot", "2"], "does nothing without --tasks"),
    (["--weak-sandbox"], "does nothing without --human-eval"),
    (["--dtype", "int8"], "'int8' is none of auto, float32, bfloat16, float16"),
    (["--window", "1"], "1 is not at least 2"),
    (["--window", "1024"], "1024 is more than the 512 positions of"),
    (["--batch-size", "0"], "0 is not at least 1"),
    (["--limit", "0"], "0 is not at least 1"),
    (["--num-fewshot", "-1"], "-1 is not at least 0"),
    (["--seed", "-1"], "-1 does not lie between 0 and"),
    (["--device", "nowhere"], "'nowhere' is no device of this machine"),
    (["--json", "missing/record.json"], "there is no folder"),
    (["--json", "."], "is a folder, not a file"),
    (["--text", "missing.txt"], "missing.txt does not exist"),
    (["--text", "{here}"], "has no UTF-8 text file in it"),
    (["--tasks", "gsm8"], "no task 'gsm8' in lm-evaluation-harness; near it are gsm8k"),
    (["--tasks", "halves_tex", "--include-path", "{tasks}"], "near it are halves_text"),
    (["--include-path", "missing", "--tasks", "a"], "missing is no folder with task files"),
    (["--include-path", "{tasks}"], "does nothing without --tasks"),
    (
        ["--human-eval"],
        "runs Python that the model writes on this machine, in a sandbox: add --execute-generated-code",
    ),
    (["--execute-generated-code"], "does nothing without --human-eval"),
    (["--human-eval", "--human-eval-temperature", "0"], "0.0 is not above 0"),
    (["--chat-template", "--tasks", "a"], "the tokenizer of"),
    (["--revision", "main"], "is a folder here, which has no revision 'main'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(given) for given, _ in REFUSED])
def test_bad_input_is_refused_early(checkpoint, text, harness_tasks, here, no_loading, arguments, message):
    arguments = [word.format(here=here, tasks=harness_tasks) for word in arguments]
    standard = [] if "--text" in arguments else ["--text", text]
    assert message in refused(checkpoint, *standard, *arguments)
    assert not list(here.iterdir())


def test_what_is_no_checkpoint(checkpoint, text, here, no_loading, monkeypatch):
    assert "./nowhere: no such file or folder" in refused("./nowhere", "--text", text)
    (here / "empty").mkdir()
    assert "empty is no checkpoint: it has neither config.json" in refused("empty", "--text", text)
    shutil.copy(checkpoint / "config.json", here / "empty")
    assert "empty has no tokenizer that can be loaded" in refused("empty", "--text", text)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused("dsv3-quickstarts", "--text", text)
    assert message.count("dsv3-quickstarts is no folder here, and from the Hub: ") == 1


def test_weights_that_are_broken(checkpoint, text, here, monkeypatch):
    shutil.copytree(checkpoint, here / "broken")
    (here / "broken" / "model.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert "model.safetensors: truncated or not a safetensors file" in refused("broken", "--text", text)
    (here / "broken" / "model.safetensors").unlink()
    assert "broken is no checkpoint: it has neither model.safetensors nor" in refused("broken", "--text", text)
    assert not (here / "evaluation.json").exists()


def test_without_the_packages(checkpoint, no_loading, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "transformers-dsv3[evaluate]"' in refused(checkpoint, "--tasks", "gsm8k")
    message = refused(checkpoint, "--human-eval", "--execute-generated-code")
    assert 'pip install "transformers-dsv3[evaluate]"' in message


def test_without_a_sandbox(checkpoint, text, no_loading, monkeypatch):
    monkeypatch.setattr(
        evaluation_options,
        "sandbox_refusal",
        lambda isolation=sandbox.NAMESPACES: None if "hook" in isolation else "not allowed",
    )
    arguments = [checkpoint, "--human-eval", "--execute-generated-code", "--what", "none"]
    message = refused(*arguments)
    assert "no sandbox can be made on this system (not allowed)" in message and "--weak-sandbox" in message
    settings = evaluation_options.human_eval_settings(True, True, 1, 0.8)
    assert settings.isolation == sandbox.AUDIT_HOOK


def test_a_folder_without_write_access(checkpoint, no_loading, monkeypatch):
    monkeypatch.setattr(
        evaluation_options, "file_refusal", lambda path: "nothing can be written in x: Permission denied"
    )
    assert "nothing can be written in x: Permission denied" in refused(checkpoint)
