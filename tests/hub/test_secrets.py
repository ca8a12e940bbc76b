"""Every kind of the Hub's access tokens is known to both that look for them: records and cards, and uploads."""

import shutil

import pytest

from transformers_dsv3.evaluation.shareable import TOKEN_PREFIXES, shareable, shareable_command, shareable_text
from transformers_dsv3.hub.model_folder import CheckpointError, read_model_folder


TOKENS = {
    "user": "hf_" + "aB3dE6gH9j" * 3 + "kLmN",
    "short user": "hf_" + "aB3dE6gH9j" * 2 + "k",
    "organisation": "api_org_" + "aB3dE6gH9j" * 3 + "kLmN",
    "application": "hf_oauth_" + "eyJhbGciOi." * 3 + "aB3-dE6_gH9",
    "job": "hf_jwt_" + "eyJhbGciOiJFZERTQSJ9.eyJyZWFkIjp0cnVl.aB3-dE6_gH9j",
}


@pytest.mark.parametrize("kind", TOKENS)
def test_every_kind_of_token_stays_here(checkpoints, tmp_path, kind):
    token = TOKENS[kind]
    for text in (f"key {token}.", f"key '{token}'", f"https://hub?key={token}", f"Bearer%20{token}"):
        shown = shareable_text(text)
        assert "***" in shown and token not in shown and token[-8:] not in shown
    assert shareable({"a": [token]}) == {"a": ["hf_***"]}
    assert token[-8:] not in shareable_command(["transformers-dsv3", "run", "x.py", token, f"--name={token}"])

    folder = shutil.copytree(checkpoints / "sharded", tmp_path / "model")
    read_model_folder(folder)
    (folder / "README.md").write_text(f"login(token='{token}')")
    with pytest.raises(CheckpointError, match="README.md holds an access token"):
        read_model_folder(folder)


def test_no_kind_is_left_out():
    assert {next(p for p in TOKEN_PREFIXES[::-1] if token.startswith(p)) for token in TOKENS.values()} == set(
        TOKEN_PREFIXES
    )


@pytest.mark.parametrize("name", ["hf_transfer", "hf_hub_download", "hf_oauth_", "hf_model.py", "api_org_name"])
def test_names_that_begin_alike_are_kept(checkpoints, tmp_path, name):
    assert shareable_text(f"see {name}, please") == f"see {name}, please"
    folder = shutil.copytree(checkpoints / "sharded", tmp_path / "model")
    (folder / "README.md").write_text(f"see {name}, please")
    assert "README.md" in read_model_folder(folder).files
