"""Every command and program of examples/share.md runs, in its order, on small stand-ins and a Hub on loopback."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import torch
from card_material import save_adapter, train
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_dsv3_cli.main import app


PAGE = (Path(__file__).parents[2] / "examples" / "share.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def page(hub, make_model, byte_tokenizer, tmp_path, monkeypatch):
    """Function that runs a block of the page, in a folder that has what `quickstart` and `lora_sft.py` would leave."""
    monkeypatch.chdir(tmp_path)
    for user in hub.users.values():
        user.name = "me" if user.name == "anna" else user.name
    hub.create("lab/model")
    make_model(vocab_size=258, max_position_embeddings=512).save_pretrained("dsv3-quickstart")
    byte_tokenizer.save_pretrained("dsv3-quickstart")
    train("dsv3-quickstart")
    save_adapter("./dsv3-quickstart", AutoModelForCausalLM.from_pretrained("dsv3-quickstart"), "dsv3-lora")
    byte_tokenizer.save_pretrained("dsv3-lora")
    train("dsv3-lora", "LoRA", base="./dsv3-quickstart", parameters={"trained": 1, "total": 2})
    Path("notes.txt").write_text("".join(f"line {n}: {n * n}\n" for n in range(60)))

    def run(language, text):
        if language == "python":
            return exec(text, {})
        for line in text.splitlines():
            program, verb, *arguments = shlex.split(line.partition("   #")[0])
            if program != "transformers-dsv3" or verb == "quickstart":
                continue  # made above
            if verb == "evaluate":
                arguments += ["--text", "notes.txt", "--what", "text,routing"]  # speed takes seconds
            result = CliRunner().invoke(app, [verb, *arguments])
            assert result.exit_code == 0, (line, result.output)

    return run


def test_the_page(page, hub, tmp_path):
    for language, text in BLOCKS:
        page(language, text)
    model = hub.repositories["model", "me/my-model"]
    assert model.private and {"main", "v2"} <= set(model.refs) and model.commits[model.refs["v2"]].title
    card = ModelCard(hub.files("me/my-model")["README.md"].decode())
    card.validate()
    assert card.data.license == "apache-2.0" and card.data.eval_results
    assert (tmp_path / "my-model" / "README.md").read_bytes() == hub.files("me/my-model")["README.md"]
    assert (tmp_path / "model_cards" / "my-model" / "README.md").read_text() == str(card)
    assert "refs/pr/1" in hub.repositories["model", "lab/model"].refs

    adapter = ModelCard(hub.files("me/my-adapter")["README.md"].decode())
    adapter.validate()
    assert adapter.data.base_model == "me/my-model"
    merged = AutoModelForCausalLM.from_pretrained("./merged")
    base = AutoModelForCausalLM.from_pretrained("./dsv3-quickstart")
    ids = torch.arange(10)[None]
    assert not torch.allclose(merged(ids).logits, base(ids).logits)


def test_what_the_page_promises():
    commands = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    verbs = [line.split()[1] for line in commands if line.startswith("transformers-dsv3")]
    assert Counter(verbs) == {"quickstart": 1, "evaluate": 2, "card": 4, "push": 5, "pull": 2}
    assert sum(language == "python" for language, _ in BLOCKS) == 3
