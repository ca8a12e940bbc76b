"""What a training run leaves: its own trainer's log and arguments, and nothing of the user's machine."""

import json
import shutil
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

from transformers_dsv3.evaluation.checkpoint_identity import checkpoint_digest
from transformers_dsv3.evaluation.evaluation_record import RecordError
from transformers_dsv3.evaluation.training_record import (
    MOST_POINTS,
    digest_of_rows,
    history,
    read_training_record,
    result,
    save_training_record,
)
from transformers_dsv3.training.run_folder import is_template


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    """A finished run of four steps: its folder, its trainer, and a function that records it with changed fields."""
    folder = tmp_path_factory.mktemp("ada") / "dsv3-small"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        hub_token="hf_" + "x" * 34,
    )
    rows = [{"input_ids": torch.arange(5), "labels": torch.arange(5)} for _ in range(8)]
    trainer = Trainer(model=make_model(num_nextn_predict_layers=0), args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder))

    def record(**changes):
        fields = {"method": "pre-training", "arguments": arguments, "state": trainer.state, "data": {"source": "text"}}
        return save_training_record(folder, **{**fields, "block_size": 5, **changes})

    return folder, trainer, record


@pytest.fixture
def command(monkeypatch):
    """Function from arguments to a process that was started with them."""
    return lambda *arguments: monkeypatch.setattr(sys, "argv", list(arguments))


def test_a_record_holds_the_run(run, command):
    folder, trainer, record = run
    command("/opt/bin/train.py", "--data", "/home/ada/text", "--hub_token", "hf_" + "x" * 34)
    written = record(data={"source": "/home/ada/text"}, results=[result("loss", "held-out text", 1.5, 2.0)])
    read = read_training_record(folder / "training_record.json")
    assert read == written
    assert read["checkpoint"]["name"] == "dsv3-small"
    assert read["checkpoint"]["sha256"] == checkpoint_digest(folder)
    assert (read["steps"], read["tokens"], read["processes"]) == (4, 4 * 2 * 3 * 5, 1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert read["history"]["loss"]["steps"] == [1, 2, 3, 4]
    assert read["history"]["loss"]["values"] == pytest.approx(losses, rel=1e-4)
    assert read["seconds"] == trainer.state.log_history[-1]["train_runtime"]
    for name in ("learning_rate", "weight_decay", "adam_beta2", "seed"):
        assert read["arguments"][name] == getattr(trainer.args, name)
    assert read["results"] == [{"metric": "loss", "data": "held-out text", "before": 2.0, "after": 1.5, "beside": {}}]
    assert read["commands"] == ["python bin/train.py --data text --hub_token '***'"]
    text = (folder / "training_record.json").read_text()
    assert "/home" not in text and "hf_x" not in text and str(folder.parent) not in text
    assert not list(folder.glob("*.partial"))


def test_the_log_of_a_run_that_was_killed_at_its_end_is_its_checkpoints(run, command):
    folder, trainer, record = run
    command("train.py")
    whole = record()["history"]
    state = type(trainer.state)()  # of a trainer that had nothing left to train
    assert record(state=state)["history"] == whole
    assert record(state=state)["steps"] == 4


def test_commands_lead_from_the_base_to_the_model(run, command, tmp_path):
    folder, _, record = run
    command("transformers-dsv3", "quickstart")
    record()
    shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("checkpoint-*"))
    base = tmp_path / "base"
    command("examples/dpo.py", "--seed", "1")
    (folder / "training_record.json").unlink()
    made = record(base=base)
    assert made["base"] == {"name": "base", "sha256": checkpoint_digest(base)}
    assert made["commands"] == ["transformers-dsv3 quickstart", "python examples/dpo.py --seed 1"]

    values = json.loads((base / "training_record.json").read_text())
    values["checkpoint"]["sha256"] = "0" * 64  # of other weights
    (base / "training_record.json").write_text(json.dumps(values))
    assert record(base=base)["commands"] == ["python examples/dpo.py --seed 1"]
    assert record(base="owner/name")["base"] == {"name": "owner/name", "sha256": None}


def test_training_further_adds_a_command(run, command):
    folder, trainer, record = run
    command("transformers-dsv3", "quickstart")
    record()
    assert record()["commands"] == ["transformers-dsv3 quickstart"]  # the same run, recorded again
    command("transformers-dsv3", "quickstart", "--steps", "2")
    trainer.args.max_steps = 6
    try:
        assert record()["commands"] == ["transformers-dsv3 quickstart", "transformers-dsv3 quickstart --steps 2"]
    finally:
        trainer.args.max_steps = 4
        (folder / "training_record.json").unlink()


def test_curves():
    log = [{"step": step, "loss": 1 / step, "mtp/loss": 2.0, "grad_norm": 1.0} for step in range(1, 1001)]
    log += [{"step": 1000, "eval_text_loss": 0.5, "train_loss": 3.0}]
    curves = history(log)
    assert set(curves) == {"loss", "mtp/loss", "eval_text_loss"}
    assert len(curves["loss"]["steps"]) <= MOST_POINTS and curves["loss"]["steps"][-1] == 1000
    assert len(set(map(int.__sub__, curves["loss"]["steps"][1:], curves["loss"]["steps"]))) == 1  # evenly
    for step, value in zip(curves["loss"]["steps"], curves["loss"]["values"]):
        assert value == pytest.approx(1 / step, rel=1e-4)


def test_rows_have_a_digest():
    rows = [{"prompt": "a", "chosen": "b"}, {"prompt": "c", "chosen": "d"}]
    assert digest_of_rows(rows) == digest_of_rows([dict(reversed(row.items())) for row in rows])
    assert digest_of_rows(rows) != digest_of_rows(rows[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": "bench"}, "no record of a training run"),
        ({"version": 9}, "version 9 of the record"),
        ({"steps": "4"}, "field 'steps' is '4', not int"),
        ({"commands": None}, "field 'commands' is None, not list"),
        ({"commands": [1]}, "field 'commands' is [1], not list of str"),
        ({"base": {"sha256": None}}, "field 'base.name' is missing"),
        ({"parameters": {"trained": 1}}, "field 'parameters.total' is missing"),
        ({"checkpoint": {}}, "field 'checkpoint.name' is missing"),
        ({"results": [{"metric": "loss"}]}, "field 'results.0.data' is missing"),
        ({"history": {"loss": {"steps": []}}}, "field 'history.loss.values' is missing"),
    ],
)
def test_what_is_no_record(run, command, tmp_path, change, message):
    command("train.py")
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**run[2](), **change}))
    with pytest.raises(RecordError, match="other.json") as caught:
        read_training_record(path)
    assert message in str(caught.value)
    path.write_text("{")
    with pytest.raises(RecordError, match="is not JSON"):
        read_training_record(path)


def test_templates_of_trainers_are_known():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard.from_template(huggingface_hub.ModelCardData())  # as PEFT does
    assert is_template(str(card))
    assert not is_template("# My model\n\nIt has been trained using [TRL](https://github.com/huggingface/trl).")
