"""`transformers-dsv3 filter`: what it prints and refuses; tests/data/filtering has what it does."""

import json

import pytest
from typer.testing import CliRunner

from transformers_dsv3_cli.main import app


pytest.importorskip("datatrove")


def run(*options):
    return CliRunner().invoke(app, ["filter", *map(str, options)])


@pytest.fixture
def pool(tmp_path):
    with open(tmp_path / "pool.jsonl", "w") as file:
        texts = ("one text of several", "another that is not like it", "and a third of its own")
        for i in range(6):
            file.write(json.dumps({"body": texts[i // 2], "id": str(i)}) + "\n")
        file.write("{\n")
    return tmp_path / "pool.jsonl"


def test_filters_reports_and_explains(pool, tmp_path):
    options = ["--input", pool, "--output", tmp_path / "out", "--stages", "exact,near", "--text-column", "body"]
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert "exact duplicate" in done.output and "Kept 3 of 6 documents" in done.output
    assert "Not read: 1, not JSON" in done.output and (tmp_path / "out" / "report.html").exists()
    assert "Kept 3 of 6 documents" in run(*options).output
    told = run("--output", tmp_path / "out", "--explain", "1")
    assert told.exit_code == 0 and "dropped by exact: exact duplicate 0/0" in told.output


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        (["--keep", "0.19"], "--keep", "needs the stage ngram"),
        (["--stages", "ngram"], "--seed-text", "is needed"),
        (["--scorer", "./model"], "--seed-text", "is needed"),
        ([], "--text-column", "has no column 'text'; it has body, id"),
        (["--explain", "x"], "--output", "is no folder of this command"),
    ],
)
def test_refuses_by_the_options_name(pool, tmp_path, options, option, message):
    refused = run("--input", pool, "--output", tmp_path / "out", *options)
    assert refused.exit_code == 2 and option in refused.output
    assert message in " ".join(refused.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_needs_an_input(tmp_path):
    refused = run("--output", tmp_path / "out")
    assert refused.exit_code == 2 and "--input" in refused.output
