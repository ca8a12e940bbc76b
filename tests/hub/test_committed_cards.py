"""The cards in model_cards: made again from records they are the same, the Hub takes them, their commands parse."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.main import get_command

from transformers_dsv3 import model_card
from transformers_dsv3.evaluation.shareable import shareable
from transformers_dsv3.hub.card_figures import card_figures, drawn_from
from transformers_dsv3.hub.card_sources import read_sources
from transformers_dsv3.hub.model_card import unsealed, write_card
from transformers_dsv3.training.script_arguments import ScriptArgumentParser
from transformers_dsv3_cli.main import app


ROOT = Path(__file__).parents[2]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/checkpoint_record.json"))
# Of other projects: the words before options that `tests/interop` uses, or that this page's reader has to know
OTHERS = ("vllm serve",)


@pytest.fixture(params=CARDS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_the_recipes_have_cards():
    assert {folder.name for folder in CARDS} >= {"dsv3-quickstart", "dsv3-dpo", "dsv3-lora"}
    index = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "model_cards").iterdir():
        assert path.name == "README.md" or f"({path.name}" in index, path.name


def test_made_again_they_are_the_same(folder, tmp_path, monkeypatch):
    written = (folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "card")
    Path("card/README.md").unlink()
    card, path = write_card("card", **unsealed(written))
    assert path.read_text(encoding="utf-8") == written
    figures = {figure.name: figure for figure in card_figures(read_sources("card"))}
    committed = {path.name: path.read_bytes() for path in (folder / "figures").glob("*.png")}
    assert set(committed) == set(figures) == set(card.figures)
    for name, data in committed.items():
        assert drawn_from(data) == figures[name].digest  # from the records that are here
        if software(data) == software(card.figures[name]):
            assert data == card.figures[name]
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == {
        path.name: path.read_bytes() for path in Path("card").glob("*.json")
    }


def software(png):
    """The drawing library's name and version."""
    return re.search(rb"Software\0([^\0]*?)[\0-\x1f]", png)[1]


def test_the_hub_takes_them(folder, hub):
    card = ModelCard.load(folder / "README.md")
    card.validate()
    assert hub.requests == ["POST /api/validate-yaml"]
    assert card.data.eval_results and card.data.license


def test_records_alone_are_committed(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".md", ".json", ".png"}
    assert sum(path.stat().st_size for path in files) < 500_000
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        assert shareable(values) == values
    record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert not record["commit"].endswith("-dirty")


def commands(card):
    for block in re.findall(r"^(`{3,})bash\n(.*?)\n\1$", card, flags=re.DOTALL | re.MULTILINE):
        yield from re.split(r" && \\\n\s+|\n", block[1])
    yield from re.findall(r"`(vllm serve [^`]*)`", card)


class Parsed(Exception):
    """Raised in a script's place when its command line has been read."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Function that reads a command line as its program does, and goes no further."""
    read = ScriptArgumentParser.parse_args_into_dataclasses

    def stop(parser, *arguments, **options):
        raise Parsed(read(parser, *arguments, **options))

    monkeypatch.setattr(ScriptArgumentParser, "parse_args_into_dataclasses", stop)
    monkeypatch.chdir(tmp_path)

    def parse_command(line):
        program, *arguments = shlex.split(line)
        if program == "transformers-dsv3":
            verbs = get_command(app)
            verb = verbs.commands[arguments[0]]
            return verb.make_context(arguments[0], arguments[1:])
        if program == "python" and arguments[0].startswith("examples/"):
            monkeypatch.setattr(sys, "argv", arguments)
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            return None
        assert line.startswith(OTHERS), line
        return None

    return parse_command


def test_their_commands_parse(folder, parse):
    lines = list(commands((folder / "README.md").read_text(encoding="utf-8")))
    assert lines[0].startswith(("python", "transformers-dsv3")) and len(lines) >= 2
    for line in lines:
        parse(line)


def test_an_option_that_is_gone_shows(parse):
    with pytest.raises(Exception, match="No such option"):
        parse("transformers-dsv3 quickstart --no-such-option 1")
    with pytest.raises(SystemExit):
        parse("python examples/dpo.py --no_such_option 1")


def test_the_training_of_each_begins_with_the_first_command(folder):
    record = json.loads((folder / "training_record.json").read_text(encoding="utf-8"))
    assert record["commands"][0] == "transformers-dsv3 quickstart"
    assert str(model_card(folder)).count(" && \\\n  ".join(record["commands"])) == 1
