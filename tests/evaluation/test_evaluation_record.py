"""Records of evaluations: what is written is read again, and what is no record is refused by its field."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

from transformers_dsv3.evaluation.checkpoint_identity import CheckpointIdentity
from transformers_dsv3.evaluation.evaluation_record import (
    EvaluationRecord,
    RecordError,
    new_record,
    read_record,
)
from transformers_dsv3.evaluation.routing import routing_report


@pytest.fixture(scope="module")
def record(make_model):
    base = CheckpointIdentity("base", "a" * 64, "b" * 64, revision="c" * 40)
    identity = CheckpointIdentity("adapter", "d" * 64, "e" * 64, base=base)
    record = new_record(identity, command="transformers-dsv3 evaluate adapter", settings={"limit": 3}, seed=7)
    figures = ("bits_per_byte", "nats_per_token", "byte_perplexity", "zlib_bits_per_byte", "lzma_bits_per_byte")
    record.text = {"source": "notes", "sha256": "f" * 64, **dict.fromkeys(figures, 1.5), "perplexity": float("inf")}
    record.text |= {"documents": 1, "tokens": 10, "bytes": 20, "window": 16}
    record.routing = routing_report(make_model(), torch.arange(40), window=16).to_dict()
    metrics = {"acc,none": {"value": 0.5, "stderr": float("nan"), "higher_is_better": True}}
    task = {"metrics": metrics, "n": 4, "num_fewshot": 0, "version": 1}
    record.tasks = {"local": {**task, "dataset": None, "subtasks": [], "truncated": False}}
    record.human_eval = {"pass@k": {"1": {"value": 0.0, "stderr": 0.0}}, "problems": 164, "outcomes": {"died": 164}}
    return record


def test_written_and_read(record, tmp_path):
    record.write(tmp_path / "evaluation.json")
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    read = read_record(tmp_path / "evaluation.json")
    assert read.checkpoint == record.checkpoint
    assert read.to_dict() == record.to_dict()
    assert read.tasks["local"]["metrics"]["acc,none"]["stderr"] is None  # JSON has no NaN
    assert read.text["perplexity"] is None
    assert read.versions["torch"] == torch.__version__ and read.hardware["device"] == "cpu"


TASK = {"metrics": {}, "n": 1, "num_fewshot": 0, "dataset": None, "subtasks": [], "truncated": False}
WRONG = [
    ({"record": "bench"}, "no record of `transformers-dsv3 evaluate`"),
    ({"version": 2}, "version 2 of the record; this package reads version 1"),
    ({"seed": "0"}, "field 'seed' is '0', not int"),
    ({"seed": True}, "field 'seed' is True, not int"),
    ({"checkpoint": {"name": "a"}}, "field 'checkpoint.sha256' is missing"),
    ({"text": {"bits_per_byte": 1.0}}, "field 'text.source' is missing"),
    ({"routing": {"layers": 3}}, "field 'routing' is no routing report"),
    ({"speed": {"threads": "2"}}, "field 'speed.threads' is '2', not int"),
    ({"tasks": {"a": {**TASK, "metrics": {"acc": 0.5}}}}, "'tasks.a.metrics.acc' is 0.5, not dict"),
    ({"tasks": {"a": {**TASK, "truncated": None}}}, "'tasks.a.truncated' is None, not bool"),
    ({"human_eval": {}}, "field 'human_eval.pass@k' is missing"),
    ({"human_eval": {"pass@k": {"1": 0.5}, "problems": 1, "outcomes": {}}}, "'human_eval.pass@k.1' is 0.5, not dict"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_no_record(record, tmp_path, change, message):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**record.to_dict(), **change}))
    with pytest.raises(RecordError, match="other.json") as caught:
        read_record(path)
    assert message in str(caught.value)


def test_a_digest_is_a_digest(record):
    values = record.to_dict()
    values["checkpoint"]["base"]["sha256"] = "/home/somebody"
    with pytest.raises(RecordError, match="'checkpoint.base.sha256' is '/home/somebody', not 64 hexadecimal digits"):
        EvaluationRecord.from_dict(values)


def test_what_is_made_is_checked_as_what_is_read(record):
    with pytest.raises(StrictDataclassFieldValidationError, match="not 64 hexadecimal digits"):
        CheckpointIdentity("a", "d" * 64, "e" * 63)
    with pytest.raises(StrictDataclassFieldValidationError, match="'seed' expected int"):
        record.seed = "7"
    assert record.seed == 7


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecordError, match="missing.json cannot be read: No such file"):
        read_record(tmp_path / "missing.json")
    (tmp_path / "half.json").write_text('{"record": ')
    with pytest.raises(RecordError, match="half.json is not JSON"):
        read_record(tmp_path / "half.json")
