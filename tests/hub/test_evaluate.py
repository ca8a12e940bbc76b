"""Evaluating what is on a Hub: the commit is in the record, and nothing large comes before all else is in order."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_dsv3.evaluation.checkpoint_identity import checkpoint_digest
from transformers_dsv3.evaluation.evaluation_record import read_record
from transformers_dsv3.hub.push import push_to_hub
from transformers_dsv3_cli.main import app


@pytest.fixture
def pushed(hub, checkpoints, tmp_path, monkeypatch):
    """A Hub that has `anna/model`: the sharded checkpoint, and a text here."""
    push_to_hub(checkpoints / "sharded", "anna/model", private=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {n}: {n * n}\n" for n in range(20)))
    hub.requests.clear()
    return hub


def evaluate(*arguments):
    result = CliRunner().invoke(
        app, ["evaluate", *arguments, "--what", "text", "--text", "text.txt", "--window", "32"]
    )
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_a_repository_and_its_commit(pushed, checkpoints, tmp_path):
    first = pushed.repositories["model", "anna/model"].refs["main"]
    assert evaluate("anna/model")[0] == 0
    record = read_record(tmp_path / "evaluation.json")
    assert (record.checkpoint.name, record.checkpoint.revision) == ("anna/model", first)
    assert record.checkpoint.sha256 == checkpoint_digest(checkpoints / "sharded")
    assert record.command.startswith("transformers-dsv3 evaluate anna/model --text text.txt")

    # The same weights in one file are the same checkpoint, at another commit
    push_to_hub(checkpoints / "single", "anna/model")
    for revision in ("main", first):
        assert evaluate("anna/model", "--revision", revision, "--json", f"{revision}.json")[0] == 0
    assert read_record(tmp_path / "main.json").checkpoint.revision != first
    assert read_record(tmp_path / f"{first}.json").checkpoint == record.checkpoint


def test_weights_come_last(pushed, one_task_index):
    code, message = evaluate("anna/model", "--tasks", "gsm8")
    assert code == 2 and "near it are gsm8k" in message
    assert not [request for request in pushed.requests if request.endswith(".safetensors")]


def test_adapters_and_their_base(pushed, checkpoints, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoints / "single"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "anna/model"}))
    code, message = evaluate("adapter")
    assert code == 0, message
    identity = read_record(tmp_path / "evaluation.json").checkpoint
    assert (identity.name, identity.revision, identity.base.name) == ("adapter", None, "anna/model")
    assert identity.base.revision == pushed.repositories["model", "anna/model"].refs["main"]


def test_what_is_not_there(pushed, monkeypatch):
    code, message = evaluate("anna/other")
    assert code == 2 and "anna/other is no folder here, and from the Hub: there is no such repository" in message
    code, message = evaluate("anna/model", "--revision", "v9")
    assert code == 2 and "from the Hub: the repository has no such revision" in message
    monkeypatch.setenv("HF_TOKEN", pushed.tokens["eve"])
    code, message = evaluate("anna/model")
    assert code == 2 and "it is private and the token gives no access to it" in message
    assert pushed.tokens["eve"] not in message
