import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load
from typer.testing import CliRunner

from transformers_dsv3.hub.hub_errors import HubError
from transformers_dsv3.hub.model_folder import CheckpointError, read_model_folder
from transformers_dsv3.hub.push import push_to_hub
from transformers_dsv3_cli.main import app


SHARD = "model-00002-of-00008.safetensors"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def there(hub, repo_id="anna/model", ref="main"):
    files = hub.files(repo_id, ref)
    del files[".gitattributes"]
    return files


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of the sharded checkpoint, to be spoilt."""
    return shutil.copytree(checkpoints / "sharded", tmp_path / "model")


@pytest.fixture
def adapter(make_model, tmp_path):
    """A folder with an adapter that was trained on `/home/somebody/model`."""
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_b_proj"], r=2))
    model.peft_config["default"].base_model_name_or_path = "/home/somebody/model"
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_repository_is_the_folder(hub, checkpoints, kind):
    commit = push_to_hub(checkpoints / kind, "anna/model")
    assert there(hub) == contents(checkpoints / kind)
    assert commit.oid == hub.repositories["model", "anna/model"].refs["main"]
    assert not hub.repositories["model", "anna/model"].private


def test_pushing_again_sends_nothing_and_commits_nothing(hub, checkpoints):
    first = push_to_hub(checkpoints / "sharded", "model")
    hub.received.clear()
    second = push_to_hub(checkpoints / "sharded", "anna/model")
    assert second.oid == first.oid
    assert hub.received["PUT"] == 0


def test_model_tokenizer_and_card_as_objects(hub, make_model, byte_tokenizer):
    model = make_model(vocab_size=258)
    push_to_hub(model, "lab/model", tokenizer=byte_tokenizer, card=ModelCard("---\nlicense: mit\n---\n"), private=True)
    files = there(hub, "lab/model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert hub.repositories["model", "lab/model"].private


def test_weights_of_another_layout_go_with_the_same_commit(hub, checkpoints):
    """Transformers would read the old single file before the new index."""
    push_to_hub(checkpoints / "single", "anna/model")
    before = len(hub.repositories["model", "anna/model"].commits)
    push_to_hub(checkpoints / "sharded", "anna/model")
    assert len(hub.repositories["model", "anna/model"].commits) == before + 1
    assert there(hub) == contents(checkpoints / "sharded")
    push_to_hub(checkpoints / "single", "anna/model")
    assert there(hub) == contents(checkpoints / "single")


def test_what_others_added_stays(hub, checkpoints):
    repository = hub.create("anna/model")
    hub.commit(repository, "main", {"notes.md": b"mine", "onnx/model.onnx": b"x", "model.fp16.safetensors": b"y"})
    push_to_hub(checkpoints / "sharded", "anna/model")
    assert {"notes.md", "onnx/model.onnx", "model.fp16.safetensors"} <= set(there(hub))


def test_branches_and_pull_requests(hub, checkpoints, monkeypatch):
    push_to_hub(checkpoints / "single", "anna/model")
    push_to_hub(checkpoints / "sharded", "anna/model", revision="v2", commit_message="Shards")
    assert there(hub) == contents(checkpoints / "single")
    assert there(hub, ref="v2") == contents(checkpoints / "sharded")
    repository = hub.repositories["model", "anna/model"]
    assert repository.commits[repository.refs["v2"]].title == "Shards"
    # Somebody who may only read can still ask
    commit = push_to_hub(checkpoints / "sharded", "anna/model", create_pr=True, token=hub.tokens["eve"])
    assert commit.pr_url.endswith("/discussions/1")
    assert there(hub) == contents(checkpoints / "single")
    assert there(hub, ref="refs/pr/1") == contents(checkpoints / "sharded")
    with pytest.raises(HubError, match="no repository anna/none, or no access"):
        push_to_hub(checkpoints / "single", "anna/none", create_pr=True)


def test_adapters(hub, adapter):
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="base_model_name_or_path is '/home/somebody/model'"):
        push_to_hub(adapter, "anna/adapter")
    assert hub.requests == []
    push_to_hub(adapter, "anna/adapter", base_model="anna/model")
    files = there(hub, "anna/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "anna/model"
    assert files["adapter_model.safetensors"] == weights
    # PEFT's template has an empty name, which the Hub refuses
    assert "base_model: ''\n" in (adapter / "README.md").read_text()
    assert ModelCard(files["README.md"].decode()).data.base_model == "anna/model"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] != "anna/model"
    with pytest.raises(CheckpointError, match="include_code goes with a model"):
        push_to_hub(adapter, "anna/adapter", base_model="anna/model", include_code=True)


def test_an_adapter_does_not_stay_beside_the_model_that_replaces_it(hub, adapter, checkpoints):
    push_to_hub(adapter, "anna/model", base_model="anna/base")
    push_to_hub(checkpoints / "single", "anna/model")
    assert "adapter_config.json" not in there(hub)


def test_what_stays_behind(hub, folder):
    private = ["optimizer.pt", "training_args.bin", "checkpoint-5/rng_state.pth", ".env", "runs/events", "notes.doc"]
    for name in private:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"private")
    (folder / "trainer_state.json").write_text("{}")
    shutil.copy(folder / SHARD, folder / "model-00009-of-00009.safetensors")
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.png").write_bytes(b"png")
    push_to_hub(folder, "anna/model")
    stays = {*private, "trainer_state.json", "model-00009-of-00009.safetensors"}
    assert set(there(hub)) == set(contents(folder)) - stays


def spoil(path, find, replacement):
    text = path.read_text()
    assert find in text
    path.write_text(text.replace(find, replacement))


def truncate(path, by=1):
    path.write_bytes(path.read_bytes()[:-by])


SPOILT = {
    "no such folder": (lambda folder: shutil.rmtree(folder), "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "is no checkpoint: it has neither config.json"),
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"files that do not exist: .*{SHARD}"),
    "truncated shard": (lambda folder: truncate(folder / SHARD), f"{SHARD}: truncated"),
    "empty shard": (lambda folder: (folder / SHARD).write_bytes(b""), f"{SHARD}: truncated"),
    "half an index": (lambda folder: truncate(folder / "model.safetensors.index.json", 9), "no whole JSON file"),
    "half a tokenizer": (lambda folder: truncate(folder / "tokenizer.json", 9), "tokenizer.json is no whole JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no model.safetensors, nor an"),
    "of another config": (
        lambda folder: spoil(folder / "config.json", '"n_routed_experts": 8', '"n_routed_experts": 10'),
        "do not fit its config.json:(.|\n)*missing tensors",
    ),
    "a token in a file": (
        lambda folder: (folder / "README.md").write_text("login(token='hf_" + "A1b2" * 9 + "')"),
        "README.md holds an access token",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_broken_folder_is_refused_before_anything_is_asked(hub, folder, what):
    spoil_it, message = SPOILT[what]
    spoil_it(folder)
    with pytest.raises(CheckpointError, match=message):
        push_to_hub(folder, "anna/model")
    assert hub.requests == []


def test_pickled_weights_are_refused(hub, folder):
    for shard in folder.glob("model*"):
        shard.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        push_to_hub(folder, "anna/model")


def test_files_that_are_too_large(hub, folder, monkeypatch):
    monkeypatch.setattr("transformers_dsv3.hub.model_folder.MAX_HTTP_DOWNLOAD_SIZE", 50_000)
    with pytest.raises(CheckpointError, match="max_shard_size"):
        push_to_hub(folder, "anna/model")


def test_remarks(folder):
    assert read_model_folder(folder).remarks == []
    for name in ("README.md", "tokenizer.json"):
        (folder / name).unlink()
    spoil(folder / "config.json", '"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 2')
    remarks = "\n".join(read_model_folder(folder).remarks)
    for part in (
        "announces 2 MTP layer(s), and the files hold 1",
        "no model card",
        "transformers-dsv3 card",
        "no tokenizer",
    ):
        assert part in remarks


def refused(hub, folder, message, repo_id="anna/model", **options):
    state = {key: dict(repository.refs) for key, repository in hub.repositories.items()}
    with pytest.raises(HubError, match=message) as error:
        push_to_hub(folder, repo_id, **options)
    assert hub.received["PUT"] == 0
    assert not [request for request in hub.requests if request.startswith("POST") and "yaml" not in request]
    assert {key: dict(repository.refs) for key, repository in hub.repositories.items()} == state
    assert not any(token in str(error.value) for token in hub.tokens.values())


@pytest.mark.parametrize(
    ["repo_id", "message"],
    [
        ("anna/a model", "no name of a repository"),
        ("datasets/anna/model", "no name of a repository"),
        ("https://huggingface.co/anna/model", "no name of a repository"),
        ("./model", "no name of a repository"),
        ("eve/model", "the token is anna's, and gives no access to 'eve'"),
        ("anna/data", "anna/data is a dataset, not a model"),
        ("eve/public", "gives no right to do this .HTTP 403: You have no write access"),
        ("eve/hidden", "gives no access to 'eve'"),
    ],
)
def test_repositories_that_cannot_be_written_to(hub, checkpoints, repo_id, message):
    hub.create("anna/data", repo_type="dataset")
    hub.create("eve/public")
    hub.create("eve/hidden", private=True)
    refused(hub, checkpoints / "single", message, repo_id)


def test_tokens(hub, checkpoints, monkeypatch):
    folder = checkpoints / "single"
    refused(hub, folder, "the token can only read", token=hub.tokens["read"])
    refused(hub, folder, "not valid, or no longer", token="hf_" + "Expired0" * 5)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Expired1" * 5)
    refused(hub, folder, "not valid, or no longer.*HTTP 401")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    refused(hub, folder, "no access token. Log in with `hf auth login`")


def test_revisions_and_visibility(hub, checkpoints):
    repository = hub.create("anna/model")
    repository.tags["v1"] = repository.refs["main"]
    refused(hub, checkpoints / "single", "'v1' is a tag or a commit", revision="v1")
    refused(hub, checkpoints / "single", "is a tag or a commit", revision=repository.refs["main"])
    refused(hub, checkpoints / "single", "no branch 'v2' to open a pull request for", revision="v2", create_pr=True)
    refused(hub, checkpoints / "single", "exists and is public, and --private", private=True)


def test_a_card_that_the_hub_does_not_take_is_refused_before_uploading(hub, folder):
    (folder / "README.md").write_text("---\nlicense\n---\n")
    with pytest.raises(HubError, match="Invalid metadata in README.md"):
        push_to_hub(folder, "anna/model")
    assert hub.received["PUT"] == 0


def test_nobody_answers(hub, checkpoints, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(hub, checkpoints / "single", "the connection failed .ConnectError")


def test_a_push_of_somebody_else_in_the_meantime_is_not_overwritten(hub, checkpoints):
    push_to_hub(checkpoints / "single", "anna/model")
    repository = hub.repositories["model", "anna/model"]
    hub.inject(
        "POST .*/preupload/", "call", action=lambda: hub.commit(repository, "main", {"model.safetensors": b"theirs"})
    )
    with pytest.raises(HubError, match="somebody else changed the repository"):
        push_to_hub(checkpoints / "sharded", "anna/model")
    assert there(hub)["model.safetensors"] == b"theirs"
    push_to_hub(checkpoints / "sharded", "anna/model")
    assert there(hub) == contents(checkpoints / "sharded")


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_line(hub, checkpoints, folder):
    (folder / "optimizer.pt").write_bytes(b"")
    listed = cli("push", folder, "model", "--dry-run")
    assert listed.exit_code == 0
    assert "config.json" in listed.output
    assert "optimizer.pt: a format that can run code" in listed.output
    assert hub.requests == []
    pushed = cli("push", folder, "model", "--private", "--revision", "v2", "--message", "Mine")
    assert pushed.exit_code == 0, pushed.output
    assert f"{hub.url}/anna/model/commit/" in pushed.output
    assert there(hub, ref="v2") == {k: v for k, v in contents(folder).items() if k != "optimizer.pt"}
    refusal = cli("push", folder / "none", "model")
    assert (refusal.exit_code, refusal.output.count("\n")) == (1, 1)
    assert "no such folder" in refusal.output
    assert cli("push", folder, "eve/model").exit_code == 1


def test_weights_are_those_of_the_model(hub, make_model):
    model = make_model(seed=3)
    push_to_hub(model, "anna/model")
    tensors = load(there(hub)["model.safetensors"])
    torch.testing.assert_close(tensors["lm_head.weight"], model.lm_head.weight, rtol=0, atol=0)
