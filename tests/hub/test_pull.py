import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_dsv3.hub.hub_errors import HubError
from transformers_dsv3.hub.pull import pull_from_hub
from transformers_dsv3.hub.push import push_to_hub
from transformers_dsv3_cli.main import app


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def pushed(hub, checkpoints):
    """A Hub that has `anna/model`: the sharded checkpoint."""
    push_to_hub(checkpoints / "sharded", "anna/model", private=True)
    hub.requests.clear()
    return hub


def test_to_the_cache(pushed, checkpoints, tmp_path):
    folder = pull_from_hub("anna/model")
    assert contents(folder) == pushed.files("anna/model")
    # `from_pretrained` finds it there by the branch's name, without asking
    pushed.requests.clear()
    model = AutoModelForCausalLM.from_pretrained("anna/model", local_files_only=True)
    # (Transformers asks for an adapter whatever it is told)
    assert {request.rpartition("/")[2] for request in pushed.requests} <= {"adapter_config.json"}
    assert model.num_parameters() > 0
    pull_from_hub("anna/model")
    assert not [request for request in pushed.requests if "/cdn/" in request]


def test_to_a_folder(pushed, tmp_path):
    folder = pull_from_hub("anna/model", output=tmp_path / "here" / "model")
    assert folder == tmp_path / "here" / "model"
    assert contents(folder) == pushed.files("anna/model")
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    with pytest.raises(FileExistsError, match="is there already"):
        pull_from_hub("anna/model", output=folder)


def test_revisions(pushed, checkpoints, tmp_path):
    first = pushed.repositories["model", "anna/model"].refs["main"]
    push_to_hub(checkpoints / "single", "anna/model")
    for revision, kind in ((None, "single"), ("main", "single"), (first, "sharded")):
        files = contents(pull_from_hub("anna/model", revision=revision, output=tmp_path / f"{revision}"))
        assert ("model.safetensors" in files) == (kind == "single")
        assert files["config.json"] == (checkpoints / kind / "config.json").read_bytes()


def test_pickled_files_are_left_out(pushed, tmp_path):
    pushed.commit(pushed.repositories["model", "anna/model"], "main", {"pytorch_model.bin": b"pickle"})
    assert "pytorch_model.bin" not in contents(pull_from_hub("anna/model", output=tmp_path / "model"))


@pytest.mark.parametrize("to_cache", [True, False])
def test_a_byte_that_flipped_once_is_fetched_again(pushed, tmp_path, to_cache):
    flipped = pushed.inject("GET /cdn/", "corrupt", at=1000)
    folder = pull_from_hub("anna/model", **({} if to_cache else {"output": tmp_path / "model"}))
    assert flipped.hits == 1
    assert contents(folder) == pushed.files("anna/model")


@pytest.mark.parametrize("to_cache", [True, False])
def test_bytes_that_keep_flipping_are_refused_and_not_kept(pushed, tmp_path, to_cache):
    flipped = pushed.inject("GET /cdn/", "corrupt", at=1000, times=99)
    with pytest.raises(HubError, match="model-00001-of-00008.safetensors, .* did not arrive .* 2 times"):
        pull_from_hub("anna/model", **({} if to_cache else {"output": tmp_path / "model"}))
    assert flipped.hits == 16
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "model").exists()
    if to_cache:
        with pytest.raises(OSError):
            AutoModelForCausalLM.from_pretrained("anna/model", local_files_only=True)
    # Nothing is in the way of the next one
    pushed.faults.clear()
    assert contents(pull_from_hub("anna/model")) == pushed.files("anna/model")


def test_small_files_are_compared_too(pushed, tmp_path):
    pushed.inject("GET .*/config.json", "corrupt", at=30, times=99)
    with pytest.raises(HubError, match="config.json of anna/model did not arrive"):
        pull_from_hub("anna/model", output=tmp_path / "model")


def test_what_is_broken_on_the_hub_is_named(pushed, tmp_path):
    repository = pushed.repositories["model", "anna/model"]
    pushed.commit(repository, "main", {}, deleted=["model-00002-of-00008.safetensors"])
    with pytest.raises(HubError, match="broken there: .*model-00002-of-00008.safetensors"):
        pull_from_hub("anna/model", output=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_files_of_another_revision_do_not_stay(pushed, checkpoints, tmp_path):
    """A folder that an earlier call left half done, of what the repository was then."""
    partial = tmp_path / ".model.partial"
    shutil.copytree(checkpoints / "single", partial)
    folder = pull_from_hub("anna/model", output=tmp_path / "model")
    assert contents(folder) == pushed.files("anna/model")


@pytest.mark.parametrize(
    ["repo_id", "options", "message"],
    [
        ("anna/none", {}, "no such repository, or it is private"),
        ("anna/model", {"revision": "v9"}, "no such revision"),
        ("anna/model", {"token": "eve"}, "no such repository, or it is private"),
        ("anna/model", {"token": "expired"}, "the access token is not valid, or no longer"),
        ("anna/a model", {}, "no name of a repository"),
        ("anna/empty", {}, "is no model: it has neither config.json nor adapter_config.json"),
    ],
)
def test_refusals(pushed, tmp_path, repo_id, options, message):
    pushed.create("anna/empty")
    if "token" in options:
        options = {"token": pushed.tokens.get(options["token"], "hf_" + "Expired0" * 5)}
    with pytest.raises(HubError, match=message):
        pull_from_hub(repo_id, output=tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
    assert not [request for request in pushed.requests if "/resolve/" in request]


def test_space(pushed, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100_000))
    with pytest.raises(HubError, match="needs 0.0 GB more, and .* has 0.0 GB free"):
        pull_from_hub("anna/model", output=tmp_path / "model")
    assert not [request for request in pushed.requests if "/cdn/" in request]


def test_command_line(pushed, tmp_path):
    result = CliRunner().invoke(app, ["pull", "anna/model", "--output", str(tmp_path / "model")])
    assert (result.exit_code, result.output.strip()) == (0, str(tmp_path / "model"))
    again = CliRunner().invoke(app, ["pull", "anna/model", "--output", str(tmp_path / "model")])
    assert (again.exit_code, again.output.count("\n")) == (1, 1)
