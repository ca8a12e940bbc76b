"""The card command: what it writes and says, and what it refuses before a weight is read."""

import json
import re

import pytest
from card_material import evaluation, train
from typer.testing import CliRunner

from transformers_dsv3.evaluation.checkpoint_identity import checkpoint_digest
from transformers_dsv3.hub.model_card import unsealed
from transformers_dsv3_cli.main import app


@pytest.fixture
def here(make_model, byte_tokenizer, tmp_path, monkeypatch):
    """A folder with `model`, trained, and `evaluation.json` about it."""
    monkeypatch.chdir(tmp_path)
    model = make_model(vocab_size=258)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    train(tmp_path / "model")
    evaluation(tmp_path / "model", model).write(tmp_path / "evaluation.json")
    return tmp_path


def card(*arguments):
    result = CliRunner().invoke(app, ["card", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def refused(*arguments):
    code, message = card(*arguments)
    assert code == 2, message
    return message


def test_a_card_with_all_that_is_known(here):
    code, message = card("model", "--results", "evaluation.json", "--license", "mit", "--language", "en,code")
    assert (code, message) == (0, "model/README.md with figures/routing.png, training.png")
    text = (here / "model" / "README.md").read_text()
    assert unsealed(text) == {"license": "mit", "language": ["en", "code"]}
    assert "license: mit\n" in text and "| bits per byte | 1.8683 |" in text
    assert (here / "model" / "evaluation.json").read_bytes() == (here / "evaluation.json").read_bytes()
    # Asked for again, it is the same
    assert card("model")[0] == 0 and (here / "model" / "README.md").read_text() == text


def test_elsewhere_and_from_there(here):
    code, message = card("model", "--results", here, "--output", "cards/small", "--name", "ada/small")
    assert code == 0 and "Note: the licence is not stated: say it with --license" in message
    folder = here / "cards" / "small"
    names = {path.name for path in folder.glob("*.*")}
    assert names == {"README.md", "config.json", "checkpoint_record.json", "training_record.json", "evaluation.json"}
    text = (folder / "README.md").read_text()
    assert "# small" in text and 'from_pretrained("ada/small")' in text
    assert not (here / "model" / "README.md").exists()
    assert card(folder)[0] == 0 and (folder / "README.md").read_text() == text


def test_what_is_missing_is_told(here):
    (here / "model" / "training_record.json").unlink()
    _, message = card("model", "--license", "apache-2.0")
    for note in (
        "there is no training_record.json: the card knows nothing of the training",
        "there is no record of an evaluation: `transformers-dsv3 evaluate model` writes evaluation.json, for --res",
    ):
        assert f"Note: {note}" in message


def test_refusals(here, make_model):
    make_model(vocab_size=258, seed=1).save_pretrained(here / "other")
    evaluation(here / "other", None).write(here / "other.json")
    message = refused("model", "--results", "other.json")
    assert "--results" in message and "other.json is of another model" in message
    for digest in (checkpoint_digest(here / "model"), checkpoint_digest(here / "other")):
        assert digest in re.sub(r"\s", "", message)
    assert "nowhere: no such folder" in refused("nowhere")
    (here / "half.json").write_text('{"record')
    assert "half.json is not JSON" in refused("model", "--results", "half.json")
    assert "'English' is no code" in refused("model", "--language", "English")
    assert "license_name and license_link go with license 'other'" in refused("model", "--license-name", "x")
    (here / "model" / "README.md").write_text("# Mine")
    assert "README.md was not written by this command: --force" in refused("model")
    assert (here / "model" / "README.md").read_text() == "# Mine"
    assert card("model", "--force")[0] == 0 and "# Mine" not in (here / "model" / "README.md").read_text()


def test_a_disk_that_fills_up_leaves_the_old_card(here, monkeypatch):
    card("model", "--license", "mit")
    before = (here / "model" / "README.md").read_bytes()
    write = type(here).write_bytes

    def fill(path, data):
        if path.name == "README.md.partial":
            write(path, data[:100])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(type(here), "write_bytes", fill)
    code, message = card("model", "--license", "apache-2.0")
    assert code == 1 and "Error: the card was not written: [Errno 28] No space left" in message
    assert (here / "model" / "README.md").read_bytes() == before
    assert not list((here / "model").rglob("*.partial"))


def test_help_teaches():
    result = CliRunner().invoke(app, ["card", "--help"])
    assert result.exit_code == 0 and "Examples:" in result.output
    examples = re.findall(r"^ *(transformers-dsv3 card .*)$", result.output, flags=re.MULTILINE)
    assert len(examples) == 3


def test_push_points_to_it(here):
    result = CliRunner().invoke(app, ["push", "model", "ada/model", "--dry-run"])
    assert "transformers-dsv3 card model" in result.output
    card("model")
    result = CliRunner().invoke(app, ["push", "model", "ada/model", "--dry-run"])
    assert "no model card" not in result.output
    for name in ("README.md", "figures/training.png", "training_record.json", "checkpoint_record.json"):
        assert f"  {name}\n" in result.output
    assert json.loads((here / "model" / "config.json").read_text())["model_type"] == "deepseek_v3"
